// Walks W strip by strip: kLanes rows against all columns, in tiles of as many as the registers hold. Every tile
// unpacks the weights for itself, a chunk at a time right before its use: to store them for all tiles was slower.
#pragma once

#include "kernels/isa.h"
#include "kernels/one_column.h"
#include "kernels/tiles.h"

#include <utility>

namespace dspark::kernels {
namespace {

// kLanes outputs of some columns. x: the first one's records; next: rows that the next strip needs.
struct Tile {
    Rows rows;
    const uint8_t* next;
    const int32_t* x;
    int64_t x_step; // from one step's records to the next one's
    float* y;
    int64_t y_stride;
};

template <typename Format> struct SuperKernel {
    static constexpr bool kHasRows = true;
    static constexpr int kRecord = record_groups(super_layout<Format>());
    static constexpr size_t kStepBytes = sizeof(typename Format::Block);

    template <int N, int chunk>
    [[gnu::always_inline]] static void add_chunk(Tile& tile, const SuperHead& head, Ints* total) {
        prefetch<kLanes * kStepBytes / kChunks>(tile.next);
        Ints q[kChunkVectors];
        unpack_chunk<chunk>(Format{}, tile.rows, head, q);
        multiply_chunk<Format, N, chunk>(q, head, tile.x, total);
    }

    // acc[c] += 256 weights of each row times those of column c.
    template <int N> [[gnu::always_inline]] static void add_step(Tile& tile, int64_t, Floats* acc) {
        SuperHead head;
        unpack_head(Format{}, tile.rows, head);
        Ints total[N];
        for (Ints& one : total) {
            one = zero_ints();
        }
        add_chunk<N, 0>(tile, head, total);
        add_chunk<N, 1>(tile, head, total);
        add_chunk<N, 2>(tile, head, total);
        add_chunk<N, 3>(tile, head, total);
        finish_super<Format, N>(head, tile.x, total, acc);
        tile.rows.advance(kStepBytes);
    }

    // acc += all weights of each row times those of one column.
    static void add_rows(Tile& tile, int64_t n_values, Floats& acc) {
        Ints sums[kRowBlocks][kLanes];
        for (int64_t n_left = n_values / kSuperBlockSize; n_left > 0; n_left -= kRowBlocks) {
            const int n_blocks = static_cast<int>(n_left < kRowBlocks ? n_left : kRowBlocks);
            sum_rows<Format>(tile.rows, tile.x, tile.x_step, n_blocks, tile.next, sums);
            for (int b = 0; b < n_blocks; ++b, tile.x += tile.x_step) {
                SuperHead head;
                unpack_head(Format{}, tile.rows, head);
                const Ints total = sum_lanes(sums[b]);
                finish_super<Format, 1>(head, tile.x, &total, &acc);
                tile.rows.advance(kStepBytes);
            }
        }
    }
};

template <typename Format> struct BlockKernel {
    static constexpr bool kHasRows = false;
    static constexpr int kRecord = record_groups(ColumnLayout::bytes);
    static constexpr size_t kBlockBytes = sizeof(typename Format::Block);

    template <int N> [[gnu::always_inline]] static void add_step(Tile& tile, int64_t n_values, Floats* acc) {
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            prefetch<kLanes * kBlockBytes>(tile.next);
            Ints q[kBlockVectors];
            unpack(Format{}, tile.rows, q);
            multiply_block<Format, N>(q, gather_halves(tile.rows, 0), tile.x + b * kBlockRecord, acc);
            tile.rows.advance(kBlockBytes);
        }
    }
};

template <typename Kernel, int N> void multiply_tile(Tile tile, int64_t n_values) {
    Floats acc[N];
    for (Floats& one : acc) {
        one = zero_floats();
    }
    if constexpr (N == 1 && Kernel::kHasRows) {
        Kernel::add_rows(tile, n_values, acc[0]);
    } else {
        for (; n_values > 0; n_values -= kSuperBlockSize, tile.x += tile.x_step) {
            Kernel::template add_step<N>(tile, n_values < kSuperBlockSize ? n_values : kSuperBlockSize, acc);
        }
    }
    for (int c = 0; c < N; ++c) {
        store(tile.y + c * tile.y_stride, acc[c]);
    }
}

// The call for a width that is known only at run time.
template <typename Kernel, int... widths>
inline void multiply_tile(int width, const Tile& tile, int64_t n_values, std::integer_sequence<int, widths...>) {
    ((width == widths + 1 ? multiply_tile<Kernel, widths + 1>(tile, n_values) : void()), ...);
}

// Outputs that a tile takes before the next one does. With 8 lanes code for two widths fits no cache of instructions:
// 15 columns, 7 + 8, took longer than 16 when strips took turns.
inline constexpr int64_t kTurnOutputs = kLanes == 8 ? 32 : kLanes;

// Outputs [first, last) of tile i.
template <typename Kernel>
void multiply_strips(const Product& product, int64_t begin, const Columns& columns, int i, int64_t first,
                     int64_t last) {
    const size_t stride = product.weight_stride;
    const int column = columns.tile_begin(i), width = columns.tile_begin(i + 1) - column;
    for (int64_t o = first; o < last; o += kLanes) {
        const auto* weights = static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(o) * stride;
        const Tile tile{Rows(weights, stride),
                        weights + kLanes * stride,
                        columns.groups.data() + column * Kernel::kRecord,
                        columns.n_columns * Kernel::kRecord,
                        product.y + (begin + column) * product.y_stride + o,
                        product.y_stride};
        multiply_tile<Kernel>(width, tile, columns.n_values, std::make_integer_sequence<int, kTileColumns>{});
    }
}

// Whole strips only: the dispatcher fills up the last one.
template <typename Kernel>
void multiply_outputs(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    for (; first < last; first += kTurnOutputs) {
        const int64_t end = last - first < kTurnOutputs ? last : first + kTurnOutputs;
        for (int i = 0; i < columns.n_tiles; ++i) {
            multiply_strips<Kernel>(product, begin, columns, i, first, end);
        }
    }
}

inline void multiply(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    switch (product.type) {
    case WeightType::q8_0:
        return multiply_outputs<BlockKernel<Q8_0>>(product, begin, columns, first, last);
    case WeightType::q4_0:
        return multiply_outputs<BlockKernel<Q4_0>>(product, begin, columns, first, last);
    case WeightType::iq4_nl:
        return multiply_outputs<BlockKernel<IQ4_NL>>(product, begin, columns, first, last);
    case WeightType::q4_k:
        return multiply_outputs<SuperKernel<Q4K>>(product, begin, columns, first, last);
    case WeightType::q5_k:
        return multiply_outputs<SuperKernel<Q5K>>(product, begin, columns, first, last);
    case WeightType::q6_k:
        return multiply_outputs<SuperKernel<Q6K>>(product, begin, columns, first, last);
    default:
        return;
    }
}

} // namespace
} // namespace dspark::kernels
