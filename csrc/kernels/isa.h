// What one instruction set provides. One file per instruction set defines one of these; dispatch.cpp picks at run time.
#pragma once

#include "kernels/blocks.h"
#include "kernels/columns.h"
#include "kernels/kernels.h"

namespace dspark::kernels {

struct Isa {
    std::string_view name;
    // Columns [begin, begin + columns.n_columns) of the product into the tiles of `columns` (sizes are set).
    void (*prepare)(const Product& product, int64_t begin, Columns& columns);
    // Outputs [first, last) of those columns.
    void (*multiply)(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last);
};

// nullptr: not compiled for this architecture, or the processor lacks it.
[[nodiscard]] const Isa* find_avx2();

// Outputs that one pass of the inner loop computes: threads share the work in multiples of it.
inline constexpr int64_t kStripOutputs = 8;

} // namespace dspark::kernels
