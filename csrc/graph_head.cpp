// Implements graph_head.h. One graph computes a whole block of all requests (its columns): the token of a slot is drawn
// on the device and feeds the next slot, so a block costs one submission and one wait.
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
#include "graph_head.h"

#include "errors.h"
#include "transition_model.h"
#include "vector_loops.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace dspark {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// Stands for 1/T at T = 0: a power of two, so that scaling is exact, and large enough for the softmax of any two
// different logits to be 0 and 1. With u = 0 the draw then takes the lowest id among equal maxima, as the other heads
// do, and greedy and sampled requests share the graph.
constexpr float kGreedyScale = 0x1p60f;
constexpr float kLargestUniform = 1.0f - 0x1p-23f; // what is drawn stays below the rounded sum of the probabilities
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
    const std::vector<int64_t> row_order; // draft rows by ascending target id
    const int64_t width;
    const int64_t chunk;
    ggml_tensor* w1 = nullptr;
    ggml_tensor* w2 = nullptr;             // as in the file; (width, r) in row_order when the whole vocabulary competes
    ggml_tensor* mix_hidden = nullptr;     // gate or joint, the columns that h meets, f32
    ggml_tensor* mix_embedding = nullptr;  // ... that e meets
    ggml_tensor* mix_state = nullptr;      // ... that s meets
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
            upload(ids, padded_ids(weights));
        }
        if (has_mix()) {
            fill_mix(weights);
        }
    }

    // Padding has no probability, but must be a token all the same.
    [[nodiscard]] std::vector<int32_t> padded_ids(const HeadWeights& weights) const {
        std::vector<int32_t> out(static_cast<size_t>(width));
        for (size_t i = 0; i < out.size(); ++i) {
            const int64_t row = row_order[std::min(i, row_order.size() - 1)];
            out[i] = static_cast<int32_t>(weights.d2t.empty() ? row : weights.d2t[static_cast<size_t>(row)]);
        }
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
    BlockGraph(const DeviceWeights& weights, const Device& device, size_t n_inputs, size_t n_trained_slots)
        : n_requests(static_cast<int64_t>(n_inputs)), n_slots(static_cast<int64_t>(n_trained_slots)), weights_(weights),
          io_context_(make_context(8)), context_(make_context(n_nodes(), true)) {
        add_inputs();
        io_buffer_ = device.allocate(io_context_.get(), GGML_BACKEND_BUFFER_USAGE_COMPUTE);
        build();
        scheduler_ = device.make_scheduler(n_nodes());
        if (!ggml_backend_sched_alloc_graph(scheduler_.get(), graph_)) {
            throw DecodeError("cannot allocate the sequential head's graph: not enough device memory");
        }
    }

    void compute() {
        if (ggml_backend_sched_graph_compute(scheduler_.get(), graph_) != GGML_STATUS_SUCCESS) {
            throw DecodeError("cannot compute the sequential head's graph");
        }
    }

    // `drawn`: (n_requests, n_slots); `out`: logits U + B in the shape of `base`.
    void read(std::vector<int32_t>& drawn, std::vector<float>& out) {
        drawn.resize(static_cast<size_t>(n_requests * n_slots));
        for (size_t slot = 0; slot < tokens_.size(); ++slot) {
            ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(scheduler_.get(), tokens_[slot]),
                                          tokens_[slot], drawn.data() + slot * static_cast<size_t>(n_requests), 0,
                                          ggml_nbytes(tokens_[slot]));
        }
        ggml_backend_sched_synchronize(scheduler_.get());
        out.resize(static_cast<size_t>(ggml_nelements(base)));
        ggml_backend_tensor_get(base, out.data(), 0, ggml_nbytes(base));
    }

    const int64_t n_requests;
    const int64_t n_slots;
    ggml_tensor* anchors = nullptr;  // (n_requests)
    ggml_tensor* ids = nullptr;      // (width, n_requests, n_slots) the candidates' target ids, ascending
    ggml_tensor* rows = nullptr;     // their rows of W2; the same tensor without a d2t
    ggml_tensor* base = nullptr;     // (width, n_requests, n_slots) U; the graph adds B in place
    ggml_tensor* scale = nullptr;    // (1, n_requests) 1/T
    ggml_tensor* uniforms = nullptr; // (1, n_requests, n_slots)
    ggml_tensor* hidden = nullptr;   // (hidden_size, n_requests, n_slots), for gated and rnn

  private:
    [[nodiscard]] size_t n_nodes() const { return static_cast<size_t>(n_slots) * 48 + 64; }

    void add_inputs() {
        ggml_context* ctx = io_context_.get();
        anchors = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_requests);
        base = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, weights_.width, n_requests, n_slots);
        scale = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_requests);
        uniforms = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, n_requests, n_slots);
        if (!weights_.is_full) {
            ids = ggml_new_tensor_3d(ctx, GGML_TYPE_I32, weights_.width, n_requests, n_slots);
            rows = weights_.has_map ? ggml_new_tensor_3d(ctx, GGML_TYPE_I32, weights_.width, n_requests, n_slots) : ids;
        }
        if (weights_.has_mix()) {
            hidden = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, weights_.hidden_size, n_requests, n_slots);
        }
    }

    void build() {
        graph_ = ggml_new_graph_custom(context_.get(), n_nodes(), false);
        prepare();
        ggml_tensor* previous = anchors;
        for (int64_t slot = 0; slot < n_slots; ++slot) {
            previous = add_slot(slot, previous);
            ggml_set_output(previous);
            ggml_build_forward_expand(graph_, previous);
            tokens_.push_back(previous);
        }
    }

    // What does not depend on drafted tokens: once for all slots.
    void prepare() {
        ggml_context* ctx = context_.get();
        if (!weights_.is_full) {
            candidate_rows_ = ggml_get_rows(ctx, weights_.w2, ggml_reshape_1d(ctx, rows, ggml_nelements(rows)));
        }
        if (weights_.has_mix()) {
            ggml_tensor* h = ggml_reshape_2d(ctx, hidden, weights_.hidden_size, n_requests * n_slots);
            from_hidden_ = ggml_add(ctx, multiply(weights_.mix_hidden, h), weights_.mix_bias);
        }
    }

    // Returns the slot's tokens (n_requests).
    ggml_tensor* add_slot(int64_t slot, ggml_tensor* previous) {
        ggml_context* ctx = context_.get();
        ggml_tensor* embedding = ggml_get_rows(ctx, weights_.w1, previous); // (r, n_requests)
        ggml_tensor* bias = transition_bias(slot, transition_state(slot, embedding));
        ggml_tensor* logits = ggml_add_inplace(ctx, slot_of(base, slot), bias); // (width, n_requests)
        ggml_tensor* probs = ggml_soft_max(ctx, ggml_mul(ctx, logits, scale));
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
            ggml_view_3d(ctx, candidate_rows_, weights_.rank, weights_.width, n_requests, row_bytes, request_bytes,
                         request_bytes * static_cast<size_t>(n_requests * slot));
        ggml_tensor* bias = multiply(rows_of_slot, ggml_reshape_3d(ctx, state, weights_.rank, 1, n_requests));
        return ggml_reshape_2d(ctx, bias, weights_.width, n_requests);
    }

    ggml_tensor* draw_candidate(ggml_tensor* probs, int64_t slot) {
        ggml_context* ctx = context_.get();
        ggml_tensor* index = first_above(ggml_cumsum(ctx, probs), slot_of(uniforms, slot), weights_.first_in_chunk);
        ggml_tensor* slot_ids = ggml_reshape_3d(ctx, slot_of(ids, slot), 1, weights_.width, n_requests);
        return pick(slot_ids, index);
    }

    // First the chunk, then the token inside it.
    ggml_tensor* draw_of_vocabulary(ggml_tensor* probs, int64_t slot) {
        ggml_context* ctx = context_.get();
        const int64_t n_chunks = weights_.width / weights_.chunk;
        ggml_tensor* chunks = ggml_reshape_3d(ctx, probs, weights_.chunk, n_chunks, n_requests);
        ggml_tensor* masses = ggml_reshape_2d(ctx, ggml_sum_rows(ctx, chunks), n_chunks, n_requests);
        ggml_tensor* reached = ggml_cumsum(ctx, masses);
        ggml_tensor* uniform = slot_of(uniforms, slot);
        ggml_tensor* index = first_above(reached, uniform, weights_.first_chunk); // (n_requests)
        ggml_tensor* before = pick_row(ggml_reshape_3d(ctx, ggml_sub(ctx, reached, masses), 1, n_chunks, n_requests), index);
        ggml_tensor* left = ggml_sub(ctx, uniform, ggml_reshape_2d(ctx, before, 1, n_requests));
        ggml_tensor* chosen = ggml_reshape_2d(ctx, pick_row(chunks, index), weights_.chunk, n_requests);
        ggml_tensor* inside = first_above(ggml_cumsum(ctx, chosen), left, weights_.first_in_chunk);
        ggml_tensor* chunk_ids = ggml_get_rows(ctx, weights_.ids, index); // (chunk, n_requests)
        return pick(ggml_reshape_3d(ctx, chunk_ids, 1, weights_.chunk, n_requests), inside);
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
        return ggml_get_rows(context_.get(), table, ggml_reshape_2d(context_.get(), index, 1, n_requests));
    }
    ggml_tensor* pick(ggml_tensor* table, ggml_tensor* index) {
        return ggml_reshape_1d(context_.get(), pick_row(table, index), n_requests);
    }

    ggml_tensor* multiply(ggml_tensor* matrix, ggml_tensor* vectors) {
        ggml_tensor* product = ggml_mul_mat(context_.get(), matrix, vectors);
        ggml_mul_mat_set_prec(product, GGML_PREC_F32);
        return product;
    }

    // (n, n_requests) of (n, n_requests, n_slots)
    ggml_tensor* slot_of(ggml_tensor* tensor, int64_t slot) {
        return ggml_view_2d(context_.get(), tensor, tensor->ne[0], n_requests, tensor->nb[1],
                            tensor->nb[2] * static_cast<size_t>(slot));
    }
    // (n, n_requests) of (n, n_requests * n_slots)
    ggml_tensor* columns_of(ggml_tensor* tensor, int64_t slot) {
        return ggml_view_2d(context_.get(), tensor, tensor->ne[0], n_requests, tensor->nb[1],
                            tensor->nb[1] * static_cast<size_t>(slot * n_requests));
    }
    // (r, n_requests) of (3r, n_requests)
    ggml_tensor* third_of(ggml_tensor* tensor, size_t third) {
        return ggml_view_2d(context_.get(), tensor, weights_.rank, n_requests, tensor->nb[1],
                            third * static_cast<size_t>(weights_.rank) * sizeof(float));
    }

    const DeviceWeights& weights_;
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

