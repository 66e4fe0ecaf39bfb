// Vectors of 8 outputs: AVX2, and AVX-VNNI or AVX-512VL + VNNI where compiled with them. Included by lanes.h only.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace dspark::kernels {
namespace {

inline constexpr int kLanes = 8;
using Ints = __m256i;
using Floats = __m256;

inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Ints all_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
inline Ints all_ints(int32_t value) { return _mm256_set1_epi32(value); }
inline Ints all_words(int value) { return _mm256_set1_epi16(static_cast<short>(value)); }
inline Floats all_floats(float value) { return _mm256_set1_ps(value); }
inline Ints repeat_16(const void* p) { // 16 bytes in every 128-bit part
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline Ints repeat_8(uint64_t value) { return _mm256_set1_epi64x(static_cast<long long>(value)); }
inline Ints repeat_32(const void* p) { return load(p); }
inline Ints load_alternate(const int32_t* p) { return load(p); } // every other 32 bytes: one

inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints sub_ints(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints mul_ints(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints add_words(Ints a, Ints b) { return _mm256_add_epi16(a, b); }
inline Ints shift_words_left(Ints v, int n) { return _mm256_slli_epi16(v, n); }
inline Ints shift_words_right(Ints v, int n) { return _mm256_srli_epi16(v, n); }
inline Ints shift_words_signed(Ints v, int n) { return _mm256_srai_epi16(v, n); }
inline Ints shift_ints_left(Ints v, int n) { return _mm256_slli_epi32(v, n); }
inline Ints shift_ints_right(Ints v, int n) { return _mm256_srli_epi32(v, n); }
inline Ints shift_ints_signed(Ints v, int n) { return _mm256_srai_epi32(v, n); }
inline Ints shuffle_bytes(Ints table, Ints index) { return _mm256_shuffle_epi8(table, index); }
inline Ints madd_words(Ints a, Ints b) { return _mm256_madd_epi16(a, b); }
inline Ints madd_bytes(Ints a, Ints b) { return _mm256_maddubs_epi16(a, b); } // a unsigned, b signed

inline Ints sizes_of_bytes(Ints v) { return _mm256_abs_epi8(v); } // 128, unsigned, for -128
inline Ints give_sign(Ints v, Ints sign) { return _mm256_sign_epi8(v, sign); }

inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Floats as_floats(Ints v) { return _mm256_castsi256_ps(v); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }

// sum + products of 4 unsigned bytes of w with 4 signed bytes of x, exact in 32 bits.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline constexpr bool kHasVnni = true;
inline Ints dot_bytes(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_epi32(sum, w, x); }
inline Ints dot_words(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_epi32(sum, a, b); }
// With the 4 bytes at x in every lane, broadcast by the instruction itself: a form that GCC does not find.
inline Ints dot_group(Ints sum, Ints w, const int32_t* x) {
    __asm__("vpdpbusd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}
inline Ints dot_word_group(Ints sum, Ints w, const int32_t* x) {
    __asm__("vpdpwssd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*x));
    return sum;
}
#elif defined(__AVXVNNI__)
inline constexpr bool kHasVnni = true;
inline Ints dot_bytes(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
inline Ints dot_words(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
inline Ints dot_group(Ints sum, Ints w, const int32_t* x) { return dot_bytes(sum, w, _mm256_set1_epi32(*x)); }
inline Ints dot_word_group(Ints sum, Ints w, const int32_t* x) { return dot_words(sum, w, _mm256_set1_epi32(*x)); }
#else
inline constexpr bool kHasVnni = false;
inline Ints dot_bytes(Ints sum, Ints, Ints) { return sum; }
inline Ints dot_words(Ints sum, Ints, Ints) { return sum; }
inline Ints dot_group(Ints sum, Ints, const int32_t*) { return sum; }
inline Ints dot_word_group(Ints sum, Ints, const int32_t*) { return sum; }
#endif

// Keeps a running sum in its register: GCC would reassociate the additions of an unrolled loop into a tree of
// temporaries and spill them (3 times slower).
inline void keep_order(Ints& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#else
    (void)sum;
#endif
}

// One 128-bit part each.
[[gnu::always_inline]] inline Ints load_parts(const uint8_t* const (&p)[2]) {
    const auto* low = reinterpret_cast<const __m128i*>(p[0]);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(low)),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(p[1])), 1);
}

// The f16 in the low half of each lane.
[[gnu::always_inline]] inline Floats low_halves(Ints v) {
    const Ints packed = _mm256_packus_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256());
    return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8)));
}

inline Floats load_f16(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_bf16(const uint8_t* p) {
    const Ints wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline Floats widen_halves(const __m128i (&eights)[1]) { return _mm256_cvtph_ps(eights[0]); }
inline Ints interleave_low(Ints a, Ints b) { return _mm256_unpacklo_epi32(a, b); } // within every 128 bits
inline Ints interleave_high(Ints a, Ints b) { return _mm256_unpackhi_epi32(a, b); }
inline Ints interleave_low_pairs(Ints a, Ints b) { return _mm256_unpacklo_epi64(a, b); }
inline Ints interleave_high_pairs(Ints a, Ints b) { return _mm256_unpackhi_epi64(a, b); }

// The pair of bits `pair` of every byte, as its bits 4 and 5.
inline Ints two_bits(Ints v, int pair) {
    return (pair < 2 ? shift_words_left(v, 4 - 2 * pair) : shift_words_right(v, 2 * pair - 4)) & all_bytes(0x30);
}

// Bit s of every byte, as its bit 4.
inline Ints bits_to_4(Ints v, int s) {
    return (s < 4 ? shift_words_left(v, 4 - s) : shift_words_right(v, s - 4)) & all_bytes(16);
}

// Lane 4 i + r: the sum over the parts of lane r of quads[i].
[[gnu::always_inline]] inline Ints sum_parts(const Ints (&quads)[2]) {
    return add_ints(_mm256_permute2x128_si256(quads[0], quads[1], 0x20),
                    _mm256_permute2x128_si256(quads[0], quads[1], 0x31));
}

inline void store(float* y, Floats values) { _mm256_storeu_ps(y, values); }

// The lanes of a vector added to 4.
inline __m128 fold(Floats v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }

} // namespace
} // namespace dspark::kernels
