// One column of Q8_0, Q4_0 and IQ4_NL with AVX-512: by rows in streams (lanes.h), 8 blocks at a time. What two shuffles
// bring together are the same 16 weights of 4 blocks, so that a vector's sums are 4 a block, whose rows are put beside
// each other when all are there: less work than transposing weights, and memory is read along its rows. The integers
// are those of the strips, so are the floats that follow, so are the bits.
#pragma once

#include "kernels/block_formats.h"
#include "kernels/columns.h"
#include "kernels/kernels.h"

namespace dspark::kernels {
namespace {

inline constexpr int kChunkBlocks = static_cast<int>(kSuperBlockSize / kBlockSize);
inline constexpr int kPieceChunks =
    16; // of all rows, before the next 16 of all rows: what is kept of them fits into L1

// The column's values as the rows' weights meet them: the first and the last 16 of blocks 0 .. 3, then of 4 .. 7.
struct ChunkValues {
    Ints x[4];
    Ints correction[2]; // of blocks 0 .. 3 and 4 .. 7, in the first of the 4 lanes that are summed

    void set(const int32_t* record) {
        for (int half = 0; half < 2; ++half) {
            const int32_t* first = record + 4 * half * kBlockRecord;
            alignas(64) int32_t lanes[kLanes] = {};
            const uint8_t* low[4];
            const uint8_t* high[4];
            for (int b = 0; b < 4; ++b) {
                low[b] = reinterpret_cast<const uint8_t*>(first + b * kBlockRecord);
                high[b] = low[b] + 16;
                lanes[4 * b] = first[b * kBlockRecord + 8];
            }
            x[2 * half] = load_parts(low);
            x[2 * half + 1] = load_parts(high);
            correction[half] = load(lanes);
        }
    }
};

// What the rows of a strip leave of a chunk. Lane kStreams r + i is row r of stream i.
struct ChunkSums {
    Ints quads[2][kStreamRows]; // [half][r]: lane i of part b is the sum of block 4 half + b of row r of stream i
    Ints scales[kStreams];      // part r: the f16 of 8 blocks of row r
};

// For permutex2var: 8 words from `first`, and from there on every `step` words, of two vectors that begin at words
// `low` and `high`.
struct WordIndex {
    alignas(64) uint16_t words[2 * kLanes];

