// Q8_0, Q4_0, IQ4_NL: blocks of 32 weights with one scale. Unpacks up to 8 blocks of a strip, multiplies them with a
// tile of columns. Q4_0 multiplies unsigned bytes and subtracts 8 * sum(x); the two others have weights of either sign
// up to 127, whose byte products would overflow 16 bits: they multiply 16-bit words.
#pragma once

#include "kernels/avx2.h"

namespace dspark::kernels::avx2 {

inline constexpr int kStepBlocks = 8;

struct Q4_0 {
    using Block = BlockQ4_0;
    static constexpr int kVectors = 8; // per block
    static constexpr bool kIsWords = false;
};
struct Q8_0 {
    using Block = BlockQ8_0;
    static constexpr int kVectors = 16;
    static constexpr bool kIsWords = true;
};
struct IQ4_NL {
    using Block = BlockQ4_0;
    static constexpr int kVectors = 16;
    static constexpr bool kIsWords = true;
};

struct BlockStrip {
    __m256i q[kStepBlocks * 16];
    __m256 d[kStepBlocks];
};

// 4 signed weights per lane -> even ones and odd ones as 16-bit words. The even ones by a product with (1, 0): the
// multipliers are free here, the shifters busy with the transposition.
inline void put_words(__m256i bytes, __m256i* out) {
    out[0] = _mm256_maddubs_epi16(_mm256_set1_epi16(1), bytes);
    out[1] = _mm256_srai_epi16(bytes, 8);
}

inline void unpack(Q4_0, Rows rows, __m256i* out) {
    __m256i q[4];
    transpose_16(rows, 2, q);
    for (int i = 0; i < 4; ++i) {
        out[i] = nibbles_low(q[i]);
        out[4 + i] = nibbles_high(q[i]);
    }
}

inline void unpack(Q8_0, Rows rows, __m256i* out) {
    for (int half = 0; half < 2; ++half) {
        __m256i q[4];
        transpose_16(rows, 2 + 16 * half, q);
        for (int i = 0; i < 4; ++i) {
            put_words(q[i], out + 8 * half + 2 * i);
        }
    }
}

inline void unpack(IQ4_NL, Rows rows, __m256i* out) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113));
    __m256i q[4];
    transpose_16(rows, 2, q);
    for (int i = 0; i < 4; ++i) {
        put_words(_mm256_shuffle_epi8(table, nibbles_low(q[i])), out + 2 * i);
        put_words(_mm256_shuffle_epi8(table, nibbles_high(q[i])), out + 8 + 2 * i);
    }
}

template <typename Format> inline __m256i dot(__m256i w, const int32_t* group) {
    if constexpr (Format::kIsWords) {
        return _mm256_madd_epi16(w, broadcast(group));
    } else {
        return _mm256_maddubs_epi16(w, broadcast(group));
    }
}

// acc[c] += one block's part of 8 outputs for each of N columns. x: the block's values of the tile, as columns.h says.
template <typename Format, int N>
inline void multiply_block(const __m256i* q, __m256 d, const int32_t* x, __m256* acc) {
    __m256i sum[N];
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        sum[c] = dot<Format>(q[0], x + c);
    }
#pragma GCC unroll 16
    for (int i = 1; i < Format::kVectors; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
            const __m256i product = dot<Format>(q[i], x + i * N + c);
            sum[c] = Format::kIsWords ? _mm256_add_epi32(sum[c], product) : _mm256_add_epi16(sum[c], product);
            keep_order(sum[c]);
        }
    }
    x += Format::kVectors * N;
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        if constexpr (!Format::kIsWords) { // 16-bit sums of at most 8 * 2 * 15 * 128: to 32 bits, minus 8 * sum(x)
            sum[c] = _mm256_add_epi32(_mm256_madd_epi16(sum[c], _mm256_set1_epi16(1)), broadcast(x + c));
        }
    }
    x += Format::kIsWords ? 0 : N;
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        const __m256 scale = _mm256_mul_ps(d, broadcast_scale(x + c));
        acc[c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[c]), scale, acc[c]);
    }
}

} // namespace dspark::kernels::avx2
