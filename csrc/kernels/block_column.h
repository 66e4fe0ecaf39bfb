// One column of Q8_0, Q4_0 and IQ4_NL: by rows in streams (lanes.h), 8 blocks at a time. A vector holds 16 weights of
// each of 4 blocks (8 lanes: 2), so that sums are 4 a block, whose rows are put beside each other when all are there:
// less work than transposing weights, and memory is read along its rows. The integers are those of the strips, so are
// the floats that follow, so are the bits.
#pragma once

#include "kernels/block_formats.h"
#include "kernels/columns.h"
#include "kernels/kernels.h"

namespace dspark::kernels {
namespace {

[[gnu::always_inline]] inline Ints nibble_values(Q4_0, Ints nibbles) { return nibbles; }
[[gnu::always_inline]] inline Ints nibble_values(IQ4_NL, Ints nibbles) {
    return shuffle_bytes(offset_weights(repeat_16(kIq4Values)), nibbles);
}

} // namespace
} // namespace dspark::kernels

#if DSPARK_LANES == 16
#include "kernels/block_column16.h"
#else
#include "kernels/block_column8.h"
#endif

namespace dspark::kernels {
namespace {

inline constexpr int kGroupBlocks = kLanes / 4, kChunkGroups = 8 / kGroupBlocks; // of a chunk
inline constexpr int kChunkBlocks = static_cast<int>(kSuperBlockSize / kBlockSize);
inline constexpr int kPieceChunks = 16; // of all rows, then the next 16: what is kept of a strip's fits into L1

// The column's values as the rows' weights meet them: of each group the first and the last 16 of its blocks.
struct ChunkValues {
    Ints x[kChunkGroups][2];
    Ints correction[kChunkGroups]; // of each block, in the first of the 4 lanes that are summed

