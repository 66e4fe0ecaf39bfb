// What one instruction set provides. One file per instruction set defines one of these; dispatch.cpp picks at run time.
#pragma once

#include "kernels/blocks.h"
#include "kernels/columns.h"
#include "kernels/kernels.h"

#include <vector>

namespace dspark::kernels {

inline constexpr int64_t kStripOutputs = 8; // that one pass of the inner loop computes
// Threads share the outputs in multiples of this: whole strips, and whole vectors of what is computed of them next.
inline constexpr int64_t kShareOutputs = 16;

// What one of n threads prepares of n_items.
struct Part {
    int index = 0;
    int n = 1;
    [[nodiscard]] int64_t begin(int64_t n_items) const { return n_items * index / n; }
    [[nodiscard]] int64_t end(int64_t n_items) const { return n_items * (index + 1) / n; }
};

struct Isa {
    std::string_view name;
    // A part of columns [begin, begin + columns.n_columns) of the product into `columns` (sizes are set).
    void (*prepare)(const Product& product, int64_t begin, const Columns& columns, Part part);
    // Outputs [first, last) of those columns: a multiple of strip_outputs.
    void (*multiply)(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last);
    int64_t strip_outputs = kStripOutputs;
    // F16 and BF16: outputs [first, last) of all columns, which need no preparation. Null: not covered.
    void (*multiply_floats)(const Product& product, int64_t first, int64_t last) = nullptr;
};

// nullptr: the processor lacks it. Each exists in builds for its architecture only.
[[nodiscard]] const Isa* find_avx2();
[[nodiscard]] const Isa* find_avxvnni();
[[nodiscard]] const Isa* find_avx512();
[[nodiscard]] const Isa* find_avx512vl();
[[nodiscard]] const Isa* find_neon_dotprod();
[[nodiscard]] const Isa* find_neon_i8mm();

// What this processor has, the best first.
[[nodiscard]] const std::vector<const Isa*>& available_isas();

// This thread's share of the product by one instruction set; what multiply() does with the best one.
[[nodiscard]] bool multiply_with(const Isa& isa, const Product& product);

} // namespace dspark::kernels