// ---- the host's side ----

class GraphSequentialHead final : public SequentialHead {
  public:
    GraphSequentialHead(HeadWeights weights, const GraphHeadOptions& options)
        : weights_(std::move(weights)), max_requests_(static_cast<size_t>(options.max_requests)),
          device_(options.device, options.n_threads), on_device_(weights_, device_, options.n_candidates),
          width_(static_cast<size_t>(on_device_.width)) {
        if (!weights_.d2t.empty()) {
            target_to_row_.assign(static_cast<size_t>(weights_.n_vocab), -1);
        }
        for (size_t row = 0; row < weights_.d2t.size(); ++row) {
            target_to_row_[static_cast<size_t>(weights_.d2t[row])] = static_cast<int32_t>(row);
        }
        embedding_.resize(static_cast<size_t>(weights_.rank));
    }

    void draft_blocks(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) override {
        if (inputs.size() != drafts.size()) {
            throw_value("drafts", "be as many as inputs", std::to_string(drafts.size()));
        }
        std::for_each(inputs.begin(), inputs.end(), [this](const BlockInput& input) { check_input(input); });
        for (size_t begin = 0; begin < inputs.size(); begin += max_requests_) {
            const size_t n = std::min(max_requests_, inputs.size() - begin);
            draft_batch(inputs.subspan(begin, n), drafts.subspan(begin, n));
        }
    }

