// The functions of attention's rows, for the vectors of one instruction set.
#pragma once

#include "kernels/attention_run.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace dspark::kernels {

// exp(x) for x <= 0; 0 below -87. NaN stays.
template <typename Simd> [[gnu::always_inline]] inline typename Simd::Floats exp_negative(typename Simd::Floats x) {
    using S = Simd;
    const auto n = S::round(S::mul(x, S::set(1.44269504F)));
    auto r = S::fma(n, S::set(-0.693145752F), x); // ln 2 in two parts: the first times n is exact
    r = S::fma(n, S::set(-1.42860677e-6F), r);
    auto p = S::set(1.0F / 720);
    for (const float c : {1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F}) {
        p = S::fma(p, r, S::set(c));
    }
    return S::zero_below(x, -87.0F, S::scale_by_power(p, n));
}

inline constexpr float kNotFinite = 0x1p17F; // stands for the magnitude of values that are no numbers

// The step in which the values of a row are summed. `largest`: a finite f16; `total`: of the weights, the largest of
// which is 1. The terms of a block stay below 2^22 steps, those of all blocks below 2^31. Static: each instruction set
// has its own, compiled with its flags.
static inline float find_step(float largest, float total) {
    static_assert(kValueBlock == 1 << 4);
    const auto exponent_of = [](float x) { return static_cast<int>(std::bit_cast<uint32_t>(x) >> 23) - 126; };
    const int exponent = largest == 0.0F ? 0 : exponent_of(largest); // 2^exponent is larger
    const int total_exponent = total <= 1.0F ? 0 : exponent_of(total);
    const int headroom = std::max(std::min(4, total_exponent), total_exponent - 9);
    return std::bit_cast<float>(static_cast<uint32_t>(exponent - 22 + headroom + 127) << 23);
}

inline constexpr float kOffset = 1.5F * 0x1p23F; // around it floats are whole numbers

// Calls rows(size, row) for the rows [row, end), size at a time: 4, then 2, then 1.
template <typename Rows> [[gnu::always_inline]] inline void split_rows(int64_t row, int64_t end, Rows rows) {
    for (; row + 4 <= end; row += 4) {
        rows(std::integral_constant<int, 4>(), row);
    }
    if (row + 2 <= end) {
        rows(std::integral_constant<int, 2>(), row);
        row += 2;
    }
    if (row < end) {
        rows(std::integral_constant<int, 1>(), row);
    }
}

// n_rows rows of Q with 8 keys. Every dot product has the same order, whichever of them it is.
template <typename Simd, int n_rows>
[[gnu::always_inline]] inline void dot_rows(const float* queries, const uint16_t* const* keys, int64_t n,
                                            typename Simd::Floats* out) {
    using Floats = typename Simd::Floats;
    constexpr int n_keys = 8 / n_rows; // what the registers hold
    Floats all[n_rows][kCellBlock];
    for (int64_t k = 0; k < kCellBlock; k += n_keys) {
        Floats sum[n_rows][n_keys] = {};
        const float* q = queries;
        for (int64_t d = 0; d < n; d += 8, q += 8 * n_rows) {
            Floats x[n_keys];
#pragma GCC unroll 8
            for (int i = 0; i < n_keys; ++i) {
                x[i] = Simd::pin(Simd::load_halves(keys[k + i] + d));
            }
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; ++r) {
                const Floats y = Simd::pin(Simd::load(q + 8 * r));
#pragma GCC unroll 8
                for (int i = 0; i < n_keys; ++i) {
                    sum[r][i] = Simd::fma(y, x[i], sum[r][i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; ++r) {
            std::copy_n(sum[r], n_keys, all[r] + k);
        }
    }
    for (int r = 0; r < n_rows; ++r) {
        out[r] = Simd::sum_each(all[r]);
    }
}

} // namespace dspark::kernels
