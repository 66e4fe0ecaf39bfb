// Loops over long float arrays, written over kLanes independent lanes so that compilers vectorise them without
// -ffast-math. Owns: arithmetic only. Must not know: what the numbers mean. Threads: pure functions. Each result
// depends on its input alone (never on alignment or on neighbours), so equal rows give equal bits.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dspark {

inline constexpr size_t kLanes = 16;
inline constexpr size_t kSumBlock = 256; // elements summed in float before they go into a double

// Pairwise: no chain of kLanes dependent additions. Fixed trip counts keep the lanes in registers.
inline float sum_lanes(const float (&lanes)[kLanes]) {
    float quarter[kLanes / 4];
    for (size_t j = 0; j < kLanes / 4; ++j) {
        quarter[j] = (lanes[j] + lanes[j + 4]) + (lanes[j + 8] + lanes[j + 12]);
    }
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

inline float max_lanes(const float (&lanes)[kLanes]) {
    float largest[kLanes / 4];
    for (size_t j = 0; j < kLanes / 4; ++j) {
        const float even = lanes[j] > lanes[j + 8] ? lanes[j] : lanes[j + 8];
        const float odd = lanes[j + 4] > lanes[j + 12] ? lanes[j + 4] : lanes[j + 12];
        largest[j] = even > odd ? even : odd;
    }
    return std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
}

// False when x holds NaN or +inf.
inline bool is_below_infinity(const float* x, size_t n) {
    int32_t n_bad = 0;
    for (size_t i = 0; i < n; ++i) {
        n_bad |= x[i] < std::numeric_limits<float>::infinity() ? 0 : 1;
    }
    return n_bad == 0;
}

// The maxima of groups of kMaxGroup neighbours, the last one shorter. False when x holds NaN or +inf, or may: the sum
// of four logits is then one of these, or overflows.
inline constexpr size_t kMaxGroup = 4 * kLanes;
inline bool max_groups(const float* x, size_t n, float* maxima) {
    constexpr float kInf = std::numeric_limits<float>::infinity();
    int32_t n_bad[kLanes] = {};
    const size_t n_whole = n / kMaxGroup;
    for (size_t g = 0; g < n_whole; ++g, x += kMaxGroup) {
        float lanes[kLanes];
        for (size_t j = 0; j < kLanes; ++j) {
            const float a = x[j] > x[j + kLanes] ? x[j] : x[j + kLanes];
            const float b = x[j + 2 * kLanes] > x[j + 3 * kLanes] ? x[j + 2 * kLanes] : x[j + 3 * kLanes];
            lanes[j] = a > b ? a : b;
            n_bad[j] |= x[j] + x[j + kLanes] + x[j + 2 * kLanes] + x[j + 3 * kLanes] < kInf ? 0 : 1;
        }
        maxima[g] = max_lanes(lanes);
    }
    const size_t n_rest = n % kMaxGroup;
    if (n_rest > 0) {
        maxima[n_whole] = *std::max_element(x, x + n_rest);
    }
    return std::all_of(n_bad, n_bad + kLanes, [](int32_t bad) { return bad == 0; }) && is_below_infinity(x, n_rest);
}

// Bit i says whether x[i] >= threshold; n is at most kMaxGroup. Compilers do not find these instructions by themselves.
inline uint64_t mask_at_least(const float* x, size_t n, float threshold) {
    uint64_t bits = 0;
    size_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        const __m512 values = _mm512_loadu_ps(x + i);
        bits |= uint64_t{_mm512_cmp_ps_mask(values, _mm512_set1_ps(threshold), _CMP_GE_OQ)} << i;
    }
#elif defined(__SSE2__)
    for (; i + 4 <= n; i += 4) {
        const __m128 reached = _mm_cmpge_ps(_mm_loadu_ps(x + i), _mm_set1_ps(threshold));
        bits |= static_cast<uint64_t>(_mm_movemask_ps(reached)) << i;
    }
#endif
    for (; i < n; ++i) {
        bits |= uint64_t{x[i] >= threshold} << i;
    }
    return bits;
}

// Floats (no NaN) as integers of the same order, and back; -0 counts as less than 0.
inline int32_t flip_order(int32_t bits) { return bits ^ ((bits >> 31) & std::numeric_limits<int32_t>::max()); }

inline size_t count_at_least(std::span<const int32_t> keys, int32_t least) {
    int32_t n = 0;
    for (const int32_t key : keys) {
        n += key >= least ? 1 : 0;
    }
    return static_cast<size_t>(n);
}

// The k-th largest of x, k in 1 .. x.size(); no NaN. Halves the range that holds it: counting is one instruction for
// kLanes values, where partitioning mispredicts a branch for every other value.
inline float kth_largest(std::span<const float> x, size_t k, std::vector<int32_t>& keys) {
    keys.resize(x.size());
    int32_t low = std::numeric_limits<int32_t>::max();
    int32_t high = std::numeric_limits<int32_t>::min();
    for (size_t i = 0; i < x.size(); ++i) {
        keys[i] = flip_order(std::bit_cast<int32_t>(x[i]));
        low = keys[i] < low ? keys[i] : low;
        high = keys[i] > high ? keys[i] : high;
    }
    while (low < high) { // at least k keys reach low, fewer exceed high
        const auto width = static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
        const auto middle = static_cast<int32_t>(static_cast<uint32_t>(low) + width / 2 + width % 2);
        const size_t n = count_at_least(keys, middle);
        low = n >= k ? middle : low;
        high = n < k ? middle - 1 : high;
        if (n == k) { // the least of these
            for (const int32_t key : keys) {
                high = key >= middle && key < high ? key : high;
            }
            low = high;
        }
    }
    return std::bit_cast<float>(flip_order(low));
}