  private:
    void check_input(const BlockInput& input) const {
        if (input.anchor < 0 || input.anchor >= weights_.n_vocab) {
            throw_value("anchor", "be a token below " + std::to_string(weights_.n_vocab), std::to_string(input.anchor));
        }
        const bool is_selected = !input.candidates.empty() && !on_device_.is_full;
        const size_t n_rows = is_selected ? input.candidates.size() : input.base_logits.size();
        if (n_rows != input.hidden.size()) {
            throw_value("base_logits or candidates", "have a row per slot", std::to_string(n_rows));
        }
        for (const Candidates& slot : is_selected ? input.candidates : std::span<const Candidates>()) {
            check_candidates(slot);
        }
    }

    void check_candidates(const Candidates& slot) const {
        const bool is_known = std::all_of(slot.ids.begin(), slot.ids.end(),
                                          [this](int32_t id) { return id >= 0 && id < weights_.n_vocab; });
        if (!is_known || slot.ids.size() != slot.logits.size() || slot.ids.size() > width_) {
            throw_value("candidates", "hold at most " + std::to_string(width_) + " known tokens, each with a logit",
                        std::to_string(slot.ids.size()));
        }
    }

    void draft_batch(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) {
        size_t n_slots = 0;
        for (const BlockInput& input : inputs) {
            n_slots = std::max(n_slots, input.hidden.size());
        }
        if (n_slots > 0) {
            BlockGraph& graph = graph_for(inputs.size(), n_slots);
            stage(graph, inputs);
            graph.compute();
            graph.read(tokens_, logits_);
        }
        for (size_t i = 0; i < inputs.size(); ++i) {
            read_draft(i, inputs[i], drafts[i]);
        }
    }

