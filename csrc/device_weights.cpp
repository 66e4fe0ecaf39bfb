// Implements device_weights.h.
#include "device_weights.h"

#include "block_graph.h"
#include "errors.h"
#include "transition_model.h"
#include "vector_loops.h"

#include "ggml-alloc.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace dspark {
namespace {

constexpr int64_t kRowsPerUpload = 4096;
constexpr uintptr_t kBufferAlignment = 64; // more than ggml asks of memory it has not allocated

[[noreturn]] void throw_value(const std::string& name, const std::string& rule, const std::string& value) {
    throw std::invalid_argument(name + " must " + rule + ", got " + value);
}

// ---- tables ----

// The type a table is stored in, told by its decoder; f32 where nobody knows it, since decoding is always possible.
ggml_type stored_type(const RowTable& table) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        const ggml_type_traits* traits = ggml_get_type_traits(type);
        const bool is_decoder =
            traits->to_float == table.decode_row || (type == GGML_TYPE_F16 && table.decode_row == decode_f16);
        if (traits->to_float != nullptr && is_decoder && table.n_cols % traits->blck_size == 0 &&
            ggml_row_size(type, table.n_cols) == table.row_bytes) {
            return type;
        }
    }
    return GGML_TYPE_F32;
}

void copy_f32(const void* source, float* destination, int64_t n) {
    std::memcpy(destination, source, static_cast<size_t>(n) * sizeof(float));
}

// One row in f32 or f16, whatever it is stored in.
void convert_row(const RowTable& table, int64_t row, ggml_type type, std::vector<float>& values, std::byte* out) {
    table.decode(row, values.data());
    if (type == GGML_TYPE_F16) {
        ggml_fp32_to_fp16_row(values.data(), reinterpret_cast<ggml_fp16_t*>(out), table.n_cols);
    } else {
        std::memcpy(out, values.data(), values.size() * sizeof(float));
    }
}

// Rows of `table` in `order`, then zeros up to the tensor's height.
void upload_rows(ggml_tensor* tensor, const RowTable& table, std::span<const int64_t> order) {
    if (tensor->data == table.data) {
        return; // lent
    }
    const size_t row_bytes = ggml_row_size(tensor->type, table.n_cols);
    const bool is_as_stored = tensor->type == stored_type(table) && tensor->type != GGML_TYPE_F32;
    std::vector<float> values(static_cast<size_t>(table.n_cols));
    std::vector<std::byte> staged;
    const int64_t n_given = std::ssize(order);
    for (int64_t begin = 0; begin < tensor->ne[1]; begin += kRowsPerUpload) {
        const int64_t n = std::min(kRowsPerUpload, tensor->ne[1] - begin);
        staged.assign(static_cast<size_t>(n) * row_bytes, std::byte{0});
        for (int64_t i = 0; i < std::min(n, n_given - begin); ++i) {
            const int64_t row = order[static_cast<size_t>(begin + i)];
            std::byte* out = staged.data() + static_cast<size_t>(i) * row_bytes;
            if (is_as_stored) {
                std::memcpy(out, table.data + static_cast<size_t>(row) * table.row_bytes, row_bytes);
            } else {
                convert_row(table, row, tensor->type, values, out);
            }
        }
        ggml_backend_tensor_set(tensor, staged.data(), static_cast<size_t>(begin) * row_bytes, staged.size());
    }
}

std::vector<float> columns(const Dense& matrix, size_t begin, size_t n) {
    std::vector<float> out;
    for (size_t row = 0; row < matrix.n_rows; ++row) {
        out.insert(out.end(), matrix.row(row) + begin, matrix.row(row) + begin + n);
    }
    return out;
}

// n, n - 1, ..., 1: makes the first of several equal entries the largest.
std::vector<float> descending(int64_t n) {
    std::vector<float> out(static_cast<size_t>(n));
    std::generate(out.begin(), out.end(), [&n] { return static_cast<float>(n--); });
    return out;
}

// ---- devices ----

ggml_backend_dev_t find_device(const std::string& name) {
    if (name.empty()) {
        return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    }
    std::string known;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t device = ggml_backend_dev_get(i);
        if (name == ggml_backend_dev_name(device)) {
            return device;
        }
        known += (known.empty() ? "" : ", ") + std::string(ggml_backend_dev_name(device));
    }
    throw_value("device", "be one of " + known, name);
}

ggml_backend_ptr start(ggml_backend_dev_t device) {
    ggml_backend_ptr backend(ggml_backend_dev_init(device, nullptr));
    if (!backend) {
        throw ModelLoadError(std::string("cannot start device ") + ggml_backend_dev_name(device));
    }
    return backend;
}

