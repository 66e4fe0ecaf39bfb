// X, prepared for the kernels: each column quantized to 8 bits exactly as ggml quantizes it (the type's partner: Q8_0
// per 32 values, Q8_K per 256), then cut into tiles of up to 8 columns whose 4-byte groups lie side by side, so that a
// kernel walks one pointer. Per thread; lives until the next product of that thread.
//
// The values of one step (256 values of every column) are adjacent: [step][tile][...]. Inside a tile of n columns:
//   K-quants   values 64 x n groups of 4 int8, sums n_sums x n pairs of int16, scales n floats
//   Q4_0       per block of 32: values 8 x n groups of 4 int8, correction n int32 (-8 * sum), scales n floats
//   Q8_0       per block of 32: values 16 x n pairs of int16 (k, k + 2), (k + 1, k + 3); scales n floats
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dspark::kernels {

inline constexpr int kTileColumns = 8;
inline constexpr int kMaxColumns = 128; // of one pass over the weights; more are taken in several passes

enum class ColumnLayout {
    super32, // Q4_K, Q5_K: sums per 32 values
    super16, // Q6_K: sums per 16 values
    bytes,   // Q4_0
    words,   // Q8_0, IQ4_NL
};

// 4-byte groups that one column takes in one step of n_values (256, or what is left of a row).
[[nodiscard]] constexpr size_t groups_per_column(ColumnLayout layout, size_t n_values) {
    switch (layout) {
    case ColumnLayout::super32:
        return 64 + 4 + 1;
    case ColumnLayout::super16:
        return 64 + 8 + 1;
    case ColumnLayout::bytes:
        return n_values / 32 * (8 + 1 + 1);
    case ColumnLayout::words:
        return n_values / 32 * (16 + 1);
    }
    return 0;
}

struct Columns {
    ColumnLayout layout = ColumnLayout::super32;
    int n_columns = 0;
    int n_tiles = 0;
    int64_t n_values = 0; // of each column
    std::vector<int32_t> groups;

    // Tiles of nearly equal width: 9 columns are 5 + 4, not 8 + 1.
    [[nodiscard]] int tile_begin(int tile) const { return n_columns * tile / n_tiles; }
};

} // namespace dspark::kernels
