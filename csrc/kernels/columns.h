// X, prepared for the kernels: each column quantized to 8 bits exactly as ggml quantizes it (the type's partner: Q8_0
// per 32 values, Q8_K per 256).
//
// On x86 (NEON has an order of its own, no larger: neon_columns.h) one record per step of 256 values and column:
// [step][column][record], so that a kernel walks one pointer and every column lies at a constant distance from the
// first. In 4-byte groups a record is
//   super32, super16   64 groups of 4 int8; 4 (8) pairs of int16: sums of 32 (16) values; scale (float)
//   bytes              per block of 32: 8 groups of 4 int8; their sum times minus the weights' offset (int32); scale
#pragma once

#include "kernels/kernels.h"

#include <cstddef>
#include <cstdint>

namespace dspark::kernels {

inline constexpr int kTileColumns = 8;  // that a kernel multiplies at once
inline constexpr int kMaxColumns = 128; // of one pass over the weights; more are taken in several passes

enum class ColumnLayout {
    super32, // Q4_K, Q5_K
    super16, // Q6_K
    bytes,   // Q8_0, Q4_0, IQ4_NL
};

inline constexpr int kBlockRecord = 10; // of 4 bytes, of one block of 32 values

// 4-byte groups of one record.
[[nodiscard]] constexpr int record_groups(ColumnLayout layout) {
    switch (layout) {
    case ColumnLayout::super32:
        return 64 + 4 + 1;
    case ColumnLayout::super16:
        return 64 + 8 + 1;
    default:
        return 8 * kBlockRecord;
    }
}

// What unpack() adds to weights of 32 in a block, so that they are unsigned.
[[nodiscard]] constexpr int32_t weight_offset(WeightType type) { return type == WeightType::q4_0 ? 8 : 128; }

struct Columns {
    ColumnLayout layout = ColumnLayout::super32;
    int n_columns = 0;
    int n_tiles = 0;
    int64_t n_values = 0;      // of each column
    int32_t* groups = nullptr; // not owned

    // Tiles of nearly equal width: 9 columns are 5 + 4, not 8 + 1.
    [[nodiscard]] int tile_begin(int tile) const { return n_columns * tile / n_tiles; }
};

} // namespace dspark::kernels