// ---- weights ----

std::vector<int64_t> rows_by_id(const HeadWeights& weights) {
    std::vector<int64_t> rows(static_cast<size_t>(weights.w2.n_rows));
    std::iota(rows.begin(), rows.end(), 0);
    if (!weights.d2t.empty()) {
        const auto id_of = [&](int64_t row) { return weights.d2t[static_cast<size_t>(row)]; };
        std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return id_of(a) < id_of(b); });
    }
    return rows;
}

std::vector<int32_t> ids_in_order(const HeadWeights& weights, const std::vector<int64_t>& rows) {
    std::vector<int32_t> out;
    for (const int64_t row : rows) {
        out.push_back(static_cast<int32_t>(weights.d2t.empty() ? row : weights.d2t[static_cast<size_t>(row)]));
    }
    return out;
}

// The file's own type where the device can read it. bf16 has more range than f16, so it widens.
ggml_type device_type(const RowTable& table, const Device& device, bool is_multiplied) {
    const ggml_type own = stored_type(table);
    const ggml_type narrow = ggml_is_quantized(own) ? GGML_TYPE_F16 : own;
    for (const ggml_type type : {own, narrow}) {
        const ggml_context_ptr scratch = make_context(4);
        ggml_context* ctx = scratch.get();
        ggml_tensor* weight = ggml_new_tensor_2d(ctx, type, table.n_cols, table.n_rows);
        ggml_tensor* other = is_multiplied ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, table.n_cols, 1)
                                           : ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
        if (device.supports(is_multiplied ? ggml_mul_mat(ctx, weight, other) : ggml_get_rows(ctx, weight, other))) {
            return type;
        }
    }
    return GGML_TYPE_F32;
}

} // namespace

ggml_context_ptr make_context(size_t n_tensors, bool has_graph) {
    const size_t graph_bytes = has_graph ? ggml_graph_overhead_custom(n_tensors, false) : 0;
    return ggml_context_ptr(ggml_init({n_tensors * ggml_tensor_overhead() + graph_bytes, nullptr, true}));
}

void upload(ggml_tensor* tensor, const std::vector<float>& values) {
    ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}
void upload(ggml_tensor* tensor, const std::vector<int32_t>& values) {
    ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(int32_t));
}

Device::Device(const std::string& name, int32_t n_threads) : device_(find_device(name)), main_(start(device_)) {
    ggml_backend_t cpu = main_.get();
    if (ggml_backend_dev_type(device_) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        fallback_ = start(find_device(""));
        cpu = fallback_.get();
    }
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    if (n_threads > 1) {
        ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
        params.poll = 0; // sleep between blocks: the cores belong to the target's decode then
        pool_.reset(ggml_threadpool_new(&params));
        ggml_backend_cpu_set_threadpool(cpu, pool_.get());
    }
}

bool Device::supports(const ggml_tensor* operation) const { return ggml_backend_dev_supports_op(device_, operation); }

ggml_backend_buffer_ptr Device::allocate(ggml_context* tensors, ggml_backend_buffer_usage usage) const {
    ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(tensors, main_.get()));
    if (!buffer) {
        throw ModelLoadError(std::string("cannot hold the sequential head on ") + ggml_backend_dev_name(device_) +
                             ": not enough memory");
    }
    ggml_backend_buffer_set_usage(buffer.get(), usage);
    return buffer;
}

ggml_backend_sched_ptr Device::make_scheduler(size_t n_nodes) const {
    std::array<ggml_backend_t, 2> backends{main_.get(), fallback_.get()};
    return ggml_backend_sched_ptr(
        ggml_backend_sched_new(backends.data(), nullptr, fallback_ ? 2 : 1, n_nodes, false, false));
}

DeviceWeights::DeviceWeights(const HeadWeights& weights, const Device& device, int64_t n_candidates)
    : type(weights.type), rank(weights.rank), hidden_size(weights.hidden_size), has_map(!weights.d2t.empty()),
      is_full(n_candidates == 0 || n_candidates >= weights.w2.n_rows), row_order(rows_by_id(weights)),
      vocabulary(ids_in_order(weights, row_order)),
      width(is_full ? (weights.w2.n_rows + kChunk - 1) / kChunk * kChunk : n_candidates),
      chunk(is_full ? kChunk : width), context_(make_context(16)) {
    add_tensors(weights, device);
    if (device.is_cpu()) {
        lend(w1, weights.w1);
        lend(w2, weights.w2);
    }
    buffers_.push_back(device.allocate(context_.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS));
    fill(weights);
}

