// The kernels under the sanitizers: random blocks of every type in buffers that end with the last byte, odd shapes,
// unaligned rows; against a plain loop over the dequantized weights for Q8_0, and alone against in a batch for all.
// With every instruction set that the processor has, quantized weights giving the same bits in all of them.
#include "check.h"
#include "kernels/isa.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

using namespace dspark::kernels;

namespace {

struct Type {
    WeightType type;
    int64_t n_weights;
    size_t n_bytes;
    std::vector<size_t> halves; // offsets of f16 scales
};

const std::vector<Type>& types() {
    static const std::vector<Type> kTypes = {{WeightType::q8_0, 32, sizeof(BlockQ8_0), {0}},
                                             {WeightType::q4_0, 32, sizeof(BlockQ4_0), {0}},
                                             {WeightType::iq4_nl, 32, sizeof(BlockQ4_0), {0}},
                                             {WeightType::q4_k, 256, sizeof(BlockQ4_K), {0, 2}},
                                             {WeightType::q5_k, 256, sizeof(BlockQ5_K), {0, 2}},
                                             {WeightType::q6_k, 256, sizeof(BlockQ6_K), {208}},
                                             {WeightType::f16, 1, 2, {0}},
                                             {WeightType::bf16, 1, 2, {0}}};
    return kTypes;
}

struct Case {
    Product product;
    std::vector<uint8_t> weights;
    std::vector<float> x;
    std::vector<float> y;
};

struct Shape {
    int64_t n_outputs;
    int64_t n_columns;
    int64_t n_values;
};

Shape any_shape(const Type& type, std::mt19937& random) {
    const auto up_to = [&](unsigned n) { return static_cast<int64_t>(1 + random() % n); };
    const int64_t n_outputs = up_to(40), n_columns = up_to(20);
    return {n_outputs, n_columns, type.n_weights * up_to(type.n_weights == 1 ? 300 : 12)};
}

Case make_case(const Type& type, const Shape& shape, std::mt19937& random) {
    Case made;
    Product& p = made.product;
    p.type = type.type;
    p.n_outputs = shape.n_outputs;
    p.n_columns = shape.n_columns;
    p.n_values = shape.n_values;
    const size_t n_blocks = static_cast<size_t>(p.n_values / type.n_weights);
    p.weight_stride = n_blocks * type.n_bytes + random() % 3; // rows at odd addresses
    made.weights.resize(p.weight_stride * static_cast<size_t>(p.n_outputs - 1) + n_blocks * type.n_bytes);
    for (uint8_t& byte : made.weights) {
        byte = static_cast<uint8_t>(random());
    }
    for (size_t row = 0; row < static_cast<size_t>(p.n_outputs); ++row) {
        for (size_t b = 0; b < n_blocks; ++b) {
            for (const size_t offset : type.halves) { // a finite f16
                made.weights[row * p.weight_stride + b * type.n_bytes + offset + 1] &= 0xbf;
            }
        }
    }
    std::normal_distribution<float> normal;
    made.x.resize(static_cast<size_t>(p.n_values * p.n_columns));
    for (float& value : made.x) {
        value = normal(random);
    }
    made.y.assign(static_cast<size_t>(p.n_outputs * p.n_columns), NAN);
    p.weights = made.weights.data();
    p.x = made.x.data();
    p.x_stride = p.n_values;
    p.y = made.y.data();
    p.y_stride = p.n_outputs;
    return made;
}

void run(const Isa& isa, const Product& product, int n_threads) {
    for (int thread = 0; thread < n_threads; ++thread) {
        Product share = product;
        share.thread = thread;
        share.n_threads = n_threads;
        CHECK(multiply_with(isa, share));
    }
}

bool is_float(WeightType type) { return type == WeightType::f16 || type == WeightType::bf16; }

// In a batch as with another instruction set, where weights are integers; the last column as by itself.
void check_bits(const Isa& isa, const Type& type, Case& made, int n_threads) {
    if (!is_float(type.type)) {
        run(*available_isas().back(), made.product, 1);
    }
    const std::vector<float> other = made.y;
    run(isa, made.product, n_threads);
    const std::vector<float> batch = made.y;
    CHECK(is_float(type.type) || std::memcmp(batch.data(), other.data(), batch.size() * sizeof(float)) == 0);
    Product alone = made.product;
    const int64_t column = made.product.n_columns - 1;
    alone.x += column * alone.x_stride;
    alone.y += column * alone.y_stride;
    alone.n_columns = 1;
    std::fill_n(alone.y, alone.n_outputs, NAN);
    run(isa, alone, 1);
    CHECK(std::memcmp(batch.data(), made.y.data(), batch.size() * sizeof(float)) == 0);
    for (const float value : batch) {
        CHECK(std::isfinite(value));
    }
}

bool is_covered(const Isa& isa, const Type& type) { return !is_float(type.type) || isa.multiply_floats != nullptr; }

void test_any_shape(const Isa& isa) {
    std::mt19937 random(1);
    for (const Type& type : types()) {
        for (int i = 0; i < 200 && is_covered(isa, type); ++i) {
            Case made = make_case(type, any_shape(type, random), random);
            check_bits(isa, type, made, 1 + static_cast<int>(random() % 8));
        }
    }
}

// Whole steps of 256 values, up to more than one column by itself keeps the sums of.
void test_long_rows(const Isa& isa) {
    std::mt19937 random(2);
    for (const Type& type : types()) {
        for (const int64_t n_values : {256, 4096, 4352, 8448, 16640}) {
            for (const int64_t n_outputs : {16, 37, 48}) {
                if (is_covered(isa, type)) {
                    Case made = make_case(type, {n_outputs, 2, n_values}, random);
                    check_bits(isa, type, made, 1 + static_cast<int>(random() % 3));
                }
            }
        }
    }
}

// Weights k % 7 - 3 times 2^-3, columns of whole numbers that quantize without error: the product is exact.
void test_q8_0_against_a_plain_loop(const Isa& isa) {
    constexpr int64_t kValues = 96, kOutputs = 11, kColumns = 3;
    std::vector<BlockQ8_0> weights(kOutputs * kValues / 32);
    for (size_t b = 0; b < weights.size(); ++b) {
        weights[b].d = 0x3000; // 2^-3
        for (int i = 0; i < 32; ++i) {
            weights[b].qs[i] = static_cast<int8_t>((b * 32 + static_cast<size_t>(i)) % 7) - 3;
        }
    }
    std::vector<float> x(kValues * kColumns), y(kOutputs * kColumns);
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = i % 32 == 0 ? 127.0F : static_cast<float>(i % 11) - 5.0F; // scale 1 in every block
    }
    Product p;
    p.n_outputs = kOutputs;
    p.n_values = kValues;
    p.n_columns = kColumns;
    p.weights = weights.data();
    p.weight_stride = kValues / 32 * sizeof(BlockQ8_0);
    p.x = x.data();
    p.x_stride = kValues;
    p.y = y.data();
    p.y_stride = kOutputs;
    run(isa, p, 2);
    for (int64_t c = 0; c < kColumns; ++c) {
        for (int64_t o = 0; o < kOutputs; ++o) {
            double expected = 0.0;
            for (int64_t k = 0; k < kValues; ++k) {
                const auto at = static_cast<size_t>(o * kValues + k);
                expected +=
                    0.125 * weights[at / 32].qs[at % 32] * static_cast<double>(x[static_cast<size_t>(c * kValues + k)]);
            }
            CHECK(static_cast<double>(y[static_cast<size_t>(c * kOutputs + o)]) == expected);
        }
    }
}

void test_what_is_not_covered_is_refused(const Isa& isa) {
    Product p;
    p.type = WeightType::q4_k;
    p.n_outputs = 8;
    p.n_values = 32; // not a whole block
    p.n_columns = 1;
    CHECK(!multiply_with(isa, p));
}

} // namespace

int main() {
    for (const Isa* isa : available_isas()) {
        CHECK(set_instruction_set(isa->name) && instruction_set() == isa->name);
        test_any_shape(*isa);
        test_long_rows(*isa);
        test_q8_0_against_a_plain_loop(*isa);
        test_what_is_not_covered_is_refused(*isa);
    }
    CHECK(!set_instruction_set("mmx"));
    return check_summary();
}