// exp for x <= 0 (no NaN), within 2e-7 relative; 0 below -87, where float exp would leave the normal range. Adding 1.5
// * 2^23 rounds to an integer and leaves it in the low mantissa bits, from where it is shifted into an exponent; the
// rest is Taylor's series on |r| <= ln(2) / 2, whose first dropped term is 5e-9. The range test compares bits (among
// negative floats the integer order is the reverse order), because a floating-point comparison could trap and so stops
// vectorisation.
inline float exp_nonpositive(float x) {
    constexpr float kRound = 12582912.0f;
    constexpr auto kLowest = std::bit_cast<int32_t>(-87.0f);
    const int32_t bits = std::bit_cast<int32_t>(x) | std::numeric_limits<int32_t>::min();
    const float clamped = std::bit_cast<float>(bits < kLowest ? bits : kLowest);
    const float shifted = clamped * 1.44269504f + kRound;
    const float n = shifted - kRound;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float poly = 1.0f / 5040.0f;
    poly = poly * r + 1.0f / 720.0f;
    poly = poly * r + 1.0f / 120.0f;
    poly = poly * r + 1.0f / 24.0f;
    poly = poly * r + 1.0f / 6.0f;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    const int32_t scale = (std::bit_cast<int32_t>(shifted) << 23) + (127 << 23);
    const int32_t keep = bits <= kLowest ? -1 : 0;
    return std::bit_cast<float>(std::bit_cast<int32_t>(poly * std::bit_cast<float>(scale)) & keep);
}

// IEEE half to float, exact for every finite value: the half's bits as a float are 2^112 too small, and multiplying
// puts subnormals right too. (Infinity and NaN become finite: weights hold none.)
inline float float_of_half(uint16_t half) {
    const auto bits = static_cast<uint32_t>(half);
    const float magnitude = std::bit_cast<float>((bits & 0x7FFFu) << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | (bits & 0x8000u) << 16);
}

inline void decode_f16(const void* source, float* out, int64_t n) {
    const auto* halves = static_cast<const uint16_t*>(source);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = float_of_half(halves[i]);
    }
}

inline double sum_block(const float* x, size_t n) {
    float lanes[kLanes] = {};
    const size_t whole = n - n % kLanes;
    for (size_t i = 0; i < whole; i += kLanes) {
        for (size_t j = 0; j < kLanes; ++j) {
            lanes[j] += x[i + j];
        }
    }
    for (size_t i = whole; i < n; ++i) {
        lanes[i - whole] += x[i];
    }
    return static_cast<double>(sum_lanes(lanes));
}

inline double sum_all(std::span<const float> x) {
    double total = 0.0;
    for (size_t begin = 0; begin < x.size(); begin += kSumBlock) {
        total += sum_block(x.data() + begin, std::min(kSumBlock, x.size() - begin));
    }
    return total;
}

inline void exp_all(std::span<const float> logits, float largest, float inverse_temperature,
                    std::vector<float>& weights) {
    weights.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) {
        weights[i] = exp_nonpositive((logits[i] - largest) * inverse_temperature);
    }
}

// (n,) . (n,)
inline float dot(const float* a, const float* b, size_t n) {
    float lanes[kLanes] = {};
    const size_t whole = n - n % kLanes;
    for (size_t i = 0; i < whole; i += kLanes) {
        for (size_t j = 0; j < kLanes; ++j) {
            lanes[j] += a[i + j] * b[i + j];
        }
    }
    for (size_t i = whole; i < n; ++i) {
        lanes[i - whole] += a[i] * b[i];
    }
    return sum_lanes(lanes);
}

// lanes[j] += halves[j] * x[j]. Compilers spell the conversion out, some six instructions for one.
inline void add_products_f16(const uint16_t* halves, const float* x, float (&lanes)[kLanes]) {
#if defined(__AVX512F__)
    const __m512 row = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)));
    _mm512_storeu_ps(lanes, _mm512_fmadd_ps(row, _mm512_loadu_ps(x), _mm512_loadu_ps(lanes)));
#elif defined(__F16C__) && defined(__FMA__)
    for (size_t j = 0; j < kLanes; j += 8) {
        const __m256 row = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + j)));
        _mm256_storeu_ps(lanes + j, _mm256_fmadd_ps(row, _mm256_loadu_ps(x + j), _mm256_loadu_ps(lanes + j)));
    }
#else
    for (size_t j = 0; j < kLanes; ++j) {
        lanes[j] += float_of_half(halves[j]) * x[j];
    }
#endif
}

// (n,) . (n,), the first in IEEE half: the same sum, to the bit, as decode_f16 and dot give.
inline float dot_f16(const void* source, const float* x, int64_t n) {
    const auto* halves = static_cast<const uint16_t*>(source);
    float lanes[kLanes] = {};
    const auto n_all = static_cast<size_t>(n);
    const size_t whole = n_all - n_all % kLanes;
    for (size_t i = 0; i < whole; i += kLanes) {
        add_products_f16(halves + i, x + i, lanes);
    }
    for (size_t i = whole; i < n_all; ++i) {
        lanes[i - whole] += float_of_half(halves[i]) * x[i];
    }
    return sum_lanes(lanes);
}

} // namespace dspark