void DeviceWeights::add_tensors(const HeadWeights& weights, const Device& device) {
    ggml_context* ctx = context_.get();
    const int64_t n_rows = is_full ? width : weights.w2.n_rows;
    w1 = ggml_new_tensor_2d(ctx, device_type(weights.w1, device, false), rank, weights.n_vocab);
    w2 = ggml_new_tensor_2d(ctx, device_type(weights.w2, device, is_full), rank, n_rows);
    first_in_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, chunk);
    if (is_full) {
        first_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_chunks());
        ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chunk, n_chunks());
    }
    if (has_mix()) {
        mix_hidden = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hidden_size, n_mixed());
        mix_embedding = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rank, n_mixed());
        mix_bias = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_mixed());
    }
    if (type == MarkovHeadType::rnn) {
        mix_state = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rank, n_mixed());
    }
}

// On the CPU a table that is needed as it lies need not be copied: two of them take 150 MB for a real vocabulary. (f32
// is what an unknown decoder counts as, so it is copied.)
void DeviceWeights::lend(ggml_tensor* tensor, const RowTable& table) {
    const bool is_in_order = tensor != w2 || !is_full || !has_map;
    const bool is_same_type = tensor->type == stored_type(table) && tensor->type != GGML_TYPE_F32;
    if (!is_in_order || !is_same_type || tensor->ne[1] != table.n_rows) {
        return;
    }
    auto* data = const_cast<std::byte*>(table.data); // read only, as all weights are
    const uintptr_t excess = reinterpret_cast<uintptr_t>(data) % kBufferAlignment;
    buffers_.emplace_back(ggml_backend_cpu_buffer_from_ptr(data - excess, ggml_nbytes(tensor) + excess));
    ggml_backend_buffer_set_usage(buffers_.back().get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_alloc(buffers_.back().get(), tensor, data);
}

void DeviceWeights::fill(const HeadWeights& weights) {
    std::vector<int64_t> as_stored(static_cast<size_t>(weights.n_vocab));
    std::iota(as_stored.begin(), as_stored.end(), 0);
    const std::span<const int64_t> rows(as_stored);
    upload_rows(w1, weights.w1, rows);
    upload_rows(w2, weights.w2, is_full ? row_order : rows.first(row_order.size()));
    upload(first_in_chunk, descending(chunk));
    if (is_full) {
        upload(first_chunk, descending(n_chunks()));
        std::vector<int32_t> padded = vocabulary; // padding has no probability, but must be a token all the same
        padded.resize(static_cast<size_t>(width), vocabulary.back());
        upload(ids, padded);
    }
    if (has_mix()) {
        fill_mix(weights);
    }
}

// Input orders: gate [h; e], joint [s; e; h].
void DeviceWeights::fill_mix(const HeadWeights& weights) {
    const bool is_gated = type == MarkovHeadType::gated;
    const Dense mix = decode_all(is_gated ? weights.gate : weights.joint);
    const auto r = static_cast<size_t>(rank);
    const auto d = static_cast<size_t>(hidden_size);
    upload(mix_hidden, columns(mix, is_gated ? 0 : 2 * r, d));
    upload(mix_embedding, columns(mix, is_gated ? d : r, r));
    if (!is_gated) {
        upload(mix_state, columns(mix, 0, r));
    }
    std::vector<float> bias = is_gated ? weights.gate_bias : weights.joint_bias;
    bias.resize(mix.n_rows, 0.0f);
    upload(mix_bias, bias);
}

RowTable make_row_table(const std::string& type_name, std::span<const std::byte> data, int64_t n_rows, int64_t n_cols) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        const ggml_type_traits* traits = ggml_get_type_traits(type);
        if (traits->type_name == nullptr || traits->type_name != type_name ||
            (traits->to_float == nullptr && type != GGML_TYPE_F32)) {
            continue;
        }
        const size_t row_bytes = n_cols % traits->blck_size == 0 ? ggml_row_size(type, n_cols) : 0;
        if (row_bytes == 0 || data.size() != row_bytes * static_cast<size_t>(n_rows)) {
            throw_value(type_name + " data", "hold " + std::to_string(n_rows) + " rows of " + std::to_string(n_cols),
                        std::to_string(data.size()) + " bytes");
        }
        return {data.data(), row_bytes, n_rows, n_cols, type == GGML_TYPE_F32 ? copy_f32 : traits->to_float};
    }
    throw_value("type_name", "be a type of ggml that can be decoded", type_name);
}

} // namespace dspark
