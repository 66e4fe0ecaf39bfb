// F16 and BF16 weights: rows of W against columns of X as they are, in 32-bit floats. Lanes run along a row; every
// output is the sum over its lanes in one fixed order, so that it is the same bits in every tile.
#pragma once

#include "kernels/isa.h"
#include "kernels/lanes.h"
#include "kernels/streams.h"

#include <utility>

namespace dspark::kernels {
namespace {

inline constexpr int kTileRows = 4;
inline constexpr auto kLineHalves = static_cast<int64_t>(kLine / sizeof(uint16_t));
// From so many values of a row on, one column's streams are prefetched: the values are then not found in the L1 cache.
inline constexpr int64_t kPrefetchedValues = 2049;
// Columns of a tile: its sums, the weights and one value must fit into the registers, or it takes twice the time.
#if defined(__AVX512VL__)
inline constexpr int kFloatColumns = kLanes == 16 ? 6 : 3;
#else
inline constexpr int kFloatColumns = 2;
#endif
inline constexpr int64_t kPassBytes = 256 << 10; // of X in one pass over the weights: half of an L2 cache

struct F16 {
    static Floats load(const uint8_t* p) { return load_f16(p); }
};
struct BF16 {
    static Floats load(const uint8_t* p) { return load_bf16(p); }
};

// Rows [row, row + n_rows) x columns [column, column + n) of a product.
struct FloatTile {
    const uint8_t* w;
    size_t w_stride;
    const float* x;
    int64_t x_stride;
    int64_t n_values;
};

template <typename Format, int R, int C>
inline void add_step(const uint8_t* w, size_t w_stride, const float* x, int64_t x_stride, Floats (&acc)[C][R]) {
    Floats weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        weights[r] = Format::load(w + static_cast<size_t>(r) * w_stride);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        const Floats values = load_floats(x + c * x_stride);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            acc[c][r] = fmadd(weights[r], values, acc[c][r]);
        }
    }
}

// What is left of the rows, filled up with zeros.
template <typename Format, int R, int C> inline void add_rest(const FloatTile& tile, int64_t k, Floats (&acc)[C][R]) {
    uint16_t w[R][kLanes] = {};
    float x[C][kLanes] = {};
    const auto n_rest = static_cast<size_t>(tile.n_values - k);
    for (int r = 0; r < R; ++r) {
        __builtin_memcpy(w[r], tile.w + static_cast<size_t>(r) * tile.w_stride + 2 * k, 2 * n_rest);
    }
    for (int c = 0; c < C; ++c) {
        __builtin_memcpy(x[c], tile.x + c * tile.x_stride + k, sizeof(float) * n_rest);
    }
    add_step<Format, R, C>(reinterpret_cast<const uint8_t*>(w[0]), sizeof(w[0]), x[0], kLanes, acc);
}

template <typename Format, int R, int C> void multiply_tile(const FloatTile& tile, float* y, int64_t y_stride) {
    Floats acc[C][R]; // unrolled: otherwise GCC stores all of it at every step, next to prefetches that may read it
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            acc[c][r] = zero_floats();
        }
    }
    const int64_t n_whole = tile.n_values - tile.n_values % kLanes;
    const uint8_t* next = tile.w + R * tile.w_stride;
    for (int64_t k = 0; k < n_whole; k += kLanes) {
        if constexpr (R > 1) { // hardware follows one row by itself
            prefetch<2 * R * kLanes>(next);
        }
        add_step<Format, R, C>(tile.w + 2 * k, tile.w_stride, tile.x + k, tile.x_stride, acc);
    }
    if (n_whole < tile.n_values) {
        add_rest<Format, R, C>(tile, n_whole, acc);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
        store_sums(y + c * y_stride, acc[c]);
    }
}

template <typename Format, int R, int... widths>
inline void multiply_tile(int width, const FloatTile& tile, float* y, int64_t y_stride,
                          std::integer_sequence<int, widths...>) {
    ((width == widths + 1 ? multiply_tile<Format, R, widths + 1>(tile, y, y_stride) : void()), ...);
}

