// Shared by the AVX2 files only (compiled with -mavx2 -mfma -mf16c): the strip transposition everything rests on.
//
// A strip is 8 rows of W. Its blocks are transposed on the fly so that the 8 lanes of a vector belong to 8 outputs,
// 4 weights of each: one vpmaddubsw with 4 broadcast values of a column then serves 8 outputs, products add up in
// 16-bit lanes over a whole sub-block, scales are vectors, and no sum across lanes is ever taken. The transposition is
// paid once per strip and shared by all columns.
#pragma once

#include "kernels/blocks.h"
#include "kernels/isa.h"

#include <immintrin.h>

namespace dspark::kernels::avx2 {

void prepare(const Product& product, int64_t begin, Columns& columns);

using Rows = const uint8_t* const*; // 8 rows of W at the current block; beyond the last row: the last row again

inline __m256i load_two(const uint8_t* low, const uint8_t* high) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
}

// 16 bytes at `offset` of each row -> 4 vectors; lane r of vector i: bytes 4 i .. 4 i + 3 of row r.
inline void transpose_16(Rows rows, int offset, __m256i out[4]) {
    const __m256i a = load_two(rows[0] + offset, rows[4] + offset);
    const __m256i b = load_two(rows[1] + offset, rows[5] + offset);
    const __m256i c = load_two(rows[2] + offset, rows[6] + offset);
    const __m256i d = load_two(rows[3] + offset, rows[7] + offset);
    const __m256i ab_low = _mm256_unpacklo_epi32(a, b);
    const __m256i ab_high = _mm256_unpackhi_epi32(a, b);
    const __m256i cd_low = _mm256_unpacklo_epi32(c, d);
    const __m256i cd_high = _mm256_unpackhi_epi32(c, d);
    out[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
    out[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
    out[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
    out[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
}

inline uint64_t load_half(const uint8_t* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, sizeof(half));
    return half;
}

// The f16 at `offset` of each row, as floats. Put together in integer registers, which are idle here: eight 2-byte
// stores read back as one vector would wait for the stores to retire.
inline __m256 gather_halves(Rows rows, int offset) {
    uint64_t parts[2];
    for (int i = 0; i < 2; ++i) {
        Rows r = rows + 4 * i;
        parts[i] = load_half(r[0] + offset) | load_half(r[1] + offset) << 16 | load_half(r[2] + offset) << 32 |
                   load_half(r[3] + offset) << 48;
    }
    return _mm256_cvtph_ps(_mm_set_epi64x(static_cast<int64_t>(parts[1]), static_cast<int64_t>(parts[0])));
}

// Keeps a running sum in its register: GCC would reassociate the additions of an unrolled loop into a tree of
// temporaries and spill them (3 times slower).
inline void keep_order(__m256i& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#else
    (void)sum;
#endif
}

inline __m256i broadcast(const int32_t* group) { return _mm256_set1_epi32(*group); }

inline __m256 broadcast_scale(const int32_t* group) { return _mm256_castsi256_ps(broadcast(group)); }

inline __m256i nibbles_low(__m256i q) { return _mm256_and_si256(q, _mm256_set1_epi8(15)); }
inline __m256i nibbles_high(__m256i q) { return nibbles_low(_mm256_srli_epi16(q, 4)); }

} // namespace dspark::kernels::avx2
