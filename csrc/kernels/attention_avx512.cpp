// Attention with AVX-512. The order of every sum is that of 8 lanes, so are the bits: scores are computed for two rows
// in one vector, values have no order to keep.
#include "kernels/attention_lanes8.h"

namespace dspark::kernels {
namespace {

struct Lanes16 {
    using Floats = __m512;
    using Ints = __m512i;
    static constexpr int64_t kLanes = 16;
    static constexpr int kSums = 16;

    template <typename Vector> static Vector pin(Vector v) {
        __asm__("" : "+v"(v));
        return v;
    }
    static Floats load_halves(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Floats set(float value) { return _mm512_set1_ps(value); }
    static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Ints bits(Floats v) { return _mm512_castps_si512(v); }
    static void add_to(int32_t* p, Ints v) { _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_loadu_si512(p), v)); }
};

struct Avx512 : Avx2 {
    using Wide = Lanes16;

    template <int n_rows> static void dot(const float* queries, const uint16_t* const* keys, int64_t n, Floats* out) {
        if constexpr (n_rows == 1) {
            Avx2::dot<1>(queries, keys, n, out);
        } else {
            dot_pairs<n_rows / 2>(queries, keys, n, out);
        }
    }

  private:
    // Lanes 0 .. 7 of a sum are those of a pair's first row.
    template <int n_pairs>
    static void dot_pairs(const float* queries, const uint16_t* const* keys, int64_t n, Floats* out) {
        __m512 sum[n_pairs][kCellBlock] = {};
        for (int64_t d = 0; d < n; d += 8, queries += 16 * n_pairs) {
            __m512 q[n_pairs];
#pragma GCC unroll 2
            for (int p = 0; p < n_pairs; ++p) {
                q[p] = Lanes16::pin(_mm512_loadu_ps(queries + 16 * p));
            }
#pragma GCC unroll 8
            for (int i = 0; i < kCellBlock; ++i) {
                const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys[i] + d));
                const __m512 key = Lanes16::pin(_mm512_cvtph_ps(_mm256_broadcastsi128_si256(halves)));
#pragma GCC unroll 2
                for (int p = 0; p < n_pairs; ++p) {
                    sum[p][i] = _mm512_fmadd_ps(q[p], key, sum[p][i]);
                }
            }
        }
#pragma GCC unroll 2
        for (int p = 0; p < n_pairs; ++p) {
            const __m512 both = sum_each_pair(sum[p]);
            out[2 * p] = _mm512_castps512_ps256(both);
            out[2 * p + 1] = _mm512_extractf32x8_ps(both, 1);
        }
    }

    // As Avx2::sum_each, in both halves.
    static __m512 sum_each_pair(const __m512* v) {
        const __m512 low = add_neighbours(add_neighbours(v[0], v[1]), add_neighbours(v[2], v[3]));
        const __m512 high = add_neighbours(add_neighbours(v[4], v[5]), add_neighbours(v[6], v[7]));
        const __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
        return _mm512_shuffle_f32x4(sum, sum, 0xd8);
    }
    static __m512 add_neighbours(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    }
};

void attend_avx512(const Attention& attention, const AttentionRun& run, AttentionHeads heads,
                   AttentionScratch& scratch) {
    RunRows<Avx512>(attention, run, heads, scratch).compute();
}

} // namespace

AttendRun find_attend_avx512() {
    const bool is_supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? attend_avx512 : nullptr;
}

} // namespace dspark::kernels