// R rows x columns [begin, end).
template <typename Format, int R> void multiply_rows(const Product& product, int64_t row, int64_t begin, int64_t end) {
    const int64_t n_tiles = (end - begin + kFloatColumns - 1) / kFloatColumns;
    for (int64_t tile = 0; tile < n_tiles; ++tile) { // of nearly equal width
        const int64_t first = begin + (end - begin) * tile / n_tiles;
        const int64_t last = begin + (end - begin) * (tile + 1) / n_tiles;
        const FloatTile one{
            static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(row) * product.weight_stride,
            product.weight_stride, product.x + first * product.x_stride, product.x_stride, product.n_values};
        multiply_tile<Format, R>(static_cast<int>(last - first), one, product.y + first * product.y_stride + row,
                                 product.y_stride, std::make_integer_sequence<int, kFloatColumns>{});
    }
}

// A row of each stream (streams.h) times the column.
template <typename Format> void multiply_stream_rows(const FloatTile& tile, float (&y)[kStreams]) {
    Floats acc[1][kStreams];
    for (Floats& one : acc[0]) {
        one = zero_floats();
    }
    const auto add = [&](int64_t k) {
        add_step<Format, kStreams, 1>(tile.w + 2 * k, tile.w_stride, tile.x + k, tile.x_stride, acc);
    };
    int64_t k = 0;
    for (; k + kLineHalves <= tile.n_values; k += kLineHalves) {
        for (size_t i = 0; i < kStreams && tile.n_values >= kPrefetchedValues; ++i) {
            const uint8_t* next = tile.w + i * tile.w_stride + 2 * k + kStreamAhead;
            prefetch<kLine>(next);
        }
#pragma GCC unroll 4
        for (int64_t j = 0; j < kLineHalves; j += kLanes) {
            add(k + j);
        }
    }
    for (; k + kLanes <= tile.n_values; k += kLanes) {
        add(k);
    }
    if (k < tile.n_values) {
        add_rest<Format, kStreams, 1>(tile, k, acc);
    }
    store_sums(y, acc[0]);
}

// One column. The chains of additions of 4 rows hide each other's latency. Returns the first output that is left over.
template <typename Format> int64_t multiply_streams(const Product& product, int64_t first, int64_t last) {
    const int64_t n_rows = (last - first) / kStreams; // of a stream
    const size_t w_stride = static_cast<size_t>(n_rows) * product.weight_stride;
    for (int64_t row = first; row < first + n_rows; ++row) {
        const FloatTile tile{static_cast<const uint8_t*>(product.weights) +
                                 static_cast<size_t>(row) * product.weight_stride,
                             w_stride, product.x, product.x_stride, product.n_values};
        float y[kStreams];
        multiply_stream_rows<Format>(tile, y);
        for (int i = 0; i < kStreams; ++i) {
            product.y[row + i * n_rows] = y[i];
        }
    }
    return first + kStreams * n_rows;
}

template <typename Format> void multiply_floats_as(const Product& product, int64_t first, int64_t last) {
    const int64_t fitting = kPassBytes / static_cast<int64_t>(sizeof(float)) / product.n_values;
    const int64_t n_pass = fitting < kFloatColumns ? kFloatColumns : fitting - fitting % kFloatColumns;
    for (int64_t begin = 0; begin < product.n_columns; begin += n_pass) {
        const int64_t end = product.n_columns - begin < n_pass ? product.n_columns : begin + n_pass;
        int64_t row = product.n_columns == 1 ? multiply_streams<Format>(product, first, last) : first;
        for (; row + kTileRows <= last; row += kTileRows) {
            multiply_rows<Format, kTileRows>(product, row, begin, end);
        }
        for (; row < last; ++row) {
            multiply_rows<Format, 1>(product, row, begin, end);
        }
    }
}

inline void multiply_floats(const Product& product, int64_t first, int64_t last) {
    product.type == WeightType::f16 ? multiply_floats_as<F16>(product, first, last)
                                    : multiply_floats_as<BF16>(product, first, last);
}

} // namespace
} // namespace dspark::kernels
