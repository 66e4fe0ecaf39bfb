// What block_column.h needs of AVX-512: 4 blocks to a vector, by one shuffle of two loads. Included by it only.
#pragma once

#include "kernels/block_formats.h"

namespace dspark::kernels {
namespace {

// Part r of of[i]: the f16 of the 8 blocks of row r of stream i.
struct ChunkScales {
    Ints of[kStreams];
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

[[gnu::always_inline]] inline Ints pick_words(Ints low, Ints high, const WordIndex& index) {
    return _mm512_permutex2var_epi16(low, load(index.words), high);
}
// In part r alone, the others zero.
[[gnu::always_inline]] inline Ints pick_scales(Ints low, Ints high, const WordIndex& index, int r, uint32_t mask) {
    return _mm512_maskz_permutex2var_epi16(mask << 8 * r, low, load(index.words), high);
}

// Blocks 4 group .. 4 group + 3 of a chunk: the first and the last 16 weights of each.
[[gnu::always_inline]] inline void load_group(Q8_0, const uint8_t* chunk, int group, Ints* q) {
    static constexpr WordIndex kFirst(1, 17, 0, 32), kLast(9, 17, 4, 36);
    const uint8_t* w = chunk + 4 * group * static_cast<int>(sizeof(BlockQ8_0));
    q[0] = offset_weights(pick_words(load(w), load(w + 64), kFirst));
    q[1] = offset_weights(pick_words(load(w + 8), load(w + 72), kLast));
}
template <typename Format> [[gnu::always_inline]] inline void load_group(Format, const uint8_t* w, int group, Ints* q) {
    static constexpr WordIndex kFirst(1, 9, 0, 32), kLast(37, 9, 32, 40);
    const Ints words =
        group == 0 ? pick_words(load(w), load(w + 64), kFirst) : pick_words(load(w + 64), load(w + 80), kLast);
    q[0] = nibble_values(Format{}, nibbles_low(words));
    q[1] = nibble_values(Format{}, nibbles_high(words));
}

// Those of a row, all with its first group.
[[gnu::always_inline]] inline Ints pick_scales(Q8_0, const uint8_t* w, int r) {
    static constexpr WordIndex kFirst(0, 17, 0, 32, 1), kLast(-4 * 17, 17, 0, 32, 1);
    const uint8_t* last = w + 4 * sizeof(BlockQ8_0);
    return pick_scales(load(w), load(w + 64), kFirst, r, 0x0f) |
           pick_scales(load(last), load(last + 64), kLast, r, 0xf0);
}
template <typename Format> [[gnu::always_inline]] inline Ints pick_scales(Format, const uint8_t* w, int r) {
    static constexpr WordIndex kIndex(0, 9, 0, 32, 1);
    return pick_scales(load(w), load(w + 64), kIndex, r, 0xff);
}
template <typename Format>
[[gnu::always_inline]] inline void keep_scales(Format, const StreamRows& rows, int r, int at, int group, int i,
                                               ChunkScales& kept) {
    if (group == 0) {
        const Ints scales = pick_scales(Format{}, rows.at(i, r, at), r);
        kept.of[i] = r == 0 ? scales : kept.of[i] | scales;
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
[[gnu::always_inline]] inline void find_scales(const ChunkScales& kept, Floats* out) {
    const Ints(&scales)[kStreams] = kept.of;
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

} // namespace
} // namespace dspark::kernels
