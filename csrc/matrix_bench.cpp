#include "matrix_bench.h"

#include "kernels/kernels.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <chrono>
#include <stdexcept>

namespace dspark {
namespace {

struct Free {
    void operator()(ggml_context* context) const { ggml_free(context); }
    void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
    void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
};
using ContextPtr = std::unique_ptr<ggml_context, Free>;
using BufferPtr = std::unique_ptr<ggml_backend_buffer, Free>;
using BackendPtr = std::unique_ptr<ggml_backend, Free>;

ggml_type parse_type(const std::string& name) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        if (ggml_blck_size(type) > 0 && name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::invalid_argument("type must be the name of a ggml type, got " + name);
}

ContextPtr make_context(size_t n_tensors) {
    const size_t n_bytes = n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors + 8, false);
    return ContextPtr(ggml_init({n_bytes, nullptr, true}));
}

// One copy of the matrices in one kind of memory.
struct Weights {
    ContextPtr context;
    BufferPtr buffer;
    std::vector<ggml_tensor*> matrices;

    Weights(const MatrixBenchOptions& options, ggml_type type, std::span<const std::byte> rows,
            ggml_backend_buffer_type_t memory)
        : context(make_context(static_cast<size_t>(options.n_matrices))) {
        for (int32_t i = 0; i < options.n_matrices; ++i) {
            matrices.push_back(ggml_new_tensor_2d(context.get(), type, options.n_values, options.n_outputs));
        }
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), memory));
        if (buffer == nullptr) {
            throw std::runtime_error("cannot allocate the matrices: out of memory");
        }
        for (ggml_tensor* matrix : matrices) {
            ggml_backend_tensor_set(matrix, rows.data(), 0, rows.size());
        }
    }
};

bool supports(ggml_backend_dev_t device, ggml_backend_buffer_type_t memory, ggml_type type,
              const MatrixBenchOptions& options) {
    const ContextPtr context = make_context(4);
    ggml_tensor* weights = ggml_new_tensor_2d(context.get(), type, options.n_values, options.n_outputs);
    ggml_tensor* x = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, options.n_values, 8);
    ggml_tensor* y = ggml_mul_mat(context.get(), weights, x);
    const BufferPtr nothing(ggml_backend_buft_alloc_buffer(memory, 0));
    weights->buffer = nothing.get();
    return ggml_backend_dev_supports_op(device, y);
}

// The memory whose weights ggml repacks, if it does so for this type; nullptr otherwise.
ggml_backend_buffer_type_t find_repacking(ggml_backend_t backend, ggml_type type, const MatrixBenchOptions& options) {
    ggml_backend_dev_t device = ggml_backend_get_device(backend);
    auto* get = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    ggml_backend_buffer_type_t* memory = get == nullptr ? nullptr : get(device);
    for (; memory != nullptr && *memory != nullptr; ++memory) {
        if (supports(device, *memory, type, options)) {
            return *memory;
        }
    }
    return nullptr;
}

} // namespace

struct MatrixBench::Impl {
    MatrixBenchOptions options;
    BackendPtr backend{ggml_backend_cpu_init()};
    std::unique_ptr<Weights> plain;
    std::unique_ptr<Weights> repacked;
};

