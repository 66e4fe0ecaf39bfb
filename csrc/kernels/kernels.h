// Y = W X for a few columns of X, weights as they lie in a GGUF file. Pure: knows neither ggml nor Python.
// Thread-safe: every thread of a product calls multiply() with its own `thread`; no locks, no barriers.
//
// Each element of Y is computed by the same sequence of operations whatever the number of columns, of threads or the
// place in the matrix: a column gives the same bits alone and in a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace dspark::kernels {

enum class WeightType { q8_0, q4_0, iq4_nl, q4_k, q5_k, q6_k, f16, bf16 };
inline constexpr int kWeightTypes = 8;

struct Product {
    WeightType type = WeightType::q8_0;
    int64_t n_outputs = 0; // rows of W
    int64_t n_values = 0;  // length of a row of W and of a column of X
    int64_t n_columns = 0;
    const void* weights = nullptr;
    size_t weight_stride = 0; // bytes from one row of W to the next
    const float* x = nullptr; // column c begins at x + c * x_stride
    int64_t x_stride = 0;
    float* y = nullptr; // element (o, c) is y[c * y_stride + o]
    int64_t y_stride = 0;
    int thread = 0;
    int n_threads = 1;
};

// Outputs [first, last) of the product: this thread's, for any types.
struct Outputs {
    int64_t first = 0;
    int64_t last = 0;
};
[[nodiscard]] Outputs outputs_of(const Product& product);

// Computes this thread's share of the product. False (nothing written): not covered on this machine; or more than 32
// columns of BF16, a prompt's, which ggml multiplies faster and rounds otherwise.
[[nodiscard]] bool multiply(const Product& product);

// X of several products, or of many threads, quantized once: every thread prepares its part of `prepared`, of
// prepared_size() numbers; when all of them have, they may multiply. For types that can_prepare() tells.
[[nodiscard]] bool can_prepare(WeightType type);
[[nodiscard]] bool have_same_columns(WeightType a, WeightType b); // may share what was prepared for either
[[nodiscard]] size_t prepared_size(const Product& product);
void prepare(const Product& product, int32_t* prepared);
void multiply_prepared(const Product& product, int32_t* prepared);

// One switch for the process, read by ggml's threads at every product: set it before a forward pass. Two engines that
// step at the same time under different settings get either one's kernels; both compute the same product.
void set_enabled(bool enabled);
[[nodiscard]] bool is_enabled();

// Products that share what they can (ggml_groups.h), the same bits as one by one; off for tests and measurements.
void set_groups_enabled(bool enabled);
[[nodiscard]] bool are_groups_enabled();

// How often ggml's attention ran in place of ours: its sums may depend on the number of threads.
[[nodiscard]] uint64_t n_foreign_attention();
void count_foreign_attention();

[[nodiscard]] bool covers(WeightType type);       // with the instruction set in use
[[nodiscard]] std::string_view instruction_set(); // in use: avx512, neon i8mm, ...; none: nothing is covered
[[nodiscard]] std::vector<std::string_view> instruction_sets(); // of this machine, the best first

// Another instruction set for the whole process, for tests and benchmarks: set it while no product runs. False: this
// machine has none of that name.
[[nodiscard]] bool set_instruction_set(std::string_view name);

} // namespace dspark::kernels
