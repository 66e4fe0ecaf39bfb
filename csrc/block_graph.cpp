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

#include "device_weights.h"
#include "errors.h"
#include "graph_head.h"

#include <map>
#include <utility>
#include <vector>

namespace dspark {
namespace {

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
        return pick_tokens(slot_ids, index);
    }

    // First the chunk, then the token inside it.
    ggml_tensor* draw_of_vocabulary(ggml_tensor* probs, int64_t slot) {
        ggml_context* ctx = context_.get();
        const int64_t n_chunks = weights_.n_chunks();
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
        return pick_tokens(ggml_reshape_3d(ctx, chunk_ids, 1, weights_.chunk, n_requests_), inside);
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
    // The slot's tokens (n_requests), kept until the host reads them.
    ggml_tensor* pick_tokens(ggml_tensor* ids, ggml_tensor* index) {
        tokens_.push_back(pick_row(ids, index));
        ggml_set_output(tokens_.back());
        return ggml_reshape_1d(context_.get(), tokens_.back(), n_requests_);
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

} // namespace dspark
