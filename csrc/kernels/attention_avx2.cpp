// Attention with AVX2, FMA and F16C. Compiled with these flags.
#include "kernels/attention_rows.h"

#include <immintrin.h>

namespace dspark::kernels {
namespace {

struct Avx2 {
    using Floats = __m256;
    using Ints = __m256i;

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
    static Ints add_bits(Ints sum, Floats v) { return _mm256_add_epi32(sum, _mm256_castps_si256(v)); }
    static void add_to(int32_t* p, Ints v, int32_t more) {
        auto* at = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_add_epi32(_mm256_loadu_si256(at), v), _mm256_set1_epi32(more)));
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

    // The largest magnitude among n halves, which order as integers. n: a multiple of 8.
    static float largest_magnitude(const uint16_t* p, int64_t n) {
        __m128i most = _mm_setzero_si128();
        for (int64_t i = 0; i < n; i += 8) {
            const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i));
            most = _mm_max_epu16(most, _mm_and_si128(v, _mm_set1_epi16(0x7fff)));
        }
        // minpos finds the smallest
        const __m128i inverted = _mm_xor_si128(most, _mm_set1_epi16(-1));
        const auto bits = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(inverted)));
        return bits < 0x7c00 ? _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))) : kNotFinite;
    }
};

void attend_avx2(const Attention& attention, const AttentionRun& run, AttentionHeads heads, AttentionScratch& scratch) {
    RunRows<Avx2>(attention, run, heads, scratch).compute();
}

} // namespace

AttendRun find_attend_avx2() {
    const bool is_supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? attend_avx2 : nullptr;
}

} // namespace dspark::kernels
