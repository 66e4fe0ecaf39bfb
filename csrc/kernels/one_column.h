// One column of Q6_K: row by row, each along the memory; the lanes of a vector are neighbouring weights. The
// transposition of a strip is paid for one column alone here, and blocks of 210 bytes that begin anywhere cost it most.
// The integers are those of the strips, so are the floats that follow (finish_super), so are the bits of the result.
#pragma once

#include "kernels/tiles.h"

namespace dspark::kernels {
namespace {

inline constexpr int kRowBlocks = 16;          // of a row at once: sums fit into L1
inline constexpr int kRowWeights = 4 * kLanes; // of a vector
inline constexpr int kRowVectors = static_cast<int>(kSuperBlockSize) / kRowWeights; // of a super-block

// For shuffle_bytes: the scales of each vector's weights, in the high bytes of the words that they multiply. With VNNI
// that is the low word of a lane, without it is both.
struct ScaleIndex {
    alignas(64) uint8_t bytes[kRowVectors][kRowWeights];

    constexpr ScaleIndex() : bytes() {
        for (int i = 0; i < static_cast<int>(kSuperBlockSize); ++i) {
            const bool is_scale = i % 4 == 1 || (!kHasVnni && i % 4 == 3);
            bytes[i / kRowWeights][i % kRowWeights] = is_scale ? static_cast<uint8_t>(i / 16) : 0x80; // 0x80: zero
        }
    }
};

// total + scale * (w . x) of neighbouring weights. A sum of 4 products is at most 4 * 63 * 128 and fits into a word.
[[gnu::always_inline]] inline Ints add_scaled(Ints total, Ints w, Ints x, Ints scale) {
    return kHasVnni ? dot_words(total, dot_bytes(zero_ints(), w, x), scale)
                    : add_ints(total, madd_words(madd_bytes(w, x), scale));
}

// One row's part of one super-block, its lanes still to be added up; weights with their offset 32.
[[gnu::always_inline]] inline Ints sum_row(Q6K, const uint8_t* block, const int32_t* x) {
    static constexpr ScaleIndex kIndex;
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
    for (int r = 0; r < kLanes; ++r) {
        const uint8_t* block = rows.quarter[0] + static_cast<size_t>(r) * rows.stride;
        for (int b = 0; b < n_blocks; ++b, block += sizeof(typename Format::Block)) {
            prefetch<sizeof(typename Format::Block)>(next);
            sums[b][r] = sum_row(Format{}, block, x + b * x_step);
        }
    }
}

} // namespace
} // namespace dspark::kernels
