// Vectors of 16 outputs: AVX-512 (F, BW, DQ, VL) with VNNI. Included by lanes.h only. Names as in lanes8.h.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace dspark::kernels {
namespace {

inline constexpr int kLanes = 16;
using Ints = __m512i;
using Floats = __m512;

inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Ints all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
inline Ints all_ints(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints all_words(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
inline Floats all_floats(float value) { return _mm512_set1_ps(value); }
inline Ints repeat_16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
inline Ints repeat_8(uint64_t value) { return _mm512_set1_epi64(static_cast<long long>(value)); }
inline Ints repeat_32(const void* p) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline Ints load_alternate(const int32_t* p) { // every other 32 bytes
    return _mm512_inserti64x4(repeat_32(p), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)), 1);
}

inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints sub_ints(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints mul_ints(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints add_words(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
inline Ints shift_words_left(Ints v, int n) { return _mm512_slli_epi16(v, static_cast<unsigned>(n)); }
inline Ints shift_words_right(Ints v, int n) { return _mm512_srli_epi16(v, static_cast<unsigned>(n)); }
inline Ints shift_words_signed(Ints v, int n) { return _mm512_srai_epi16(v, static_cast<unsigned>(n)); }
inline Ints shift_ints_left(Ints v, int n) { return _mm512_slli_epi32(v, static_cast<unsigned>(n)); }
inline Ints shift_ints_right(Ints v, int n) { return _mm512_srli_epi32(v, static_cast<unsigned>(n)); }
inline Ints shift_ints_signed(Ints v, int n) { return _mm512_srai_epi32(v, static_cast<unsigned>(n)); }
inline Ints shuffle_bytes(Ints table, Ints index) { return _mm512_shuffle_epi8(table, index); }
inline Ints madd_words(Ints a, Ints b) { return _mm512_madd_epi16(a, b); }
inline Ints madd_bytes(Ints a, Ints b) { return _mm512_maddubs_epi16(a, b); }

inline Ints sizes_of_bytes(Ints v) { return v; } // never used: VNNI takes weights with an offset
inline Ints give_sign(Ints v, Ints) { return v; }

inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }

inline constexpr bool kHasVnni = true;
inline Ints dot_bytes(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints dot_words(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Ints dot_group(Ints sum, Ints w, const int32_t* x) {
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}
inline Ints dot_word_group(Ints sum, Ints w, const int32_t* x) {
    __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}

inline void keep_order(Ints& sum) {
#if defined(__GNUC__)
    __asm__("" : "+v"(sum));
#else
    (void)sum;
#endif
}

// One 128-bit part each. Masked loads that broadcast need no shuffle, which the transposition is short of.
[[gnu::always_inline]] inline Ints load_parts(const uint8_t* const (&p)[4]) {
    const auto part = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[i])); };
    Ints v = _mm512_castsi128_si512(part(0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, part(1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, part(2));
    return _mm512_mask_broadcast_i32x4(v, 0xf000, part(3));
}

[[gnu::always_inline]] inline Floats low_halves(Ints v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

inline Floats load_f16(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_bf16(const uint8_t* p) {
    const Ints wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline Floats widen_halves(const __m128i (&eights)[2]) {
    return _mm512_cvtph_ps(_mm256_set_m128i(eights[1], eights[0]));
}
inline Ints interleave_low(Ints a, Ints b) { return _mm512_unpacklo_epi32(a, b); }
inline Ints interleave_high(Ints a, Ints b) { return _mm512_unpackhi_epi32(a, b); }
inline Ints interleave_low_pairs(Ints a, Ints b) { return _mm512_unpacklo_epi64(a, b); }
inline Ints interleave_high_pairs(Ints a, Ints b) { return _mm512_unpackhi_epi64(a, b); }

// The pair of bits `pair` (first 32 bytes) or `pair + 1` of every byte, as its bits 4 and 5. pair: 0 or 2.
inline Ints two_bits(Ints v, int pair) {
    const Ints shift = _mm512_inserti64x4(all_words(pair == 0 ? 4 : 0), _mm256_set1_epi16(2), 1);
    return (pair == 0 ? _mm512_sllv_epi16(v, shift) : _mm512_srlv_epi16(v, shift)) & all_bytes(0x30);
}

// Bit s (first 32 bytes) or s + 2 of every byte, as its bit 4. s: 0, 1, 4 or 5.
inline Ints bits_to_4(Ints v, int s) {
    const int first = s < 4 ? 4 - s : s - 4, last = s < 4 ? 2 - s : s - 2;
    const Ints shift = _mm512_inserti64x4(all_words(first), _mm256_set1_epi16(static_cast<short>(last)), 1);
    return (s < 4 ? _mm512_sllv_epi16(v, shift) : _mm512_srlv_epi16(v, shift)) & all_bytes(16);
}

// Lane 4 i + r: the sum over the parts of lane r of quads[i].
[[gnu::always_inline]] inline Ints sum_parts(const Ints (&quads)[4]) {
    const Ints a =
        add_ints(_mm512_shuffle_i32x4(quads[0], quads[1], 0x44), _mm512_shuffle_i32x4(quads[0], quads[1], 0xee));
    const Ints b =
        add_ints(_mm512_shuffle_i32x4(quads[2], quads[3], 0x44), _mm512_shuffle_i32x4(quads[2], quads[3], 0xee));
    return add_ints(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

inline void store(float* y, Floats values) { _mm512_storeu_ps(y, values); }

// The lanes of a vector added to 4.
inline __m128 fold(Floats v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

} // namespace
} // namespace dspark::kernels
