// One column of Q8_0, Q4_0 and IQ4_NL: by rows in streams (streams.h), 8 blocks at a time. A vector holds 16 weights of
// each of 4 blocks (8 lanes: 2), so that sums are 4 a block, whose rows are put beside each other when all are there:
// less work than transposing weights, and memory is read along its rows. The integers are those of the strips, so are
// the floats that follow, so are the bits.
#pragma once

#include "kernels/block_formats.h"
#include "kernels/streams.h"

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

// The column's values as the rows' weights meet them: of each group the first and the last 16 of its blocks.
struct ChunkValues {
    Ints x[kChunkGroups][2];
    Ints correction[kHasVnni ? kChunkGroups : 1]; // of each block, in the first of the 4 lanes that are summed

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
            correction[kHasVnni ? g : 0] = load(lanes);
        }
    }
};

// What the rows of a strip leave of a chunk. Lane kStreams r + i is row r of stream i.
struct ChunkSums {
    Ints quads[kChunkGroups][kStreamRows]; // [g][r]: lane i of part b is block b of the group, row r of stream i
    ChunkScales scales;
};

// The products of a group, 4 sums a block. With VNNI they begin with the correction, which costs nothing. Signed
// weights take over the signs of the values, whose sizes serve all streams; none is -128, which has no other sign.
template <typename Format>
[[gnu::always_inline]] inline Ints multiply_group(const Ints* q, const Ints* x, const Ints* correction) {
    if constexpr (kHasVnni) {
        return dot_bytes(dot_bytes(*correction, q[0], x[0]), q[1], x[1]);
    } else if constexpr (Format::kIsSigned) {
        const Ints first = madd_words(madd_bytes(sizes_of_bytes(x[0]), give_sign(q[0], x[0])), all_words(1));
        return add_ints(first, madd_words(madd_bytes(sizes_of_bytes(x[1]), give_sign(q[1], x[1])), all_words(1)));
    } else {
        return madd_words(add_words(madd_bytes(q[0], x[0]), madd_bytes(q[1], x[1])), all_words(1));
    }
}

// For multiply_in_streams().
template <typename Format> struct BlockColumn {
    static constexpr ColumnLayout kLayout = ColumnLayout::bytes;
    static constexpr int kBytes = kChunkBlocks * static_cast<int>(sizeof(typename Format::Block));
    static constexpr bool kIsCorrected = kHasVnni || Format::kIsSigned;
    using Values = ChunkValues;
    using Sums = ChunkSums;

    [[gnu::always_inline]] static void sum(const StreamRows& rows, int r, int at, const Values& values, Sums& sums) {
#pragma GCC unroll 4
        for (int g = 0; g < kChunkGroups; ++g) {
            Ints four[kStreams];
#pragma GCC unroll 4
            for (int i = 0; i < kStreams; ++i) {
                const uint8_t* chunk = rows.at(i, r, at);
                if (g == 0) {
                    rows.ask_ahead<kBytes>(chunk);
                }
                keep_scales(Format{}, rows, r, at, g, i, sums.scales);
                Ints q[2];
                load_group(Format{}, chunk, g, q);
                four[i] = multiply_group<Format>(q, values.x[g], values.correction + (kHasVnni ? g : 0));
            }
            sums.quads[g][r] = sum_quads(four);
        }
    }

    [[gnu::noinline]] static Floats add(const Sums& sums, const int32_t* record, Floats acc) {
        Ints blocks[kChunkBlocks];
        Floats d[kChunkBlocks];
        for (int g = 0; g < kChunkGroups; ++g) {
            exchange_parts(sums.quads[g], blocks + kGroupBlocks * g);
        }
        find_scales(sums.scales, d);
#pragma GCC unroll 8
        for (int b = 0; b < kChunkBlocks; ++b) {
            const int32_t* of_block = record + b * kBlockRecord; // 8: correction, 9: scale (columns.h)
            const Ints sum = kIsCorrected ? blocks[b] : add_ints(blocks[b], broadcast(of_block + 8));
            acc = fmadd(to_floats(sum), mul(d[b], broadcast_scale(of_block + 9)), acc);
        }
        return acc;
    }
};

} // namespace
} // namespace dspark::kernels
