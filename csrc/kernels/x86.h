// What the x86 instruction sets share beyond their headers.
#pragma once

#include "kernels/isa.h"

namespace dspark::kernels {

// A part of columns [begin, begin + columns.n_columns) of the product into records. Compiled for AVX2.
void prepare_x86(const Product& product, int64_t begin, const Columns& columns, Part part);

// F, BW, DQ, VL and VNNI, and an operating system that keeps their registers.
[[nodiscard]] bool has_avx512_vnni();

} // namespace dspark::kernels
