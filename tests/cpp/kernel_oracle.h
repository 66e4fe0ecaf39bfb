// Cases for the kernels and what they must give, in float64, by plain loops over the definitions of the formats. Shares
// nothing with the kernels but the declared blocks.
#pragma once

#include "kernels/blocks.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace oracle {

using namespace dspark::kernels;

struct Format {
    WeightType type;
    int64_t n_weights;
    size_t n_bytes;
    std::vector<size_t> halves; // offsets of f16 scales
};

inline const std::vector<Format>& formats() {
    static const std::vector<Format> kFormats = {
        {WeightType::q8_0, 32, sizeof(BlockQ8_0), {0}},     {WeightType::q4_0, 32, sizeof(BlockQ4_0), {0}},
        {WeightType::iq4_nl, 32, sizeof(BlockQ4_0), {0}},   {WeightType::q4_k, 256, sizeof(BlockQ4_K), {0, 2}},
        {WeightType::q5_k, 256, sizeof(BlockQ5_K), {0, 2}}, {WeightType::q6_k, 256, sizeof(BlockQ6_K), {208}}};
    return kFormats;
}

// Whole numbers only (SplitMix64): the same cases on every processor and library.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t next() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15U;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
    // A sum of four uniform numbers: nearly normal, variance 1/3, exact in float.
    float value() {
        int64_t sum = 0;
        for (int i = 0; i < 4; ++i) {
            sum += below(1 << 20) - (1 << 19);
        }
        return static_cast<float>(sum) / static_cast<float>(1 << 20);
    }

  private:
    uint64_t state_;
};

struct Shape {
    int64_t n_outputs;
    int64_t n_columns;
    int64_t n_blocks;
};

struct Case {
    Product product;
    Format format;
    std::vector<uint8_t> weights;
    std::vector<float> x;
};

inline uint8_t* block(Case& made, int64_t row, int64_t b) {
    return made.weights.data() + static_cast<size_t>(row) * made.product.weight_stride +
           static_cast<size_t>(b) * made.format.n_bytes;
}

inline int64_t n_blocks(const Case& made) { return made.product.n_values / made.format.n_weights; }

inline void set_half(Case& made, int64_t row, int64_t b, size_t offset, uint16_t half) {
    std::memcpy(block(made, row, b) + offset, &half, sizeof(half));
}

inline void set_halves(Case& made, uint16_t half) {
    for (int64_t row = 0; row < made.product.n_outputs; ++row) {
        for (int64_t b = 0; b < n_blocks(made); ++b) {
            for (const size_t offset : made.format.halves) {
                set_half(made, row, b, offset, half);
            }
        }
    }
}

inline void fill_blocks(Case& made, uint8_t fill, uint16_t half) {
    std::fill(made.weights.begin(), made.weights.end(), fill);
    set_halves(made, half);
}

// Any bytes; scales of any finite half below 2 in magnitude. Rows begin at odd addresses.
inline Case random_case(const Format& format, Shape shape, Random& random) {
    Case made;
    made.format = format;
    Product& p = made.product;
    p.type = format.type;
    p.n_outputs = shape.n_outputs;
    p.n_columns = shape.n_columns;
    p.n_values = p.x_stride = format.n_weights * shape.n_blocks;
    p.y_stride = shape.n_outputs;
    p.weight_stride = static_cast<size_t>(shape.n_blocks) * format.n_bytes + static_cast<size_t>(random.below(3));
    made.weights.resize(p.weight_stride * static_cast<size_t>(p.n_outputs - 1) +
                        static_cast<size_t>(shape.n_blocks) * format.n_bytes);
    for (uint8_t& byte : made.weights) {
        byte = static_cast<uint8_t>(random.next());
    }
    for (int64_t row = 0; row < p.n_outputs; ++row) {
        for (int64_t b = 0; b < shape.n_blocks; ++b) {
            for (const size_t offset : format.halves) {
                set_half(made, row, b, offset, static_cast<uint16_t>(random.next() & 0xbfff));
            }
        }
    }
    made.x.resize(static_cast<size_t>(p.n_values * p.n_columns));
    for (float& value : made.x) {
        value = random.value();
    }
    p.weights = made.weights.data();
    p.x = made.x.data();
    return made;
}

inline double half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    return (bits & 0x8000) != 0 ? -size : size;
}

// The f16 nearest to a value that is not negative, ties to even (the rounding mode of nearbyint).
inline double round_to_half(double value) {
    if (value == 0.0 || !std::isfinite(value)) {
        return value;
    }
    const int step = std::max(std::ilogb(value), -14) - 10;
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -step)), step);
    return rounded > 65504.0 ? INFINITY : rounded;
}