    BlockGraph& graph_for(size_t n_inputs, size_t n_slots) {
        n_requests_ = std::min(std::bit_ceil(n_inputs), max_requests_);
        auto& graph = graphs_[{n_requests_, n_slots}];
        if (!graph) {
            graph = std::make_unique<BlockGraph>(on_device_, device_, n_requests_, n_slots);
        }
        return *graph;
    }

    // Requests and slots beyond those of the inputs compute on token 0 and nobody looks at them.
    void stage(BlockGraph& graph, std::span<const BlockInput> inputs) {
        const size_t n_columns = n_requests_ * static_cast<size_t>(graph.n_slots);
        const auto hidden_size = static_cast<size_t>(weights_.hidden_size);
        anchors_.assign(n_requests_, 0);
        scales_.assign(n_requests_, 1.0f);
        uniforms_.assign(n_columns, 0.0f);
        base_.assign(n_columns * width_, 0.0f);
        ids_.assign(on_device_.is_full ? 0 : n_columns * width_, 0);
        rows_.assign(ids_.size(), 0);
        hidden_.assign(on_device_.has_mix() ? n_columns * hidden_size : 0, 0.0f);
        n_candidates_.assign(n_columns, 0);
        for (size_t i = 0; i < inputs.size(); ++i) {
            stage_input(i, inputs[i]);
        }
        upload_all(graph);
    }

    void stage_input(size_t index, const BlockInput& input) {
        const bool is_greedy = input.truncation.is_greedy();
        anchors_[index] = input.anchor;
        scales_[index] = is_greedy ? kGreedyScale : 1.0f / input.truncation.temperature;
        for (size_t slot = 0; slot < input.hidden.size(); ++slot) {
            const size_t column = column_of(index, slot);
            on_device_.is_full ? stage_vocabulary(column, input.base_logits[slot])
                               : stage_candidates(column, candidates_of(input, slot));
            check_base(std::span(base_).subspan(column * width_, n_candidates_[column]));
            if (!is_greedy) {
                const double uniform = input.random.draft_sample(input.start, input.start + 1 + slot);
                uniforms_[column] = std::min(static_cast<float>(uniform), kLargestUniform);
            }
            if (!hidden_.empty()) {
                const auto n = static_cast<size_t>(weights_.hidden_size);
                std::copy_n(input.hidden[slot], n, hidden_.data() + column * n);
            }
        }
    }

    void stage_vocabulary(size_t column, const float* logits) {
        float* base = base_.data() + column * width_;
        n_candidates_[column] = on_device_.row_order.size();
        for (size_t i = 0; i < on_device_.row_order.size(); ++i) {
            const int64_t row = on_device_.row_order[i];
            base[i] = soft_capped(logits[weights_.d2t.empty() ? row : weights_.d2t[static_cast<size_t>(row)]]);
        }
        std::fill(base + n_candidates_[column], base + width_, -kInf);
    }

