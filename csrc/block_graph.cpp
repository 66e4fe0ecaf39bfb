// Implements block_graph.h. One graph computes a whole block of all requests (its columns): the token of a slot is
// drawn on the device and feeds the next slot, so a block costs one submission and one wait.
//
// Operations, and who runs them in the pinned tree (read in each backend's supports_op). What a device lacks falls back
// to the CPU (ggml_backend_sched); the graph is written so that nothing has to:
//
//   operation              CPU   CUDA   Metal                        Vulkan
//   get_rows f32 f16 quant yes   yes    yes, not nvfp4, tq1_0        yes
//   get_rows i32           yes   yes    yes                          yes
//   mul_mat                yes   yes    simdgroup reduction          yes
//   add sub mul            yes   yes    rows contiguous              yes
//   sigmoid tanh step      yes   yes    rows contiguous              yes
//   soft_max               yes   yes    simdgroup reduction          contiguous
//   cumsum sum_rows        yes   yes    simdgroup reduction          cumsum: subgroup arithmetic
//   argmax                 yes   yes    simdgroup reduction          contiguous
//   cont                   yes   yes    yes                          yes
//
// Casts from float to integer (not everywhere) and argmax on ties (each backend has its own choice) are avoided.
#include "block_graph.h"

#include "errors.h"
#include "graph_head.h"
#include "transition_model.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace dspark {
namespace {

// A float running sum over a whole vocabulary would swallow the tail, so it runs over chunks, then inside one.
constexpr int64_t kChunk = 512;
constexpr int64_t kRowsPerUpload = 4096;

[[noreturn]] void throw_value(const std::string& name, const std::string& rule, const std::string& value) {
    throw std::invalid_argument(name + " must " + rule + ", got " + value);
}

// ---- weights in ggml's types ----

// The type a table is stored in, told by its decoder; f32 where nobody knows it, since decoding is always possible.
ggml_type stored_type(const RowTable& table) {
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const auto type = static_cast<ggml_type>(i);
        const ggml_type_traits* traits = ggml_get_type_traits(type);
        if (traits->to_float != nullptr && traits->to_float == table.decode_row &&
            table.n_cols % traits->blck_size == 0 && ggml_row_size(type, table.n_cols) == table.row_bytes) {
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

void upload(ggml_tensor* tensor, const std::vector<float>& values) {
    ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(float));
}
void upload(ggml_tensor* tensor, const std::vector<int32_t>& values) {
    ggml_backend_tensor_set(tensor, values.data(), 0, values.size() * sizeof(int32_t));
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

ggml_context_ptr make_context(size_t n_tensors, bool has_graph = false) {
    const size_t graph_bytes = has_graph ? ggml_graph_overhead_custom(n_tensors, false) : 0;
    return ggml_context_ptr(ggml_init({n_tensors * ggml_tensor_overhead() + graph_bytes, nullptr, true}));
}

// ---- device ----

struct ThreadpoolDeleter {
    void operator()(ggml_threadpool* pool) const { ggml_threadpool_free(pool); }
};

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

// The device, and the CPU for what the device cannot do.
class Device {
  public:
    Device(const std::string& name, int32_t n_threads) : device_(find_device(name)), main_(start(device_)) {
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

    [[nodiscard]] bool supports(const ggml_tensor* operation) const {
        return ggml_backend_dev_supports_op(device_, operation);
    }

    [[nodiscard]] ggml_backend_buffer_ptr allocate(ggml_context* tensors, ggml_backend_buffer_usage usage) const {
        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(tensors, main_.get()));
        if (!buffer) {
            throw ModelLoadError(std::string("cannot hold the sequential head on ") + ggml_backend_dev_name(device_) +
                                 ": not enough memory");
        }
        ggml_backend_buffer_set_usage(buffer.get(), usage);
        return buffer;
    }

    [[nodiscard]] ggml_backend_sched_ptr make_scheduler(size_t n_nodes) const {
        std::array<ggml_backend_t, 2> backends{main_.get(), fallback_.get()};
        return ggml_backend_sched_ptr(
            ggml_backend_sched_new(backends.data(), nullptr, fallback_ ? 2 : 1, n_nodes, false, false));
    }

  private:
    ggml_backend_dev_t device_;
    std::unique_ptr<ggml_threadpool, ThreadpoolDeleter> pool_; // outlives the backend that uses it
    ggml_backend_ptr main_;
    ggml_backend_ptr fallback_; // null on the CPU
};

// ---- weights on the device ----

// `width` entries compete per slot: candidates that the host chose, or the whole draft vocabulary in ascending target
// ids, padded to chunks.
class DeviceWeights {
  public:
    DeviceWeights(const HeadWeights& weights, const Device& device, int64_t n_candidates)
        : type(weights.type), rank(weights.rank), hidden_size(weights.hidden_size), has_map(!weights.d2t.empty()),
          is_full(n_candidates == 0 || n_candidates >= weights.w2.n_rows), row_order(rows_by_id(weights)),
          vocabulary(ids_in_order(weights, row_order)),
          width(is_full ? (weights.w2.n_rows + kChunk - 1) / kChunk * kChunk : n_candidates),
          chunk(is_full ? kChunk : width), context_(make_context(16)) {
        ggml_context* ctx = context_.get();
        const int64_t n_rows = is_full ? width : weights.w2.n_rows;
        w1 = ggml_new_tensor_2d(ctx, device_type(weights.w1, device, false), rank, weights.n_vocab);
        w2 = ggml_new_tensor_2d(ctx, device_type(weights.w2, device, is_full), rank, n_rows);
        first_in_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, chunk);
        if (is_full) {
            first_chunk = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, width / chunk);
            ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, chunk, width / chunk);
        }
        if (has_mix()) {
            mix_hidden = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, hidden_size, n_mixed());
            mix_embedding = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rank, n_mixed());
            mix_bias = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_mixed());
        }
        if (type == MarkovHeadType::rnn) {
            mix_state = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rank, n_mixed());
        }
        buffer_ = device.allocate(ctx, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        fill(weights);
    }

    [[nodiscard]] bool has_mix() const { return type != MarkovHeadType::vanilla; }
    [[nodiscard]] int64_t n_mixed() const { return type == MarkovHeadType::rnn ? 3 * rank : rank; }

    const MarkovHeadType type;
    const int64_t rank;
    const int64_t hidden_size;
    const bool has_map; // draft rows are no target ids
    const bool is_full;
    const std::vector<int64_t> row_order;  // draft rows by ascending target id
    const std::vector<int32_t> vocabulary; // those target ids
    const int64_t width;
    const int64_t chunk;
    ggml_tensor* w1 = nullptr;
    ggml_tensor* w2 = nullptr;            // as in the file; (width, r) in row_order when the whole vocabulary competes
    ggml_tensor* mix_hidden = nullptr;    // gate or joint, the columns that h meets, f32
    ggml_tensor* mix_embedding = nullptr; // ... that e meets
    ggml_tensor* mix_state = nullptr;     // ... that s meets
    ggml_tensor* mix_bias = nullptr;
    ggml_tensor* first_in_chunk = nullptr; // descending weights, see first_above()
    ggml_tensor* first_chunk = nullptr;
    ggml_tensor* ids = nullptr; // (n_chunks, chunk) target ids of the whole draft vocabulary

  private:
    static std::vector<int64_t> rows_by_id(const HeadWeights& weights) {
        std::vector<int64_t> rows(static_cast<size_t>(weights.w2.n_rows));
        std::iota(rows.begin(), rows.end(), 0);
        if (!weights.d2t.empty()) {
            const auto id_of = [&](int64_t row) { return weights.d2t[static_cast<size_t>(row)]; };
            std::sort(rows.begin(), rows.end(), [&](int64_t a, int64_t b) { return id_of(a) < id_of(b); });
        }
        return rows;
    }

    static std::vector<int32_t> ids_in_order(const HeadWeights& weights, const std::vector<int64_t>& rows) {
        std::vector<int32_t> out;
        for (const int64_t row : rows) {
            out.push_back(static_cast<int32_t>(weights.d2t.empty() ? row : weights.d2t[static_cast<size_t>(row)]));
        }
        return out;
    }

    // The file's own type where the device can read it. bf16 has more range than f16, so it widens.
    static ggml_type device_type(const RowTable& table, const Device& device, bool is_multiplied) {
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

    void fill(const HeadWeights& weights) {
        std::vector<int64_t> as_stored(static_cast<size_t>(std::max(weights.n_vocab, weights.w2.n_rows)));
        std::iota(as_stored.begin(), as_stored.end(), 0);
        upload_rows(w1, weights.w1, std::span(as_stored).first(static_cast<size_t>(weights.n_vocab)));
        upload_rows(w2, weights.w2,
                    is_full ? std::span(row_order) : std::span<const int64_t>(as_stored).first(row_order.size()));
        upload(first_in_chunk, descending(chunk));
        if (is_full) {
            upload(first_chunk, descending(width / chunk));
            upload(ids, padded_ids());
        }
        if (has_mix()) {
            fill_mix(weights);
        }
    }

    // Padding has no probability, but must be a token all the same.
    [[nodiscard]] std::vector<int32_t> padded_ids() const {
        std::vector<int32_t> out = vocabulary;
        out.resize(static_cast<size_t>(width), vocabulary.back());
        return out;
    }

    // Input orders: gate [h; e], joint [s; e; h].
    void fill_mix(const HeadWeights& weights) {
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

    ggml_context_ptr context_;
    ggml_backend_buffer_ptr buffer_;
};

// ---- one graph ----

// For a fixed number of requests and slots. What goes in and out lies in a buffer of its own, so that nothing has to be
// allocated from block to block. (Shapes in ggml order: fastest first.)
class BlockGraph {
  public:
    BlockGraph(const DeviceWeights& weights, const Device& device, size_t n_requests, size_t n_slots)
        : weights_(weights), n_requests_(static_cast<int64_t>(n_requests)), n_slots_(static_cast<int64_t>(n_slots)),
          io_context_(make_context(8)), context_(make_context(n_nodes(), true)) {
        add_inputs();
        io_buffer_ = device.allocate(io_context_.get(), GGML_BACKEND_BUFFER_USAGE_COMPUTE);
        build();
        scheduler_ = device.make_scheduler(n_nodes());
        if (!ggml_backend_sched_alloc_graph(scheduler_.get(), graph_)) {
            throw DecodeError("cannot allocate the sequential head's graph: not enough device memory");
        }
    }

    void compute(const BlockColumns& columns, std::vector<int32_t>& tokens, std::vector<float>& logits) {
        write(columns);
        if (ggml_backend_sched_graph_compute(scheduler_.get(), graph_) != GGML_STATUS_SUCCESS) {
            throw DecodeError("cannot compute the sequential head's graph");
        }
        read(tokens, logits);
    }

  private:
    [[nodiscard]] size_t n_nodes() const { return static_cast<size_t>(n_slots_) * 48 + 64; }

    void write(const BlockColumns& columns) {
        upload(anchors_, columns.anchors);
        upload(base_, columns.base);
        upload(scale_, columns.scales);
        upload(uniforms_, columns.uniforms);
        if (!weights_.is_full) {
            upload(ids_, columns.ids);
        }
        if (rows_ != ids_) {
            upload(rows_, columns.rows);
        }
        if (weights_.has_mix()) {
            upload(hidden_, columns.hidden);
        }
    }

    void read(std::vector<int32_t>& tokens, std::vector<float>& logits) {
        const auto n_requests = static_cast<size_t>(n_requests_);
        tokens.resize(n_requests * tokens_.size());
        for (size_t slot = 0; slot < tokens_.size(); ++slot) {
            ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(scheduler_.get(), tokens_[slot]),
                                          tokens_[slot], tokens.data() + slot * n_requests, 0,
                                          ggml_nbytes(tokens_[slot]));
        }
        ggml_backend_sched_synchronize(scheduler_.get());
        logits.resize(static_cast<size_t>(ggml_nelements(base_)));
        ggml_backend_tensor_get(base_, logits.data(), 0, ggml_nbytes(base_));
    }

    void add_inputs() {
        ggml_context* ctx = io_context_.get();
        anchors_ = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_requests_);
        base_ = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, weights_.width, n_requests_, n_slots_);
        scale_ = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_requests_);
        uniforms_ = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_requests_, n_slots_);
        if (!weights_.is_full) {
            ids_ = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, weights_.width, n_requests_, n_slots_);
            rows_ =
                weights_.has_map ? ggml_new_tensor_3d(ctx, GGML_TYPE_I32, weights_.width, n_requests_, n_slots_) : ids_;
        }
        if (weights_.has_mix()) {
            hidden_ = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, weights_.hidden_size, n_requests_, n_slots_);
        }
    }

    void build() {
        graph_ = ggml_new_graph_custom(context_.get(), n_nodes(), false);
        prepare();
        ggml_tensor* previous = anchors_;
        for (int64_t slot = 0; slot < n_slots_; ++slot) {
            previous = add_slot(slot, previous);
            ggml_build_forward_expand(graph_, previous);
            tokens_.push_back(previous);
        }
    }

    // What does not depend on drafted tokens: once for all slots.
    void prepare() {
        ggml_context* ctx = context_.get();
        if (!weights_.is_full) {
            candidate_rows_ = ggml_get_rows(ctx, weights_.w2, ggml_reshape_1d(ctx, rows_, ggml_nelements(rows_)));
        }
        if (weights_.has_mix()) {
            ggml_tensor* h = ggml_reshape_2d(ctx, hidden_, weights_.hidden_size, n_requests_ * n_slots_);
            from_hidden_ = ggml_add(ctx, multiply(weights_.mix_hidden, h), weights_.mix_bias);
        }
    }

    // Returns the slot's tokens (n_requests).
    ggml_tensor* add_slot(int64_t slot, ggml_tensor* previous) {
        ggml_context* ctx = context_.get();
        ggml_tensor* embedding = ggml_get_rows(ctx, weights_.w1, previous); // (r, n_requests)
        ggml_tensor* bias = transition_bias(slot, transition_state(slot, embedding));
        ggml_tensor* logits = ggml_add_inplace(ctx, slot_of(base_, slot), bias); // (width, n_requests)
        ggml_tensor* probs = ggml_soft_max(ctx, ggml_mul(ctx, logits, scale_));
        return weights_.is_full ? draw_of_vocabulary(probs, slot) : draw_candidate(probs, slot);
    }

    // q with B = W2 q (r, n_requests)
    ggml_tensor* transition_state(int64_t slot, ggml_tensor* embedding) {
        if (weights_.type == MarkovHeadType::vanilla) {
            return embedding;
        }
        ggml_context* ctx = context_.get();
        ggml_tensor* mixed = ggml_add(ctx, multiply(weights_.mix_embedding, embedding), columns_of(from_hidden_, slot));
        if (weights_.type == MarkovHeadType::gated) {
            return ggml_mul(ctx, ggml_sigmoid(ctx, mixed), embedding);
        }
        return advance_recurrence(slot, mixed);
    }

    // s starts at 0, so the first slot has no term with it. g s + (1 - g) c is written c + g (s - c).
    ggml_tensor* advance_recurrence(int64_t slot, ggml_tensor* mixed) {
        ggml_context* ctx = context_.get();
        if (slot > 0) {
            mixed = ggml_add(ctx, mixed, multiply(weights_.mix_state, recurrent_));
        }
        ggml_tensor* gate = third_of(ggml_sigmoid(ctx, mixed), 0);
        ggml_tensor* squashed = ggml_tanh(ctx, mixed);
        ggml_tensor* proposed = third_of(squashed, 1);
        ggml_tensor* change = slot > 0 ? ggml_sub(ctx, proposed, recurrent_) : proposed;
        ggml_tensor* kept = ggml_mul(ctx, change, gate);
        recurrent_ = ggml_sub(ctx, proposed, kept);
        return ggml_cont(ctx, third_of(squashed, 2));
    }

    // B (width, n_requests)
    ggml_tensor* transition_bias(int64_t slot, ggml_tensor* state) {
        if (weights_.is_full) {
            return multiply(weights_.w2, state);
        }
        ggml_context* ctx = context_.get();
        const size_t row_bytes = candidate_rows_->nb[1];
        const size_t request_bytes = row_bytes * static_cast<size_t>(weights_.width);
        ggml_tensor* rows_of_slot =
            ggml_view_3d(ctx, candidate_rows_, weights_.rank, weights_.width, n_requests_, row_bytes, request_bytes,
                         request_bytes * static_cast<size_t>(n_requests_ * slot));
        ggml_tensor* bias = multiply(rows_of_slot, ggml_reshape_3d(ctx, state, weights_.rank, 1, n_requests_));
        return ggml_reshape_2d(ctx, bias, weights_.width, n_requests_);
    }

    ggml_tensor* draw_candidate(ggml_tensor* probs, int64_t slot) {
        ggml_context* ctx = context_.get();
        ggml_tensor* index = first_above(ggml_cumsum(ctx, probs), slot_of(uniforms_, slot), weights_.first_in_chunk);
        ggml_tensor* slot_ids = ggml_reshape_3d(ctx, slot_of(ids_, slot), 1, weights_.width, n_requests_);
        return pick(slot_ids, index);
    }

    // First the chunk, then the token inside it.
    ggml_tensor* draw_of_vocabulary(ggml_tensor* probs, int64_t slot) {
        ggml_context* ctx = context_.get();
        const int64_t n_chunks = weights_.width / weights_.chunk;
        ggml_tensor* chunks = ggml_reshape_3d(ctx, probs, weights_.chunk, n_chunks, n_requests_);
        ggml_tensor* masses = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, chunks), n_chunks, n_requests_);
        ggml_tensor* reached = ggml_cumsum(ctx, masses);
        ggml_tensor* uniform = slot_of(uniforms_, slot);
        ggml_tensor* index = first_above(reached, uniform, weights_.first_chunk); // (n_requests)
        ggml_tensor* before =
            pick_row(ggml_reshape_3d(ctx, ggml_sub(ctx, reached, masses), 1, n_chunks, n_requests_), index);
        ggml_tensor* left = ggml_sub(ctx, uniform, ggml_reshape_2d(ctx, before, 1, n_requests_));
        ggml_tensor* chosen = ggml_reshape_2d(ctx, pick_row(chunks, index), weights_.chunk, n_requests_);
        ggml_tensor* inside = first_above(ggml_cumsum(ctx, chosen), left, weights_.first_in_chunk);
        ggml_tensor* chunk_ids = ggml_get_rows(ctx, weights_.ids, index); // (chunk, n_requests)
        return pick(ggml_reshape_3d(ctx, chunk_ids, 1, weights_.chunk, n_requests_), inside);
    }

    // Per request the index of the first entry of `reached` (n, n_requests) above the bound (1, n_requests): `weights`
    // fall from n to 1, which makes the maximum unique. Where rounding leaves no such entry, some index of the row.
    ggml_tensor* first_above(ggml_tensor* reached, ggml_tensor* bound, ggml_tensor* weights) {
        ggml_context* ctx = context_.get();
        ggml_tensor* is_above = ggml_step(ctx, ggml_sub(ctx, reached, bound));
        return ggml_argmax(ctx, ggml_mul(ctx, is_above, weights));
    }

    // (m, n, n_requests), (n_requests) -> (m, 1, n_requests)
    ggml_tensor* pick_row(ggml_tensor* table, ggml_tensor* index) {
        return ggml_get_rows(context_.get(), table, ggml_reshape_2d(context_.get(), index, 1, n_requests_));
    }
    // Tokens (n_requests). The flag keeps them until the host reads them; on a reshape it would have no effect.
    ggml_tensor* pick(ggml_tensor* table, ggml_tensor* index) {
        ggml_tensor* picked = pick_row(table, index);
        ggml_set_output(picked);
        return ggml_reshape_1d(context_.get(), picked, n_requests_);
    }

    ggml_tensor* multiply(ggml_tensor* matrix, ggml_tensor* vectors) {
        ggml_tensor* product = ggml_mul_mat(context_.get(), matrix, vectors);
        ggml_prec_set_acc(product, GGML_PREC_F32);
        return product;
    }

    // (n, n_requests) of (n, n_requests, n_slots)
    ggml_tensor* slot_of(ggml_tensor* tensor, int64_t slot) {
        return ggml_view_2d(context_.get(), tensor, tensor->ne[0], n_requests_, tensor->nb[1],
                            tensor->nb[2] * static_cast<size_t>(slot));
    }
    // (n, n_requests) of (n, n_requests * n_slots)
    ggml_tensor* columns_of(ggml_tensor* tensor, int64_t slot) {
        return ggml_view_2d(context_.get(), tensor, tensor->ne[0], n_requests_, tensor->nb[1],
                            tensor->nb[1] * static_cast<size_t>(slot * n_requests_));
    }
    // (r, n_requests) of (3r, n_requests)
    ggml_tensor* third_of(ggml_tensor* tensor, size_t third) {
        return ggml_view_2d(context_.get(), tensor, weights_.rank, n_requests_, tensor->nb[1],
                            third * static_cast<size_t>(weights_.rank) * sizeof(float));
    }

    const DeviceWeights& weights_;
    const int64_t n_requests_;
    const int64_t n_slots_;
    ggml_tensor* anchors_ = nullptr;  // (n_requests)
    ggml_tensor* ids_ = nullptr;      // (width, n_requests, n_slots) the candidates' target ids, ascending
    ggml_tensor* rows_ = nullptr;     // their rows of W2; the same tensor without a d2t
    ggml_tensor* base_ = nullptr;     // (width, n_requests, n_slots) U; the graph adds B in place
    ggml_tensor* scale_ = nullptr;    // (1, n_requests) 1/T
    ggml_tensor* uniforms_ = nullptr; // (1, n_requests, n_slots)
    ggml_tensor* hidden_ = nullptr;   // (hidden_size, n_requests, n_slots), for gated and rnn
    ggml_context_ptr io_context_;
    ggml_backend_buffer_ptr io_buffer_;
    ggml_context_ptr context_;
    ggml_cgraph* graph_ = nullptr;
    ggml_backend_sched_ptr scheduler_;
    ggml_tensor* candidate_rows_ = nullptr; // (r, width * n_requests * n_slots) of W2
    ggml_tensor* from_hidden_ = nullptr;    // (n_mixed, n_requests * n_slots)
    ggml_tensor* recurrent_ = nullptr;      // s (r, n_requests)
    std::vector<ggml_tensor*> tokens_;      // per slot (n_requests)
};

} // namespace

