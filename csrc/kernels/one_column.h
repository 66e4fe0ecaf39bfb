// One column of Q6_K and, with 8 lanes, Q4_K: by rows, each along the memory; the lanes of a vector are neighbouring
// weights. The transposition of a strip would be paid for one column alone here, and its steps from row to row cost
// memory's speed. The integers are those of the strips, so are the floats that follow (finish_super), so are the bits.
#pragma once

#include "kernels/tiles.h"

#include <cstring>

namespace dspark::kernels {
namespace {

inline constexpr int kRowBlocks = 16;          // of a row at once: sums fit into L1
inline constexpr int kRowWeights = 4 * kLanes; // of a vector
inline constexpr int kRowVectors = static_cast<int>(kSuperBlockSize) / kRowWeights; // of a super-block

// How many rows are walked at once; 0: strips are as fast. Measured: one row of Q4_K alone does not keep up.
template <typename Format> inline constexpr int kRowsAtOnce = 0;
template <> inline constexpr int kRowsAtOnce<Q4K> = kLanes == 8 ? 4 : 0;
template <> inline constexpr int kRowsAtOnce<Q6K> = 1;

// The sub-block of weight i of vector v. Q4_K: even vectors are the low nibbles of some bytes, odd ones the high.
constexpr int sub_block(Q4K, int v, int i) { return v / 2 * (kRowWeights / 16) + v % 2 + i / 32 * 2; }
constexpr int sub_block(Q6K, int v, int i) { return (v * kRowWeights + i) / 16; }

// For shuffle_bytes: the scales of each vector's weights, in the words that they multiply: with VNNI the low one of a
// lane, otherwise both. In the word's low byte, or in the high one if they have a sign.
template <typename Format> struct ScaleIndex {
    alignas(64) uint8_t bytes[kRowVectors][kRowWeights];

    constexpr ScaleIndex() : bytes() {
        constexpr int kByte = Format::kHasMins ? 0 : 1;
        for (int v = 0; v < kRowVectors; ++v) {
            for (int i = 0; i < kRowWeights; ++i) {
                const bool is_scale = i % 4 == kByte || (!kHasVnni && i % 4 == kByte + 2);
                bytes[v][i] = is_scale ? static_cast<uint8_t>(sub_block(Format{}, v, i)) : 0x80; // 0x80: zero
            }
        }
    }
};

// total + scale * (w . x) of neighbouring weights. A sum of 4 products is at most 4 * 63 * 128 and fits into a word.
[[gnu::always_inline]] inline Ints add_scaled(Ints total, Ints w, Ints x, Ints scale) {
    return kHasVnni ? dot_words(total, dot_bytes(zero_ints(), w, x), scale)
                    : add_ints(total, madd_words(madd_bytes(w, x), scale));
}

// The 8 scales of a row of Q4_K, in bytes.
[[gnu::always_inline]] inline uint64_t scales_8(const uint8_t* block) {
    uint32_t first = 0, last = 0;
    std::memcpy(&first, block + 4, sizeof(first));
    std::memcpy(&last, block + 12, sizeof(last));
    const uint32_t high = (last & 0x0f0f0f0fU) | (first >> 2 & 0x30303030U);
    return (first & 0x3f3f3f3fU) | static_cast<uint64_t>(high) << 32;
}

// One row's part of one super-block, its lanes still to be added up.
[[gnu::always_inline]] inline Ints sum_row(Q4K, const uint8_t* block, const int32_t* x) {
    static constexpr ScaleIndex<Q4K> kIndex;
    const Ints scales = repeat_8(scales_8(block));
    Ints total = zero_ints();
#pragma GCC unroll 8
    for (int v = 0; v < kRowVectors; ++v) {
        const Ints q = load(block + 16 + v / 2 * kRowWeights);
        const Ints values = load_alternate(x + 8 * sub_block(Q4K{}, v, 0));
        const Ints scale = shuffle_bytes(scales, load(kIndex.bytes[v]));
        total = add_scaled(total, v % 2 == 0 ? nibbles_low(q) : nibbles_high(q), values, scale);
    }
    return total;
}

// Weights with their offset 32.
[[gnu::always_inline]] inline Ints sum_row(Q6K, const uint8_t* block, const int32_t* x) {
    static constexpr ScaleIndex<Q6K> kIndex;
    const Ints scales = repeat_16(block + 192);
    Ints total = zero_ints();
#pragma GCC unroll 8
    for (int v = 0; v < kRowVectors; ++v) {
        const int first = v * kRowWeights, half = first / 128;
        const Ints low = load(block + 64 * half + first % 64), high = repeat_32(block + 128 + 32 * half);
        const Ints nibbles = first % 128 < 64 ? nibbles_low(low) : nibbles_high(low);
        const Ints scale = shift_words_signed(shuffle_bytes(scales, load(kIndex.bytes[v])), 8);
        total = add_scaled(total, nibbles | two_bits(high, first % 128 / 32), load(x + v * kLanes), scale);
    }
    return total;
}

// The sum over the lanes of each of kLanes vectors: lane r is that of v[r].
[[gnu::always_inline]] inline Ints sum_lanes(const Ints* v) {
    Ints quads[kLanes / 4]; // within every 128 bits
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i, v += 4) {
        const Ints a = add_ints(interleave_low(v[0], v[1]), interleave_high(v[0], v[1]));
        const Ints b = add_ints(interleave_low(v[2], v[3]), interleave_high(v[2], v[3]));
        quads[i] = add_ints(interleave_low_pairs(a, b), interleave_high_pairs(a, b));
    }
    return sum_parts(quads);
}

// sums[b][r]: row r's part of super-block b. next: as prefetch() takes it.
template <typename Format>
inline void sum_rows(const Rows& rows, const int32_t* x, int64_t x_step, int n_blocks, const uint8_t*& next,
                     Ints (*sums)[kLanes]) {
    constexpr int kAtOnce = kRowsAtOnce<Format>;
    for (int first = 0; first < kLanes; first += kAtOnce) {
        const uint8_t* block = rows.quarter[0] + static_cast<size_t>(first) * rows.stride;
        for (int b = 0; b < n_blocks; ++b, block += sizeof(typename Format::Block)) {
#pragma GCC unroll 4
            for (int r = 0; r < kAtOnce; ++r) {
                prefetch<sizeof(typename Format::Block)>(next);
                sums[b][first + r] = sum_row(Format{}, block + static_cast<size_t>(r) * rows.stride, x + b * x_step);
            }
        }
    }
}

} // namespace
} // namespace dspark::kernels