    // In ascending ids, as the draw walks them; the last one, at -inf, fills up what is missing.
    void stage_candidates(size_t column, const Candidates& chosen) {
        order_.clear();
        for (size_t i = 0; i < chosen.ids.size(); ++i) {
            if (row_of(chosen.ids[i]) >= 0) {
                order_.emplace_back(chosen.ids[i], soft_capped(chosen.logits[i]));
            }
        }
        std::sort(order_.begin(), order_.end());
        n_candidates_[column] = order_.size();
        for (size_t i = 0; i < width_ && !order_.empty(); ++i) {
            const auto& [id, logit] = order_[std::min(i, order_.size() - 1)];
            ids_[column * width_ + i] = id;
            rows_[column * width_ + i] = row_of(id);
            base_[column * width_ + i] = i < order_.size() ? logit : -kInf;
        }
    }

    // U alone chooses the candidates, as in the candidate head.
    const Candidates& candidates_of(const BlockInput& input, size_t slot) {
        if (!input.candidates.empty()) {
            return input.candidates[slot];
        }
        const std::span<const float> logits(input.base_logits[slot], static_cast<size_t>(weights_.n_vocab));
        builder_.select_top_k(logits, static_cast<int32_t>(width_), selected_);
        return selected_;
    }

    static void check_base(std::span<const float> base) {
        if (!is_below_infinity(base.data(), base.size())) {
            throw std::runtime_error("logits must not hold NaN or +inf, got one");
        }
        if (std::none_of(base.begin(), base.end(), [](float logit) { return logit > -kInf; })) {
            throw std::runtime_error("logits must hold a finite value, got none");
        }
    }

    void upload_all(BlockGraph& graph) const {
        upload(graph.anchors, anchors_);
        upload(graph.base, base_);
        upload(graph.scale, scales_);
        upload(graph.uniforms, uniforms_);
        if (!on_device_.is_full) {
            upload(graph.ids, ids_);
        }
        if (graph.rows != graph.ids) {
            upload(graph.rows, rows_);
        }
        if (on_device_.has_mix()) {
            upload(graph.hidden, hidden_);
        }
    }

    void read_draft(size_t index, const BlockInput& input, BlockDraft& draft) {
        const size_t n_slots = input.hidden.size();
        draft.tokens.resize(n_slots);
        draft.probs.resize(n_slots);
        draft.confidence_logits.resize(weights_.confidence ? n_slots : 0);
        if (draft.trace != nullptr) {
            draft.trace->assign(n_slots, {});
        }
        int32_t previous = input.anchor;
        for (size_t slot = 0; slot < n_slots; ++slot) {
            const size_t column = column_of(index, slot);
            draft.tokens[slot] = tokens_[column];
            read_probs(column, input.truncation, draft.probs[slot]);
            read_embedding(previous, draft.trace != nullptr);
            if (weights_.confidence) {
                const std::span hidden(input.hidden[slot], static_cast<size_t>(weights_.hidden_size));
                draft.confidence_logits[slot] = weights_.confidence->logit(hidden, embedding_);
            }
            if (draft.trace != nullptr) {
                fill_trace(column, (*draft.trace)[slot]);
            }
            previous = draft.tokens[slot];
        }
    }

    void read_embedding(int32_t token, bool is_traced) {
        if (is_traced || (weights_.confidence && weights_.confidence->has_markov_input())) {
            weights_.w1.decode(token, embedding_.data());
        }
    }

    void read_probs(size_t column, const Truncation& truncation, Distribution& out) {
        const int32_t token = tokens_[column];
        const std::span logits = std::span<const float>(logits_).subspan(column * width_, n_candidates_[column]);
        check_base(logits); // NaN in h or in the weights shows here
        if (truncation.is_greedy()) {
            out.assign_single(token);
            return;
        }
        const Truncation temperature_only{.temperature = truncation.temperature};
        if (on_device_.is_full) {
            builder_.truncated_distribution(over_vocabulary(logits), temperature_only, out);
        } else {
            const auto ids = ids_.begin() + static_cast<std::ptrdiff_t>(column * width_);
            selected_.ids.assign(ids, ids + std::ssize(logits));
            selected_.logits.assign(logits.begin(), logits.end());
            builder_.candidate_distribution(selected_, temperature_only, out);
        }
        keep_drawable(token, out);
    }

    [[nodiscard]] std::span<const float> over_vocabulary(std::span<const float> logits) {
        if (weights_.d2t.empty()) {
            return logits;
        }
        vocabulary_.assign(static_cast<size_t>(weights_.n_vocab), -kInf);
        for (size_t i = 0; i < logits.size(); ++i) {
            const auto row = static_cast<size_t>(on_device_.row_order[i]);
            vocabulary_[static_cast<size_t>(weights_.d2t[row])] = logits[i];
        }
        return vocabulary_;
    }