struct BlockGraphs::Impl {
    Impl(const HeadWeights& head, const GraphHeadOptions& options)
        : device(options.device, options.n_threads), weights(head, device, options.n_candidates) {}

    Device device;
    DeviceWeights weights;
    std::map<std::pair<size_t, size_t>, std::unique_ptr<BlockGraph>> graphs; // by requests and slots
};

BlockGraphs::BlockGraphs(const HeadWeights& weights, const GraphHeadOptions& options)
    : impl_(std::make_unique<Impl>(weights, options)) {}
BlockGraphs::~BlockGraphs() = default;

void BlockGraphs::compute(const BlockColumns& columns, std::vector<int32_t>& tokens, std::vector<float>& logits) {
    auto& graph = impl_->graphs[{columns.n_requests, columns.n_slots}];
    if (!graph) {
        graph = std::make_unique<BlockGraph>(impl_->weights, impl_->device, columns.n_requests, columns.n_slots);
    }
    graph->compute(columns, tokens, logits);
}

size_t BlockGraphs::width() const { return static_cast<size_t>(impl_->weights.width); }
bool BlockGraphs::is_full() const { return impl_->weights.is_full; }
bool BlockGraphs::reads_hidden() const { return impl_->weights.has_mix(); }
std::span<const int32_t> BlockGraphs::vocabulary() const { return impl_->weights.vocabulary; }

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
