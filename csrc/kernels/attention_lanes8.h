// Attention's vectors of 8 lanes, of AVX2, FMA and F16C. Each file that includes this compiles its own copy, with its
// flags.
#pragma once

#include "kernels/attention_rows.h"

#include <immintrin.h>

namespace dspark::kernels {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;
    using Wide = Avx2; // what sums the values
    static constexpr int64_t kLanes = 8;
    static constexpr int kSums = 8; // vectors that are summed up at once: what the registers hold

    // Keeps a value in its register: GCC would read it from memory again for each use, or spill the sums of a loop.
    template <typename Vector> static Vector pin(Vector v) {
        __asm__("" : "+x"(v));
        return v;
    }

    static Floats load(const float* p) { return _mm256_loadu_ps(p); }
    static Floats load_halves(const uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
    static Floats set(float value) { return _mm256_set1_ps(value); }
    static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static Floats round(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

    // p * 2^n for whole n.
    static Floats scale_by_power(Floats p, Floats n) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    }
    static Floats zero_below(Floats x, float bound, Floats value) {
        const Floats is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const Floats kept = _mm256_andnot_ps(_mm256_cmp_ps(x, set(bound), _CMP_LT_OQ), value);
        return _mm256_blendv_ps(kept, x, is_nan);
    }
    // Sets the last bit of what is not 0.
    static Floats make_odd(Floats v) {
        const Floats is_set = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
        return _mm256_or_ps(v, _mm256_and_ps(is_set, _mm256_castsi256_ps(_mm256_set1_epi32(1))));
    }
    static Ints bits(Floats v) { return _mm256_castps_si256(v); }
    static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
    static void add_to(int32_t* p, Ints v) {
        auto* at = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), v));
    }

    // Lane i: the sum of the lanes of v[i], as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
    static Floats sum_each(const Floats* v) {
        const Floats low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        const Floats high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    }

    static float largest(Floats v) {
        alignas(32) float all[8];
        _mm256_store_ps(all, v);
        return *std::max_element(all, all + 8);
    }

    static float sum(Floats v) {
        alignas(32) float all[8];
        _mm256_store_ps(all, v);
        return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
    }

    // value where the score is not -inf.
    static Floats keep_seen(Floats score, Floats value, float otherwise) {
        return _mm256_blendv_ps(set(otherwise), value, _mm256_cmp_ps(score, set(-INFINITY), _CMP_NEQ_UQ));
    }

    template <int n_rows> static void dot(const float* queries, const uint16_t* const* keys, int64_t n, Floats* out) {
        dot_rows<Avx2, n_rows>(queries, keys, n, out);
    }

    // The largest magnitude among n halves, which order as integers. n: a multiple of 8.
    static float largest_magnitude(const uint16_t* p, int64_t n) {
        __m256i most = _mm256_setzero_si256(), others = most;
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            most = _mm256_max_epu16(most, magnitudes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
            others =
                _mm256_max_epu16(others, magnitudes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i) + 1)));
        }
        for (; i < n; i += 8) {
            const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
            most = _mm256_max_epu16(most, magnitudes(_mm256_zextsi128_si256(v)));
        }
        return largest_of(_mm256_max_epu16(most, others));
    }

  private:
    static __m256i magnitudes(__m256i halves) { return _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff)); }

    static float largest_of(__m256i halves) {
        const __m128i most = _mm_max_epu16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
        // minpos finds the smallest
        const __m128i inverted = _mm_xor_si128(most, _mm_set1_epi16(-1));
        const auto bits = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(inverted)));
        return bits < 0x7c00 ? _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))) : kNotFinite;
    }
};

} // namespace
} // namespace dspark::kernels
