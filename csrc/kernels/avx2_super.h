// K-quants: super-blocks of 256 weights. Unpacks one super-block of a strip, multiplies it with a tile of columns.
#pragma once

#include "kernels/avx2.h"

namespace dspark::kernels::avx2 {

// One super-block of 8 rows. Weights as unsigned bytes; 64 vectors of 4 weights per row.
struct SuperStrip {
    __m256i q[64];
    __m256i scale[16]; // per sub-block: the row's scale in both 16-bit halves of its lane
    __m256i mins[8];   // per pair of sub-blocks: both mins of the row
    __m256 d;
    __m256 dmin;
};

// Sub-blocks of kVectors * 4 weights; kDepth vectors may add up in 16 bits: kDepth * 2 * largest weight * 128 < 2^15.
struct Q4K {
    using Block = BlockQ4_K;
    static constexpr int kVectors = 8, kDepth = 8, kSums = 4;
    static constexpr bool kHasMins = true;
};
struct Q5K {
    using Block = BlockQ5_K;
    static constexpr int kVectors = 8, kDepth = 4, kSums = 4;
    static constexpr bool kHasMins = true;
};
struct Q6K {
    using Block = BlockQ6_K;
    static constexpr int kVectors = 4, kDepth = 2, kSums = 8;
    static constexpr bool kHasMins = false; // the offset 32 takes the place of a min: 32 * scale
};

// Byte s of each lane in both 16-bit halves, and bytes s, s + 1 in one half each (unsigned).
inline __m256i spread_byte(__m256i lanes, int s) {
    const int pattern = static_cast<int>(0x80008000U | static_cast<unsigned>(s) | static_cast<unsigned>(s) << 16);
    const __m256i base =
        _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
    return _mm256_shuffle_epi8(lanes, _mm256_add_epi32(base, _mm256_set1_epi32(pattern)));
}
inline __m256i spread_pair(__m256i lanes, int s) {
    const int pattern = static_cast<int>(0x80008000U | static_cast<unsigned>(s) | static_cast<unsigned>(s + 1) << 16);
    const __m256i base =
        _mm256_setr_epi32(0, 0x00040004, 0x00080008, 0x000c000c, 0, 0x00040004, 0x00080008, 0x000c000c);
    return _mm256_shuffle_epi8(lanes, _mm256_add_epi32(base, _mm256_set1_epi32(pattern)));
}

// d, dmin and the 6-bit scales and mins of Q4_K and Q5_K: the first 16 bytes of the block.
inline void unpack_head(Rows rows, SuperStrip& out) {
    __m256i head[4];
    transpose_16(rows, 0, head);
    const __m256i halves = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_and_si256(head[0], _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(head[0], 16)),
        0xd8);
    out.d = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    out.dmin = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    const __m256i six = _mm256_set1_epi8(0x3f), four = _mm256_set1_epi8(0x0f), two = _mm256_set1_epi8(0x30);
    const __m256i scales[2] = {
        _mm256_and_si256(head[1], six),
        _mm256_or_si256(_mm256_and_si256(head[3], four), _mm256_and_si256(_mm256_srli_epi16(head[1], 2), two))};
    const __m256i mins[2] = {_mm256_and_si256(head[2], six),
                             _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(head[3], 4), four),
                                             _mm256_and_si256(_mm256_srli_epi16(head[2], 2), two))};
    for (int s = 0; s < 8; ++s) {
        out.scale[s] = spread_byte(scales[s / 4], s % 4);
    }
    for (int s = 0; s < 4; ++s) {
        out.mins[s] = spread_pair(mins[s / 2], s % 2 * 2);
    }
}

inline void unpack(Q4K, Rows rows, SuperStrip& out) {
    unpack_head(rows, out);
    for (int g = 0; g < 4; ++g) {
        for (int half = 0; half < 2; ++half) {
            __m256i q[4];
            transpose_16(rows, 16 + 32 * g + 16 * half, q);
            for (int i = 0; i < 4; ++i) {
                out.q[16 * g + 4 * half + i] = nibbles_low(q[i]);
                out.q[16 * g + 8 + 4 * half + i] = nibbles_high(q[i]);
            }
        }
    }
}

// Bit `from` of every byte to bit 4; bits that cross into a neighbour are masked away.
inline __m256i bit_to_4(__m256i v, int from) {
    const __m256i moved =
        from < 4 ? _mm256_sll_epi16(v, _mm_cvtsi32_si128(4 - from)) : _mm256_srl_epi16(v, _mm_cvtsi32_si128(from - 4));
    return _mm256_and_si256(moved, _mm256_set1_epi8(16));
}

