// One quantized matrix product three ways: our kernels, ggml's plain path, ggml's repacked weights. For the kernel
// benchmark and for tests; several copies of the matrix make the weights come from memory as in a model.
// Belongs to one thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace dspark {

enum class ProductPath { kernels, plain, repacked };

struct MatrixBenchOptions {
    std::string type_name; // as GGUF tools print it: q4_K, f16, ...
    int64_t n_outputs = 0;
    int64_t n_values = 0;
    int32_t n_matrices = 1;
    int32_t n_threads = 1;
};

class MatrixBench {
  public:
    // rows: n_outputs rows of that type, as they lie in a GGUF file. Throws std::invalid_argument.
    MatrixBench(const MatrixBenchOptions& options, std::span<const std::byte> rows);
    ~MatrixBench();
    MatrixBench(const MatrixBench&) = delete;
    MatrixBench& operator=(const MatrixBench&) = delete;

    [[nodiscard]] bool can_repack() const; // ggml has a repacked layout for this type and processor
    // x (n_columns, n_values). Computes every matrix's product, y (n_columns, n_outputs) of the last one; returns the
    // seconds it took.
    double multiply(ProductPath path, std::span<const float> x, std::vector<float>& y);

    struct Impl;

  private:
    std::unique_ptr<Impl> impl_;
};

// Rows of floats as blocks of a type, by ggml's own quantizer.
[[nodiscard]] std::vector<std::byte> quantize_rows(const std::string& type_name, std::span<const float> values,
                                                   int64_t n_values);

} // namespace dspark