MatrixBench::MatrixBench(const MatrixBenchOptions& options, std::span<const std::byte> rows)
    : impl_(std::make_unique<Impl>()) {
    const ggml_type type = parse_type(options.type_name);
    if (options.n_outputs < 1 || options.n_matrices < 1 || options.n_values < 1 ||
        options.n_values % ggml_blck_size(type) != 0) {
        throw std::invalid_argument("n_values must be a multiple of the block of " + options.type_name + ", " +
                                    std::to_string(ggml_blck_size(type)) + ", got " + std::to_string(options.n_values));
    }
    if (options.n_threads < 1 || options.n_threads > 512) {
        throw std::invalid_argument("n_threads must be in 1 .. 512, got " + std::to_string(options.n_threads));
    }
    const size_t n_bytes = ggml_row_size(type, options.n_values) * static_cast<size_t>(options.n_outputs);
    if (rows.size() != n_bytes) {
        throw std::invalid_argument("rows must have " + std::to_string(n_bytes) + " bytes, got " +
                                    std::to_string(rows.size()));
    }
    impl_->options = options;
    ggml_backend_cpu_set_n_threads(impl_->backend.get(), options.n_threads);
    impl_->plain = std::make_unique<Weights>(options, type, rows, ggml_backend_cpu_buffer_type());
    if (ggml_backend_buffer_type_t memory = find_repacking(impl_->backend.get(), type, options)) {
        impl_->repacked = std::make_unique<Weights>(options, type, rows, memory);
    }
}

MatrixBench::~MatrixBench() = default;

bool MatrixBench::can_repack() const { return impl_->repacked != nullptr; }

double MatrixBench::multiply(ProductPath path, std::span<const float> x, std::vector<float>& y) {
    const auto n_values = static_cast<size_t>(impl_->options.n_values);
    if (x.empty() || x.size() % n_values != 0) {
        throw std::invalid_argument("x must hold columns of " + std::to_string(n_values) + " values, got " +
                                    std::to_string(x.size()));
    }
    if (path == ProductPath::repacked && !can_repack()) {
        throw std::invalid_argument("path must be one that ggml has for " + impl_->options.type_name +
                                    " on this processor, got repacked");
    }
    const Weights& weights = path == ProductPath::repacked ? *impl_->repacked : *impl_->plain;
    const ContextPtr context = make_context(weights.matrices.size() + 2);
    ggml_cgraph* graph = ggml_new_graph_custom(context.get(), weights.matrices.size() + 8, false);
    const auto n_columns = static_cast<int64_t>(x.size() / n_values);
    ggml_tensor* input = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, impl_->options.n_values, n_columns);
    ggml_tensor* last = nullptr;
    for (ggml_tensor* matrix : weights.matrices) {
        last = ggml_mul_mat(context.get(), matrix, input);
        ggml_build_forward_expand(graph, last);
    }
    const BufferPtr buffer(ggml_backend_alloc_ctx_tensors_from_buft(context.get(), ggml_backend_cpu_buffer_type()));
    ggml_backend_tensor_set(input, x.data(), 0, x.size_bytes());
    kernels::set_enabled(path == ProductPath::kernels);
    kernels::set_groups_enabled(false); // every product by itself, as ggml computes it
    const auto begin = std::chrono::steady_clock::now();
    const ggml_status status = ggml_backend_graph_compute(impl_->backend.get(), graph);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    kernels::set_enabled(true);
    kernels::set_groups_enabled(true);
    if (status != GGML_STATUS_SUCCESS) {
        throw std::runtime_error("cannot compute the products: status " + std::to_string(status));
    }
    y.resize(static_cast<size_t>(ggml_nelements(last)));
    ggml_backend_tensor_get(last, y.data(), 0, y.size() * sizeof(float));
    return seconds.count();
}

std::vector<std::byte> quantize_rows(const std::string& type_name, std::span<const float> values, int64_t n_values) {
    const ggml_type type = parse_type(type_name);
    if (n_values < 1 || n_values % ggml_blck_size(type) != 0 || values.size() % static_cast<size_t>(n_values) != 0) {
        throw std::invalid_argument("n_values must be a multiple of the block of " + type_name + ", " +
                                    std::to_string(ggml_blck_size(type)) + ", got " + std::to_string(n_values));
    }
    const auto n_rows = static_cast<int64_t>(values.size()) / n_values;
    std::vector<std::byte> rows(ggml_row_size(type, n_values) * static_cast<size_t>(n_rows));
    ggml_quantize_chunk(type, values.data(), rows.data(), 0, n_rows, n_values, nullptr);
    return rows;
}

} // namespace dspark
