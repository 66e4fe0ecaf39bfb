// What the x86 instruction sets share beyond their headers.
#pragma once

#include "kernels/isa.h"

namespace dspark::kernels {

// A part of columns [begin, begin + columns.n_columns) of the product into records. Compiled for AVX2.
void prepare_x86(const Product& product, int64_t begin, const Columns& columns, Part part);

// F, BW, DQ, VL and VNNI, and an operating system that keeps their registers.
[[nodiscard]] bool has_avx512_vnni();

// Where weights are prefetched to. Into L1 on Zen 5, which falls, for seconds or for as long as a process lives, into a
// state where it drops prefetches into L2: 3 columns of Q4_K from memory 67 GMAC/s in place of 175. Into L2 elsewhere:
// Zen 4 has too few misses outstanding in L1 to hide memory (one column of Q8_0 in strips 10 GB/s in place of 19).
extern const bool prefetches_to_l1;

} // namespace dspark::kernels
