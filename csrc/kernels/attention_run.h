// What the two halves of attention agree on: attention.cpp says which rows are computed together and over which cells,
// a file per instruction set computes them.
#pragma once

#include "kernels/attention.h"

#include <vector>

namespace dspark::kernels {

inline constexpr int64_t kRunRows = 16; // tokens times heads
inline constexpr int64_t kCellBlock = 8;
inline constexpr int64_t kValueBlock = 32;  // cells whose values stay in the first cache for all rows
inline constexpr uint16_t kHidden = 0xfc00; // -inf, as f16

// Neighbouring tokens that see nearly the same cells. A cell that one of them does not see is computed for it with the
// weight 0, which changes no bit.
struct AttentionRun {
    int64_t first_token = 0;
    int64_t n_tokens = 0;
    size_t n_cells = 0;         // that some token sees
    std::vector<int32_t> cells; // these, ascending; then the last one again up to a whole block
};

// Heads [first, first + n) of a run: all with the same keys and values.
struct AttentionHeads {
    int64_t first = 0;
    int64_t n = 0;
};

struct AttentionScratch {
    std::vector<float> scores;  // (rows, cells), then the weights
    std::vector<float> keys;    // (kCellBlock, key_size)
    std::vector<float> values;  // (kValueBlock, value_size)
    std::vector<int32_t> sums;  // (rows, value_size)
    std::vector<float> largest; // per cell: the largest magnitude of its values
};

using AttendRun = void (*)(const Attention&, const AttentionRun&, AttentionHeads, AttentionScratch&);

// nullptr: the processor lacks it. Each exists in builds for its architecture only.
[[nodiscard]] AttendRun find_attend_avx2();
[[nodiscard]] AttendRun find_attend_neon();

} // namespace dspark::kernels
