// Every instruction set this processor has, against float64 products of weights dequantized and columns quantized by
// plain loops that follow the formats' definitions; the instruction sets among each other to the bit. Runs under an
// emulator too. An argument names the instruction set that must have been chosen ("none": ggml's path).
//
// Prints a digest of all products: the same on x86 and ARM, since values, order and roundings are the same.
#include "check.h"
#include "kernel_oracle.h"
#include "kernels/isa.h"

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

using namespace dspark::kernels;

namespace {

uint64_t digest = 1469598103934665603U; // FNV-1a

void add_to_digest(const std::vector<float>& values) {
    for (const float value : values) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        digest = (digest ^ bits) * 1099511628211U;
    }
}

std::vector<float> run(const Isa& isa, const oracle::Case& made, int n_threads) {
    std::vector<float> y(static_cast<size_t>(made.product.n_outputs * made.product.n_columns), 1e30F);
    for (int thread = 0; thread < n_threads; ++thread) {
        Product share = made.product;
        share.y = y.data();
        share.thread = thread;
        share.n_threads = n_threads;
        CHECK(multiply_with(isa, share));
    }
    return y;
}

std::vector<float> run_column_alone(const Isa& isa, const oracle::Case& made, int64_t column) {
    oracle::Case alone = made;
    alone.product.weights = alone.weights.data();
    alone.product.x = made.x.data() + column * made.product.x_stride;
    alone.product.n_columns = 1;
    return run(isa, alone, 1);
}

void check_against_oracle(const oracle::Case& made, const std::vector<float>& y) {
    bool is_close = true;
    for (int64_t c = 0; c < made.product.n_columns; ++c) {
        for (int64_t o = 0; o < made.product.n_outputs; ++o) {
            const oracle::Element expected = oracle::element(made, o, c);
            const double value = static_cast<double>(y[static_cast<size_t>(c * made.product.n_outputs + o)]);
            is_close = is_close && std::abs(value - expected.quantized) <= expected.rounding_bound &&
                       std::abs(value - expected.exact) <= expected.quantization_bound + expected.rounding_bound;
        }
    }
    CHECK(is_close);
}

void check_case(const oracle::Case& made, unsigned variant) {
    std::vector<float> first;
    for (const Isa* isa : available_isas()) {
        const std::vector<float> y = run(*isa, made, 1 + static_cast<int>(variant % 8));
        CHECK(first.empty() || std::memcmp(first.data(), y.data(), y.size() * sizeof(float)) == 0);
        const int64_t column = variant % made.product.n_columns;
        const std::vector<float> alone = run_column_alone(*isa, made, column);
        CHECK(std::memcmp(alone.data(), y.data() + column * made.product.n_outputs, alone.size() * sizeof(float)) == 0);
        first = y;
    }
    check_against_oracle(made, first);
    add_to_digest(first);
}

void test_random_shapes_and_blocks() {
    for (const oracle::Format& format : oracle::formats()) {
        oracle::Random random(1);
        for (unsigned i = 0; i < 40; ++i) {
            const oracle::Shape shape{1 + random.below(40), 1 + random.below(20), 1 + random.below(12)};
            check_case(oracle::random_case(format, shape, random), i);
        }
    }
}

void test_every_number_of_columns() {
    for (const oracle::Format& format : oracle::formats()) {
        oracle::Random random(2);
        for (const int64_t n_columns : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 128, 129}) {
            check_case(oracle::random_case(format, {17, n_columns, 3}, random), static_cast<unsigned>(n_columns) * 5);
        }
    }
}

// Every byte of the blocks alike and every value of the columns at the end of its range: the largest sums there are.
void test_saturating_blocks() {
    for (const oracle::Format& format : oracle::formats()) {
        for (const uint8_t fill : std::initializer_list<uint8_t>{0x00, 0x7f, 0x80, 0xff}) {
            oracle::Random random(3);
            oracle::Case made = oracle::random_case(format, {9, 6, 8}, random);
            oracle::fill_blocks(made, fill, 0x3c00); // scales of 1
            for (size_t i = 0; i < made.x.size(); ++i) {
                made.x[i] = i < static_cast<size_t>(made.product.n_values) || random.below(2) == 0 ? 1.0F : -1.0F;
            }
            check_case(made, fill);
        }
    }
}

void test_denormal_and_largest_scales() {
    for (const oracle::Format& format : oracle::formats()) {
        for (const uint16_t half : std::initializer_list<uint16_t>{0x0001, 0x8001, 0x03ff, 0x7bff}) {
            oracle::Random random(4);
            oracle::Case made = oracle::random_case(format, {9, 5, 4}, random);
            oracle::set_halves(made, half);
            check_case(made, half);
        }
    }
}

void test_outliers_zeros_and_tiny_columns() {
    for (const oracle::Format& format : oracle::formats()) {
        oracle::Random random(5);
        oracle::Case made = oracle::random_case(format, {11, 4, 6}, random);
        const auto n = static_cast<size_t>(made.product.n_values);
        made.x[3] = 1e4F;
        std::fill_n(made.x.begin() + static_cast<std::ptrdiff_t>(n), n, 0.0F);
        for (size_t i = 2 * n; i < 3 * n; ++i) {
            made.x[i] *= 1e-30F;
        }
        check_case(made, 6);
    }
}

// What is not a number stays in its column.
void test_nan_spoils_its_column_alone() {
    for (const oracle::Format& format : oracle::formats()) {
        oracle::Random random(6);
        oracle::Case made = oracle::random_case(format, {8, 3, 2}, random);
        const auto n = static_cast<size_t>(made.product.n_values);
        made.x[n + 5] = std::nanf("");
        for (const Isa* isa : available_isas()) {
            const std::vector<float> y = run(*isa, made, 1);
            for (size_t o = 0; o < 8; ++o) {
                CHECK(std::isfinite(y[o]) && std::isnan(y[8 + o]) && std::isfinite(y[16 + o]));
            }
        }
    }
}

void test_covers_only_what_runs() {
    CHECK(covers(WeightType::q8_0) == !available_isas().empty());
    const bool has_floats = instruction_set() != "none" && !instruction_set().starts_with("neon"); // not on ARM yet
    CHECK(covers(WeightType::f16) == has_floats && covers(WeightType::bf16) == has_floats);
    if (available_isas().empty()) {
        oracle::Random random(7);
        CHECK(!multiply(oracle::random_case(oracle::formats()[0], {8, 1, 1}, random).product));
        CHECK(instruction_set() == "none");
    }
}

} // namespace

int main(int argc, char** argv) {
    std::printf("chosen: %s; compared:", std::string(instruction_set()).c_str());
    for (const Isa* isa : available_isas()) {
        std::printf(" [%s]", std::string(isa->name).c_str());
    }
    std::printf("\n");
    CHECK(argc < 2 || instruction_set() == argv[1]);
    test_covers_only_what_runs();
    if (!available_isas().empty()) {
        test_random_shapes_and_blocks();
        test_every_number_of_columns();
        test_saturating_blocks();
        test_denormal_and_largest_scales();
        test_outliers_zeros_and_tiny_columns();
        test_nan_spoils_its_column_alone();
        std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
    }
    return check_summary();
}