    void set(const int32_t* record) {
        for (int g = 0; g < kChunkGroups; ++g) {
            alignas(64) int32_t lanes[kLanes] = {};
            const uint8_t* low[kGroupBlocks];
            const uint8_t* high[kGroupBlocks];
            for (int b = 0; b < kGroupBlocks; ++b, record += kBlockRecord) {
                low[b] = reinterpret_cast<const uint8_t*>(record);
                high[b] = low[b] + 16;
                lanes[4 * b] = record[8];
            }
            x[g][0] = load_parts(low);
            x[g][1] = load_parts(high);
            correction[g] = load(lanes);
        }
    }
};

// What the rows of a strip leave of a chunk. Lane kStreams r + i is row r of stream i.
struct ChunkSums {
    Ints quads[kChunkGroups][kStreamRows]; // [g][r]: lane i of part b is block b of the group, row r of stream i
    ChunkScales scales;
};

// The products of a group, 4 sums a block.
template <typename Format>
[[gnu::always_inline]] inline Ints multiply_group(const Ints* q, const Ints* x, Ints correction) {
    if constexpr (kHasVnni) {
        return dot_bytes(dot_bytes(correction, q[0], x[0]), q[1], x[1]);
    } else if constexpr (Format::kIsSigned) {
        const Ints first = madd_words(madd_bytes(sizes_of_bytes(q[0]), give_sign(x[0], q[0])), all_words(1));
        return add_ints(first, madd_words(madd_bytes(sizes_of_bytes(q[1]), give_sign(x[1], q[1])), all_words(1)));
    } else {
        const Ints words = add_words(madd_bytes(q[0], x[0]), madd_bytes(q[1], x[1]));
        return add_ints(correction, madd_words(words, all_words(1)));
    }
}

// Lane i of part b: the sum over part b of v[i].
[[gnu::always_inline]] inline Ints sum_quads(const Ints (&v)[4]) {
    const Ints a = add_ints(interleave_low(v[0], v[1]), interleave_high(v[0], v[1]));
    const Ints b = add_ints(interleave_low(v[2], v[3]), interleave_high(v[2], v[3]));
    return add_ints(interleave_low_pairs(a, b), interleave_high_pairs(a, b));
}

// Row r of each stream.
template <typename Format>
inline void sum_chunks(const StreamRows& rows, int r, const ChunkValues* values, int n_chunks, ChunkSums* sums) {
    constexpr int kBytes = kChunkBlocks * static_cast<int>(sizeof(typename Format::Block));
    for (int c = 0; c < n_chunks; ++c) {
#pragma GCC unroll 4
        for (int g = 0; g < kChunkGroups; ++g) {
            Ints four[kStreams];
#pragma GCC unroll 4
            for (int i = 0; i < kStreams; ++i) {
                const uint8_t* chunk = rows.at(kStreamRows * i + r, c * kBytes);
                if (g == 0) {
                    const uint8_t* next = chunk + kStreamAhead;
                    prefetch<kBytes>(next);
                    keep_scales(Format{}, chunk, r, i, sums[c].scales);
                }
                Ints q[2];
                load_group(Format{}, chunk, g, q);
                four[i] = multiply_group<Format>(q, values[c].x[g], values[c].correction[g]);
            }
            sums[c].quads[g][r] = sum_quads(four);
        }
    }
}

// acc += the chunk's part of the outputs; `at`: where it begins in each row.
template <typename Format>
[[gnu::always_inline]] inline Floats add_chunk(const StreamRows& rows, int at, const ChunkSums& sums,
                                               const int32_t* record, Floats acc) {
    Ints blocks[kChunkBlocks];
    Floats d[kChunkBlocks];
    for (int g = 0; g < kChunkGroups; ++g) {
        exchange_parts(sums.quads[g], blocks + kGroupBlocks * g);
    }
    find_scales(Format{}, sums.scales, rows, at, d);
#pragma GCC unroll 8
    for (int b = 0; b < kChunkBlocks; ++b) {
        const Floats dx = broadcast_scale(record + b * kBlockRecord + kBlockRecord - 1);
        acc = fmadd(to_floats(blocks[b]), mul(d[b], dx), acc);
    }
    return acc;
}

// Chunks [first, first + n) of kLanes rows; y: of row 0 of the first stream.
template <typename Format>
inline void multiply_piece(const StreamRows& rows, const ChunkValues* values, const int32_t* x, int n, bool is_first,
                           float* y, int64_t y_stream) {
    ChunkSums sums[kPieceChunks];
    for (int r = 0; r < kStreamRows; ++r) {
        sum_chunks<Format>(rows, r, values, n, sums);
    }
    float lanes[kLanes] = {};
    for (int i = 0; i < kLanes && !is_first; ++i) {
        lanes[i] = y[i % kStreams * y_stream + i / kStreams];
    }
    Floats acc = load_floats(lanes);
    for (int c = 0; c < n; ++c) {
        acc = add_chunk<Format>(rows, c * kChunkBlocks * static_cast<int>(sizeof(typename Format::Block)), sums[c],
                                x + c * record_groups(ColumnLayout::bytes), acc);
    }
    store(lanes, acc);
    for (int i = 0; i < kLanes; ++i) {
        y[i % kStreams * y_stream + i / kStreams] = lanes[i];
    }
}

// Some outputs, whole strips, of one column, whose length is whole chunks.
template <typename Format>
void multiply_block_column(const Product& product, float* y, const Columns& columns, Outputs outputs) {
    constexpr int kBytes = kChunkBlocks * static_cast<int>(sizeof(typename Format::Block));
    const size_t stride = product.weight_stride;
    const int64_t n_of_stream = (outputs.last - outputs.first) / kStreams,
                  n_chunks = columns.n_values / kSuperBlockSize;
    for (int64_t begin = 0; begin < n_chunks; begin += kPieceChunks) {
        const int32_t* x = columns.groups + begin * record_groups(ColumnLayout::bytes);
        const int n = static_cast<int>(n_chunks - begin < kPieceChunks ? n_chunks - begin : kPieceChunks);
        ChunkValues values[kPieceChunks];
        for (int c = 0; c < n; ++c) {
            values[c].set(x + c * record_groups(ColumnLayout::bytes));
        }
        for (int64_t o = outputs.first; o < outputs.first + n_of_stream; o += kStreamRows) {
            const auto* weights = static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(o) * stride;
            const StreamRows rows(weights + begin * kBytes, stride, static_cast<size_t>(n_of_stream) * stride);
            multiply_piece<Format>(rows, values, x, n, begin == 0, y + o, n_of_stream);
        }
    }
}

} // namespace
} // namespace dspark::kernels