    constexpr WordIndex(int first, int step, int low, int high, int n_of_part = 8) : words() {
        for (int i = 0; i < 2 * kLanes; ++i) {
            const int word = n_of_part == 8 ? first + i / 8 * step + i % 8 : first + i % 8 * step;
            words[i] = static_cast<uint16_t>(word < low + 2 * kLanes ? word - low : word - high + 2 * kLanes);
        }
    }
};

inline Ints pick_words(Ints low, Ints high, const WordIndex& index) {
    return _mm512_permutex2var_epi16(low, load(index.words), high);
}
// In part r alone, the others zero.
inline Ints pick_scales(Ints low, Ints high, const WordIndex& index, int r, uint32_t mask) {
    return _mm512_maskz_permutex2var_epi16(mask << 8 * r, low, load(index.words), high);
}

inline Ints nibble_values(Q4_0, Ints nibbles) { return nibbles; }
inline Ints nibble_values(IQ4_NL, Ints nibbles) {
    return shuffle_bytes(offset_weights(repeat_16(kIq4Values)), nibbles);
}

// 8 blocks of a row, as ChunkValues has them; scales: as in ChunkSums, of row r.
template <typename Format>
[[gnu::always_inline]] inline void load_chunk(Format, const uint8_t* w, int r, Ints* q, Ints& scales) {
    static constexpr WordIndex kFirst(1, 9, 0, 32), kLast(37, 9, 32, 40), kScales(0, 9, 0, 32, 1);
    const Ints words_0 = load(w), words_32 = load(w + 64), words_40 = load(w + 80);
    const Ints first = pick_words(words_0, words_32, kFirst), last = pick_words(words_32, words_40, kLast);
    q[0] = nibble_values(Format{}, nibbles_low(first));
    q[1] = nibble_values(Format{}, nibbles_high(first));
    q[2] = nibble_values(Format{}, nibbles_low(last));
    q[3] = nibble_values(Format{}, nibbles_high(last));
    scales = pick_scales(words_0, words_32, kScales, r, 0xff);
}
[[gnu::always_inline]] inline void load_chunk(Q8_0, const uint8_t* w, int r, Ints* q, Ints& scales) {
    static constexpr WordIndex kFirst(1, 17, 0, 32), kLast(9, 17, 4, 36), kScales(0, 17, 0, 32, 1);
    static constexpr WordIndex kLastScales(-4 * 17, 17, 0, 32, 1);
    scales = zero_ints();
    for (int half = 0; half < 2; ++half, w += 4 * sizeof(BlockQ8_0)) {
        const Ints words_0 = load(w), words_32 = load(w + 64), words_4 = load(w + 8), words_36 = load(w + 72);
        q[2 * half] = offset_weights(pick_words(words_0, words_32, kFirst));
        q[2 * half + 1] = offset_weights(pick_words(words_4, words_36, kLast));
        scales |= pick_scales(words_0, words_32, half == 0 ? kScales : kLastScales, r, half == 0 ? 0x0f : 0xf0);
    }
}

// Lane i of part b: the sum over part b of v[i].
[[gnu::always_inline]] inline Ints sum_quads(const Ints (&v)[4]) {
    const Ints a = add_ints(interleave_low(v[0], v[1]), interleave_high(v[0], v[1]));
    const Ints b = add_ints(interleave_low(v[2], v[3]), interleave_high(v[2], v[3]));
    return add_ints(interleave_low_pairs(a, b), interleave_high_pairs(a, b));
}

// Row r of each stream. `at`: of the first chunk in each row, in bytes.
template <typename Format>
inline void sum_chunks(const StreamRows& rows, int r, const ChunkValues* values, int n_chunks, ChunkSums* sums) {
    constexpr int kBytes = kChunkBlocks * static_cast<int>(sizeof(typename Format::Block));
    for (int c = 0; c < n_chunks; ++c) {
        Ints low[kStreams], high[kStreams];
#pragma GCC unroll 4
        for (int i = 0; i < kStreams; ++i) {
            const uint8_t* chunk = rows.at(kStreamRows * i + r, c * kBytes);
            const uint8_t* next = chunk + kStreamAhead;
            prefetch<kBytes>(next);
            Ints q[4], scales;
            load_chunk(Format{}, chunk, r, q, scales);
            low[i] = dot_bytes(dot_bytes(values[c].correction[0], q[0], values[c].x[0]), q[1], values[c].x[1]);
            high[i] = dot_bytes(dot_bytes(values[c].correction[1], q[2], values[c].x[2]), q[3], values[c].x[3]);
            sums[c].scales[i] = r == 0 ? scales : sums[c].scales[i] | scales;
        }
        sums[c].quads[0][r] = sum_quads(low);
        sums[c].quads[1][r] = sum_quads(high);
    }
}

// Part r of out[b] is part b of v[r].
[[gnu::always_inline]] inline void exchange_parts(const Ints* v, Ints* out) {
    const Ints low_01 = _mm512_shuffle_i32x4(v[0], v[1], 0x44), high_01 = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const Ints low_23 = _mm512_shuffle_i32x4(v[2], v[3], 0x44), high_23 = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    out[0] = _mm512_shuffle_i32x4(low_01, low_23, 0x88);
    out[1] = _mm512_shuffle_i32x4(low_01, low_23, 0xdd);
    out[2] = _mm512_shuffle_i32x4(high_01, high_23, 0x88);
    out[3] = _mm512_shuffle_i32x4(high_01, high_23, 0xdd);
}

// out[b]: the scale of block b of each lane's row.
[[gnu::always_inline]] inline void spread_scales(const Ints* scales, Floats* out) {
    const Ints order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    const Ints low[2] = {_mm512_unpacklo_epi16(scales[0], scales[1]), _mm512_unpacklo_epi16(scales[2], scales[3])};
    const Ints high[2] = {_mm512_unpackhi_epi16(scales[0], scales[1]), _mm512_unpackhi_epi16(scales[2], scales[3])};
    const Ints pairs[4] = {interleave_low(low[0], low[1]), interleave_high(low[0], low[1]),
                           interleave_low(high[0], high[1]), interleave_high(high[0], high[1])};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Ints both = _mm512_permutexvar_epi64(order, pairs[i]);
        out[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
        out[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
    }
}

// acc += the chunk's part of the outputs.
[[gnu::always_inline]] inline Floats add_chunk(const ChunkSums& sums, const int32_t* record, Floats acc) {
    Ints blocks[kChunkBlocks];
    Floats d[kChunkBlocks];
    exchange_parts(sums.quads[0], blocks);
    exchange_parts(sums.quads[1], blocks + 4);
    spread_scales(sums.scales, d);
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
        acc = add_chunk(sums[c], x + c * record_groups(ColumnLayout::bytes), acc);
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