    // Once in 10 million draws, rounding on the device may pick a token whose probability is 0 in float: verification
    // divides by it.
    static void keep_drawable(int32_t token, Distribution& probs) {
        const auto it = std::lower_bound(probs.ids.begin(), probs.ids.end(), token);
        if (it == probs.ids.end() || *it != token) { // its logit is -inf
            probs.probs.insert(probs.probs.begin() + (it - probs.ids.begin()), 0.0f);
            probs.ids.insert(it, token);
        }
        float& prob = probs.probs[static_cast<size_t>(
            std::lower_bound(probs.ids.begin(), probs.ids.end(), token) - probs.ids.begin())];
        prob = std::max(prob, std::numeric_limits<float>::min());
    }

    void fill_trace(size_t column, SlotTrace& trace) const {
        trace.embedding = embedding_;
        for (size_t i = 0; i < n_candidates_[column]; ++i) {
            const size_t at = column * width_ + i;
            const int64_t row = on_device_.is_full ? on_device_.row_order[i] : 0;
            const int64_t id = weights_.d2t.empty() ? row : weights_.d2t[static_cast<size_t>(row)];
            trace.ids.push_back(on_device_.is_full ? static_cast<int32_t>(id) : ids_[at]);
            trace.base_logits.push_back(base_[at]);
            trace.transition_bias.push_back(logits_[at] - base_[at]);
        }
    }

    [[nodiscard]] size_t column_of(size_t request, size_t slot) const { return slot * n_requests_ + request; }
    [[nodiscard]] int32_t row_of(int32_t id) const {
        return target_to_row_.empty() ? id : target_to_row_[static_cast<size_t>(id)];
    }
    [[nodiscard]] float soft_capped(float logit) const {
        const float cap = weights_.logit_softcap;
        return cap > 0.0f ? cap * std::tanh(logit / cap) : logit;
    }

    HeadWeights weights_;
    size_t max_requests_;
    Device device_;
    DeviceWeights on_device_;
    size_t width_;
    std::map<std::pair<size_t, size_t>, std::unique_ptr<BlockGraph>> graphs_; // by requests and slots
    std::vector<int32_t> target_to_row_;                                      // (n_vocab,) inverse of d2t, or empty
    DistributionBuilder builder_;

    // One batch, staged and read: a column is a request's slot, columns lie slot by slot.
    size_t n_requests_ = 0; // of the graph
    std::vector<int32_t> anchors_;
    std::vector<float> scales_;
    std::vector<float> uniforms_;      // (n_columns,)
    std::vector<float> base_;          // (n_columns, width) U after the soft-cap
    std::vector<float> logits_;        // (n_columns, width) U + B
    std::vector<int32_t> ids_;         // (n_columns, width), empty when the whole vocabulary competes
    std::vector<int32_t> rows_;        // their rows of W2
    std::vector<float> hidden_;        // (n_columns, hidden_size), for gated and rnn
    std::vector<size_t> n_candidates_; // (n_columns,) the rest of a column's width is padding
    std::vector<int32_t> tokens_;      // (n_columns,)
    Candidates selected_;
    std::vector<std::pair<int32_t, float>> order_; // (id, U)
    std::vector<float> vocabulary_;                // (n_vocab,)
    std::vector<float> embedding_;                 // e (r,)
};

} // namespace

std::unique_ptr<SequentialHead> make_graph_head(HeadWeights weights, const GraphHeadOptions& options) {
    validate_weights(weights);
    for (const auto& [name, value, lowest] : {std::tuple{"n_threads", options.n_threads, 1},
                                              {"n_candidates", options.n_candidates, 0},
                                              {"max_requests", options.max_requests, 1}}) {
        if (value < lowest) {
            throw_value(name, "be at least " + std::to_string(lowest), std::to_string(value));
        }
    }
    if (weights.type == MarkovHeadType::none) {
        return options.n_candidates == 0 ? make_full_head(std::move(weights))
                                         : make_candidate_head(std::move(weights), options.n_candidates);
    }
    return std::make_unique<GraphSequentialHead>(std::move(weights), options);
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
