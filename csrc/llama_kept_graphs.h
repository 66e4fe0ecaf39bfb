// Forward passes on a llama_context's memory and backends whose graphs are kept by shape. llama_context remembers the
// newest graph only: where passes of several shapes alternate, as a drafter's injections and blocks do and a target's
// rounds of several lengths, it builds, splits and allocates one for every pass, and it copies what comes out. Here
// each shape has a graph and buffers of its own, and results are read where they lie. For models on the CPU alone.
// Owns: graphs, their buffers. Must not know: requests, what a pass is for. Threads: the context's.
#pragma once

#include "top_k.h"

#include "llama-context.h"

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace dspark {

class KeptGraphs {
  public:
    // The context must outlive this.
    KeptGraphs(llama_context& context, int32_t most_rows);
    ~KeptGraphs();
    KeptGraphs(const KeptGraphs&) = delete;
    KeptGraphs& operator=(const KeptGraphs&) = delete;

    // llama_process() with its status. Nothing where that has to be asked: there are more rows, there is no room, the
    // batch is wrong, or llama.cpp would cut it or change the order of its rows.
    [[nodiscard]] std::optional<int32_t> process(const llama_batch_ext& batch);

    // From now on passes whose logits are the host's leave the k largest of each row beside them; 0: none.
    void search_logits(int32_t k);

    // Of the last pass, by batch row; dead after the next pass. Rows without an output have neither.
    [[nodiscard]] const float* logits(int32_t row) const; // (n_vocab)
    // As TopSearch::top() gives them; empty: not searched, or a row that scan() refuses.
    [[nodiscard]] std::span<const Ranked> largest(int32_t row) const;
    [[nodiscard]] const float* state(int32_t row) const;         // (n_embd)
    [[nodiscard]] const float* layer_input(int32_t layer) const; // (n_rows, n_embd) of a tapped layer
    void drop() { is_stale_ = true; } // graphs, before the next pass: other layers are tapped

    // Any thread may look.
    [[nodiscard]] std::shared_ptr<const std::atomic<size_t>> n_bytes() const { return n_bytes_; }
    [[nodiscard]] int64_t n_built() const { return n_built_; }

  private:
    struct Graph;
    using Graphs = std::vector<std::unique_ptr<Graph>>; // the last used first

    // A result of the last pass, where it was computed.
    struct Result {
        void point_to(const ggml_tensor* tensor);
        [[nodiscard]] const float* row(int32_t index) const { return data + static_cast<size_t>(index) * width; }

        const float* data = nullptr;
        size_t width = 0;
    };

    static void name_tensor(const llama_ubatch& pass, ggml_tensor* tensor, const char* name, int layer);
    void find_results(Graph& graph);
    [[nodiscard]] bool mixes_sequences(const llama_ubatch& pass) const;
    [[nodiscard]] bool is_whole(const llama_ubatch& pass) const;
    [[nodiscard]] int32_t compute(llama_memory_context_i& memory);
    [[nodiscard]] Graph& graph_for(const llama_ubatch& pass);
    [[nodiscard]] Graph& empty_graph(Graphs& graphs) const;
    [[nodiscard]] llm_graph_params graph_params(Graph& graph, const llama_ubatch& pass,
                                                const llama_memory_context_i& memory) const;
    [[nodiscard]] bool build(Graph& graph, const llm_graph_params& params);
    [[nodiscard]] size_t bytes_of(const Graph& graph) const;
    void count_bytes();
    void set_threads(bool is_batch) const;
    void forget_rows(const llama_ubatch& pass);
    [[nodiscard]] int32_t output_of(int32_t row) const;

    llama_context& context_;
    const llama_model& model_;
    const size_t most_rows_;
    std::vector<ggml_backend_t> backends_; // the context's, and where each of them computes
    std::vector<ggml_backend_buffer_type_t> buffer_types_;
    std::vector<std::pair<ggml_backend_t, ggml_backend_set_n_threads_t>> threaded_;
    // What a context may have beside its model, and this one has not.
    llama_adapter_cvec no_control_vector_;
    llama_adapter_loras no_adapters_;
    llama_cross no_encoder_;

    llama_batch_allocr batch_;
    Graphs silent_;  // without outputs
    Graphs telling_; // with outputs: their buffers hold logits and are large
    int64_t n_built_ = 0;
    bool is_stale_ = false;
    std::shared_ptr<std::atomic<size_t>> n_bytes_ = std::make_shared<std::atomic<size_t>>(0);
    std::vector<int32_t> outputs_; // of the last pass, by batch row; -1: none
    int32_t n_searched_ = 0;       // of a row's logits
    Result logits_;
    Result found_; // rows of TopRows::out
    Result states_;
    std::vector<Result> layers_;
};

} // namespace dspark
