// Private to device_weights.cpp and block_graph.cpp, the only files beside llama_api*.cpp that include ggml headers.
// Owns: ggml backends and the sequential head's weights in their memory. Must not know: requests, graphs. Threads: one
// per thread.
#pragma once

#include "sequential_head.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dspark {

[[nodiscard]] ggml_context_ptr make_context(size_t n_tensors, bool has_graph = false);
void upload(ggml_tensor* tensor, const std::vector<float>& values);
void upload(ggml_tensor* tensor, const std::vector<int32_t>& values);

// The device, and the CPU for what the device cannot do.
class Device {
  public:
    Device(const std::string& name, int32_t n_threads);

    [[nodiscard]] bool is_cpu() const { return fallback_ == nullptr; }
    [[nodiscard]] bool supports(const ggml_tensor* operation) const;
    // Memory for the tensors of a context that have none yet. Throws ModelLoadError.
    [[nodiscard]] ggml_backend_buffer_ptr allocate(ggml_context* tensors, ggml_backend_buffer_usage usage) const;
    [[nodiscard]] ggml_backend_sched_ptr make_scheduler(size_t n_nodes) const;

  private:
    struct ThreadpoolDeleter {
        void operator()(ggml_threadpool* pool) const { ggml_threadpool_free(pool); }
    };

    ggml_backend_dev_t device_;
    std::unique_ptr<ggml_threadpool, ThreadpoolDeleter> pool_; // outlives the backend that uses it
    ggml_backend_ptr main_;
    ggml_backend_ptr fallback_; // null on the CPU
};

// `width` entries compete per slot: candidates that the host chose, or the whole draft vocabulary in ascending target
// ids, padded to whole chunks.
struct DeviceWeights {
    // A float running sum over a whole vocabulary would swallow the tail, so it runs over chunks, then inside one.
    static constexpr int64_t kChunk = 512;

    // `n_candidates` = 0, or the draft vocabulary's size and more: all of it competes. `weights` must outlive this.
    DeviceWeights(const HeadWeights& weights, const Device& device, int64_t n_candidates);

    [[nodiscard]] bool has_mix() const { return type != MarkovHeadType::vanilla; }
    [[nodiscard]] int64_t n_mixed() const { return type == MarkovHeadType::rnn ? 3 * rank : rank; }
    [[nodiscard]] int64_t n_chunks() const { return width / chunk; }

    const MarkovHeadType type;
    const int64_t rank;
    const int64_t hidden_size;
    const bool has_map;                    // draft rows are no target ids
    const bool is_full;                    // the whole draft vocabulary competes
    const std::vector<int64_t> row_order;  // draft rows by ascending target id
    const std::vector<int32_t> vocabulary; // those target ids
    const int64_t width;
    const int64_t chunk;
    ggml_tensor* w1 = nullptr;
    ggml_tensor* w2 = nullptr;             // as stored; (width, r) in row_order when the whole vocabulary competes
    ggml_tensor* mix_hidden = nullptr;     // gate or joint, the columns that h meets, f32
    ggml_tensor* mix_embedding = nullptr;  // ... that e meets
    ggml_tensor* mix_state = nullptr;      // ... that s meets
    ggml_tensor* mix_bias = nullptr;       // (n_mixed)
    ggml_tensor* first_in_chunk = nullptr; // (chunk) n, n - 1, ..., 1: the first of several equal entries wins
    ggml_tensor* first_chunk = nullptr;    // (n_chunks) the same
    ggml_tensor* ids = nullptr;            // (n_chunks, chunk) target ids of the whole draft vocabulary

  private:
    void add_tensors(const HeadWeights& weights, const Device& device);
    void lend(ggml_tensor* tensor, const RowTable& table);
    void fill(const HeadWeights& weights);
    void fill_mix(const HeadWeights& weights);

    ggml_context_ptr context_;
    std::vector<ggml_backend_buffer_ptr> buffers_;
};

} // namespace dspark