// Scale and min of sub-block s (of 32 weights) of Q4_K and Q5_K.
inline void six_bit_scale(const uint8_t* packed, int s, int& scale, int& min) {
    if (s < 4) {
        scale = packed[s] & 63;
        min = packed[s + 4] & 63;
    } else {
        scale = (packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4;
        min = packed[s + 4] >> 4 | (packed[s] >> 6) << 4;
    }
}

// What a block multiplies: weight = d * scale * q - dmin * min.
struct Weight {
    double scaled; // d * scale * q
    double offset; // dmin * min
};

inline Weight weight_4_or_5(const uint8_t* bytes, int i, bool has_fifth_bit) {
    uint16_t d, dmin;
    std::memcpy(&d, bytes, 2);
    std::memcpy(&dmin, bytes + 2, 2);
    int scale = 0, min = 0;
    six_bit_scale(bytes + 4, i / 32, scale, min);
    const uint8_t* nibbles = bytes + (has_fifth_bit ? 48 : 16);
    int q = nibbles[i / 64 * 32 + i % 32] >> (i % 64 >= 32 ? 4 : 0) & 15;
    if (has_fifth_bit) {
        q += (bytes[16 + i % 32] >> (i / 32) & 1) << 4;
    }
    return {half_value(d) * scale * q, half_value(dmin) * min};
}

inline Weight weight_6(const uint8_t* bytes, int i) {
    uint16_t d;
    std::memcpy(&d, bytes + 208, 2);
    const int half = i / 128, j = i % 128;
    const int low = bytes[64 * half + j % 64] >> (j >= 64 ? 4 : 0) & 15;
    const int high = bytes[128 + 32 * half + j % 32] >> (2 * (j / 32)) & 3;
    const int scale = static_cast<int8_t>(bytes[192 + i / 16]);
    return {half_value(d) * scale * (low + 16 * high - 32), 0.0};
}

inline Weight weight_32(WeightType type, const uint8_t* bytes, int i) {
    static constexpr int kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    uint16_t d;
    std::memcpy(&d, bytes, 2);
    if (type == WeightType::q8_0) {
        return {half_value(d) * static_cast<int8_t>(bytes[2 + i]), 0.0};
    }
    const int nibble = bytes[2 + i % 16] >> (i >= 16 ? 4 : 0) & 15;
    return {half_value(d) * (type == WeightType::q4_0 ? nibble - 8 : kTable[nibble]), 0.0};
}

inline Weight weight(WeightType type, const uint8_t* bytes, int i) {
    switch (type) {
    case WeightType::q4_k:
        return weight_4_or_5(bytes, i, false);
    case WeightType::q5_k:
        return weight_4_or_5(bytes, i, true);
    case WeightType::q6_k:
        return weight_6(bytes, i);
    default:
        return weight_32(type, bytes, i);
    }
}

// A block of a column as ggml quantizes it for the type: 8 bits and one scale.
struct QuantizedBlock {
    std::vector<int> q;
    double scale;
};

inline QuantizedBlock quantize(const float* x, int64_t n_values) {
    QuantizedBlock out{std::vector<int>(static_cast<size_t>(n_values)), 0.0};
    float largest = 0.0F;
    for (int64_t i = 0; i < n_values; ++i) {
        largest = std::abs(x[i]) > std::abs(largest) ? x[i] : largest;
    }
    if (largest == 0.0F) {
        return out;
    }
    const bool is_super = n_values == kSuperBlockSize;
    const float inverse = is_super ? -127.0F / largest : 127.0F / std::abs(largest);
    for (int64_t i = 0; i < n_values; ++i) {
        out.q[static_cast<size_t>(i)] = static_cast<int>(std::nearbyint(static_cast<double>(x[i] * inverse)));
    }
    out.scale =
        is_super ? static_cast<double>(1.0F / inverse) : round_to_half(static_cast<double>(std::abs(largest) / 127.0F));
    return out;
}

struct Element {
    double exact = 0.0;              // weights times values
    double quantized = 0.0;          // weights times quantized values
    double rounding_bound = 0.0;     // how far float sums of exact block products may be from `quantized`
    double quantization_bound = 0.0; // how far `quantized` may be from `exact`
};

// Rounding: a block takes at most 4 roundings of 2^-24 (product of the scales, conversion of the integer, sum; twice
// with mins), each relative to at most the sum of the parts' magnitudes. The constant: products of scales that are
// denormal lose an absolute 2^-150 times an integer below 2^27.
// Quantization: half a step of the column's scale, and what rounding that scale to a half (2^-11 of 127 steps) adds;
// a scale among the half denormals (below 2^-14) loses an absolute 2^-25 of 127 steps.
inline Element element(const Case& made, int64_t output, int64_t column) {
    Element out;
    double magnitude = 0.0;
    const int64_t n = made.format.n_weights;
    for (int64_t b = 0; b < n_blocks(made); ++b) {
        const float* x = made.x.data() + column * made.product.x_stride + b * n;
        const QuantizedBlock values = quantize(x, n);
        const uint8_t* bytes = block(const_cast<Case&>(made), output, b);
        double scaled = 0.0, offset = 0.0, sum_of_weights = 0.0;
        for (int i = 0; i < n; ++i) {
            const Weight w = weight(made.product.type, bytes, i);
            scaled += w.scaled * values.q[static_cast<size_t>(i)];
            offset += w.offset * values.q[static_cast<size_t>(i)];
            sum_of_weights += std::abs(w.scaled - w.offset);
            out.exact += (w.scaled - w.offset) * static_cast<double>(x[i]);
        }
        out.quantized += values.scale * (scaled - offset);
        magnitude += std::abs(values.scale) * (std::abs(scaled) + std::abs(offset));
        out.quantization_bound += (0.57 * std::abs(values.scale) + 127 * 3e-8) * sum_of_weights;
    }
    out.rounding_bound = (4.0 * static_cast<double>(n_blocks(made)) + 4.0) * 0x1p-24 * magnitude + 1e-36;
    return out;
}

} // namespace oracle