inline void unpack(Q5K, Rows rows, SuperStrip& out) {
    unpack_head(rows, out);
    for (int half = 0; half < 2; ++half) {
        __m256i high[4];
        transpose_16(rows, 16 + 16 * half, high);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            __m256i q[4];
            transpose_16(rows, 48 + 32 * g + 16 * half, q);
            for (int i = 0; i < 4; ++i) {
                out.q[16 * g + 4 * half + i] = _mm256_or_si256(nibbles_low(q[i]), bit_to_4(high[i], 2 * g));
                out.q[16 * g + 8 + 4 * half + i] = _mm256_or_si256(nibbles_high(q[i]), bit_to_4(high[i], 2 * g + 1));
            }
        }
    }
}

inline void unpack(Q6K, Rows rows, SuperStrip& out) {
    const __m256i two = _mm256_set1_epi8(0x30);
    for (int part = 0; part < 4; ++part) { // half of 128 weights, 16 of its 32 columns of bytes
        const int half = part / 2, side = part % 2;
        __m256i first[4], second[4], high[4];
        transpose_16(rows, 64 * half + 16 * side, first);
        transpose_16(rows, 64 * half + 32 + 16 * side, second);
        transpose_16(rows, 128 + 32 * half + 16 * side, high);
        __m256i* q = out.q + 32 * half + 4 * side;
        for (int i = 0; i < 4; ++i) {
            const __m256i h = high[i];
            q[i] = _mm256_or_si256(nibbles_low(first[i]), _mm256_and_si256(_mm256_slli_epi16(h, 4), two));
            q[8 + i] = _mm256_or_si256(nibbles_low(second[i]), _mm256_and_si256(_mm256_slli_epi16(h, 2), two));
            q[16 + i] = _mm256_or_si256(nibbles_high(first[i]), _mm256_and_si256(h, two));
            q[24 + i] = _mm256_or_si256(nibbles_high(second[i]), _mm256_and_si256(_mm256_srli_epi16(h, 2), two));
        }
    }
    __m256i scales[4];
    transpose_16(rows, 192, scales);
    for (int s = 0; s < 16; ++s) { // signed bytes: into the high byte of each half, then down
        out.scale[s] = _mm256_srai_epi16(_mm256_slli_epi16(spread_byte(scales[s / 4], s % 4), 8), 8);
    }
    for (int s = 0; s < 8; ++s) {
        out.mins[s] = _mm256_srai_epi16(_mm256_slli_epi16(spread_pair(scales[s / 2], s % 2 * 2), 8), 8);
    }
    out.d = gather_halves(rows, 208);
}

// acc[c] += the super-block's part of 8 outputs for each of N columns.
template <typename Format, int N> inline void multiply_super(const SuperStrip& w, const int32_t* x, __m256* acc) {
    __m256i sum[N];
    for (int c = 0; c < N; ++c) {
        sum[c] = _mm256_setzero_si256();
    }
    for (int s = 0; s < 64 / Format::kVectors; ++s) {
        const __m256i scale = w.scale[s];
        const __m256i* q = w.q + s * Format::kVectors;
        const int32_t* group = x + s * Format::kVectors * N;
#pragma GCC unroll 4
        for (int part = 0; part < Format::kVectors; part += Format::kDepth) {
            __m256i products[N];
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) {
                products[c] = _mm256_maddubs_epi16(q[part], broadcast(group + part * N + c));
            }
#pragma GCC unroll 8
            for (int i = part + 1; i < part + Format::kDepth; ++i) {
#pragma GCC unroll 8
                for (int c = 0; c < N; ++c) {
                    products[c] =
                        _mm256_add_epi16(products[c], _mm256_maddubs_epi16(q[i], broadcast(group + i * N + c)));
                    keep_order(products[c]);
                }
            }
#pragma GCC unroll 8
            for (int c = 0; c < N; ++c) {
                sum[c] = _mm256_add_epi32(sum[c], _mm256_madd_epi16(products[c], scale));
                keep_order(sum[c]);
            }
        }
    }
    const int32_t* sums = x + 64 * N;
    const int32_t* scales = sums + Format::kSums * N;
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        __m256i offset = _mm256_madd_epi16(w.mins[0], broadcast(sums + c));
        for (int s = 1; s < Format::kSums; ++s) {
            offset = _mm256_add_epi32(offset, _mm256_madd_epi16(w.mins[s], broadcast(sums + s * N + c)));
        }
        const __m256 dx = broadcast_scale(scales + c);
        if constexpr (Format::kHasMins) {
            acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), _mm256_mul_ps(w.d, dx), acc[c]);
            acc[c] = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(offset), _mm256_mul_ps(w.dmin, dx), acc[c]);
        } else {
            const __m256i total = _mm256_sub_epi32(sum[c], _mm256_slli_epi32(offset, 5));
            acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(w.d, dx), acc[c]);
        }
    }
}

} // namespace dspark::kernels::avx2
