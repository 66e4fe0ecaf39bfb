// Implements llama_kept_graphs.h.
#include "llama_kept_graphs.h"

#include "graph_search.h"

#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <limits>
#include <map>

namespace dspark {

namespace {

// All shapes of a target's passes and of injections: with fewer, costs measured in turns, size after size, would be
// those of graphs built anew each time (0.3 ms of 0.6 on the demo pair, from the 5th row on).
constexpr size_t kMostGraphs = 34;
// Graphs with outputs beyond which none is added: a block at V = 152k takes 10 MB, those of 8 requests 80 MB. Building
// such a graph is little beside computing it.
constexpr size_t kMostBytes = size_t{32} << 20;
constexpr int32_t kAllocationFailed = -2; // as llama_process() has it
constexpr int32_t kComputeFailed = -3;
constexpr int32_t kAborted = 2;

int32_t status_of(ggml_status status) {
    switch (status) {
    case GGML_STATUS_SUCCESS:
        return 0;
    case GGML_STATUS_ABORTED:
        return kAborted;
    case GGML_STATUS_ALLOC_FAILED:
        return kAllocationFailed;
    default:
        return kComputeFailed;
    }
}

ggml_backend_set_n_threads_t thread_setter(ggml_backend_t backend) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(ggml_backend_get_device(backend));
    return reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_set_n_threads"));
}

} // namespace

struct KeptGraphs::Graph {
    // What llm_graph_params::allow_reuse() compares first, so that a graph is asked only if it may well fit.
    struct Shape {
        bool operator==(const Shape&) const = default;

        bool has_tokens = false;
        bool has_states = false; // of the rows, as an output
        uint32_t n_rows = 0;
        uint32_t n_sequences = 0;
        uint32_t n_outputs = 0;
    };

    explicit Graph(int64_t n_nodes) : result(n_nodes) {}

    Shape shape;
    bool is_built = false;
    llm_graph_result result;
    ggml_tensor* found = nullptr; // what the search leaves, where there is one
    ggml_backend_sched_ptr sched;
};

KeptGraphs::KeptGraphs(llama_context& context, int32_t most_rows)
    : context_(context), model_(context.get_model()), most_rows_(static_cast<size_t>(most_rows)),
      batch_(model_.hparams.n_pos_per_embd()), layers_(context.get_cparams().embeddings_layer_inp.size()) {
    ggml_backend_sched_t sched = context.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t backend = ggml_backend_sched_get_backend(sched, i);
        backends_.push_back(backend);
        buffer_types_.push_back(ggml_backend_sched_get_buffer_type(sched, backend));
        if (const auto setter = thread_setter(backend)) {
            threaded_.emplace_back(backend, setter);
        }
    }
}

KeptGraphs::~KeptGraphs() = default;

std::optional<int32_t> KeptGraphs::process(const llama_batch_ext& batch) {
    if (std::exchange(is_stale_, false)) {
        silent_.clear();
        telling_.clear();
    }
    const llama_cparams& options = context_.get_cparams();
    const bool has_wrong_width = batch.n_embd > 0 && batch.n_embd != batch.n_embd_inp;
    if (batch.tokens.size() > most_rows_ || has_wrong_width || !batch_.init(batch, model_.vocab, options.embeddings)) {
        return std::nullopt;
    }
    context_.memory_update(false); // rotates the keys of cells that were moved
    const llama_memory_context_ptr memory =
        context_.get_memory()->init_batch(batch_, options.n_ubatch, options.embeddings);
    if (!memory || memory->get_status() != LLAMA_MEMORY_STATUS_SUCCESS || !is_whole(memory->get_ubatch())) {
        return std::nullopt;
    }
    outputs_.assign(batch_.get_n_tokens(), -1);
    int32_t n_outputs = 0;
    for (const int32_t row : batch_.get_out_ids()) {
        outputs_[static_cast<size_t>(row)] = n_outputs++;
    }
    const int32_t status = compute(*memory);
    if (status != 0) {
        forget_rows(memory->get_ubatch());
    }
    return status;
}

bool KeptGraphs::is_whole(const llama_ubatch& pass) const {
    return pass.n_tokens == batch_.get_n_tokens() && pass.data != nullptr &&
           std::is_sorted(pass.data->batch_idxs.begin(), pass.data->batch_idxs.end());
}

int32_t KeptGraphs::compute(llama_memory_context_i& memory) {
    if (!memory.apply()) {
        return kComputeFailed;
    }
    const llama_ubatch& pass = memory.get_ubatch();
    Graph& graph = graph_for(pass);
    const llm_graph_params params = graph_params(graph, pass, memory);
    if (!(graph.is_built && graph.result.can_reuse(params)) && !build(graph, params)) {
        return kAllocationFailed;
    }
    graph.result.set_inputs(&pass);
    set_threads(pass.n_tokens > 1);
    const ggml_status status = ggml_backend_sched_graph_compute(graph.sched.get(), graph.result.get_gf());
    if (status != GGML_STATUS_SUCCESS) {
        graph.is_built = false;
        return status_of(status);
    }
    find_results(graph);
    return 0;
}

void KeptGraphs::find_results(Graph& graph) {
    logits_.point_to(graph.result.get_logits());
    found_.point_to(graph.found);
    states_.point_to(graph.shape.has_states ? graph.result.get_embd() : nullptr);
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        if (context_.get_cparams().embeddings_layer_inp[layer]) {
            layers_[layer].point_to(graph.result.get_layer_inp(static_cast<int>(layer)));
        }
    }
}

// The graph of this shape, or one for it that is not built.
KeptGraphs::Graph& KeptGraphs::graph_for(const llama_ubatch& pass) {
    Graph::Shape shape;
    shape.has_tokens = pass.token != nullptr;
    shape.has_states = context_.get_cparams().embeddings;
    shape.n_rows = pass.n_tokens;
    shape.n_sequences = mixes_sequences(pass) ? pass.n_seqs_unq : 1;
    shape.n_outputs = batch_.get_n_outputs();
    Graphs& graphs = shape.n_outputs > 0 ? telling_ : silent_;
    const auto at = std::find_if(graphs.begin(), graphs.end(), [&](const auto& one) { return one->shape == shape; });
    if (at != graphs.end()) {
        std::rotate(graphs.begin(), at, at + 1);
        return *graphs.front();
    }
    Graph& graph = empty_graph(graphs);
    graph.shape = shape;
    graph.is_built = false;
    return graph;
}

// Whether a graph depends on how many sequences there are. With a plain unified cache none does, but for a drafter's
// blocks; nor do rows that are injected, which meet no others.
bool KeptGraphs::mixes_sequences(const llama_ubatch& pass) const {
    const llama_cparams& options = context_.get_cparams();
    const bool is_plain = dynamic_cast<const llama_kv_cache*>(context_.get_memory()) != nullptr ||
                          dynamic_cast<const llama_kv_cache_iswa*>(context_.get_memory()) != nullptr;
    const bool is_one_stream = is_plain && options.kv_unified && options.pooling_type == LLAMA_POOLING_TYPE_NONE;
    return pass.equal_seqs() || !is_one_stream || (model_.arch == LLM_ARCH_DFLASH && pass.token != nullptr);
}

// A new one while there is room. Else another shape's, with its buffers: the largest, so that few become large.
KeptGraphs::Graph& KeptGraphs::empty_graph(Graphs& graphs) const {
    size_t n_bytes = 0;
    auto largest = graphs.begin();
    for (auto at = graphs.begin(); at != graphs.end(); ++at) {
        n_bytes += bytes_of(**at);
        largest = bytes_of(**at) > bytes_of(**largest) ? at : largest;
    }
    if (n_bytes >= kMostBytes) {
        std::rotate(graphs.begin(), largest, largest + 1);
    } else if (graphs.size() == kMostGraphs) {
        std::rotate(graphs.begin(), graphs.end() - 1, graphs.end());
    } else {
        const int64_t n_nodes = context_.get_gf_res_reserve()->get_max_nodes();
        auto graph = std::make_unique<Graph>(n_nodes);
        graph->sched.reset(ggml_backend_sched_new(const_cast<ggml_backend_t*>(backends_.data()),
                                                  const_cast<ggml_backend_buffer_type_t*>(buffer_types_.data()),
                                                  static_cast<int>(backends_.size()), static_cast<size_t>(n_nodes),
                                                  false, context_.get_cparams().op_offload));
        graphs.insert(graphs.begin(), std::move(graph));
    }
    return *graphs.front();
}

llm_graph_params KeptGraphs::graph_params(Graph& graph, const llama_ubatch& pass,
                                          const llama_memory_context_i& memory) const {
    llm_graph_params params{.arch = model_.arch,
                            .hparams = model_.hparams, // 60 KB: constructed in place
                            .cparams = context_.get_cparams(),
                            .ubatch = pass,
                            .gtype = LLM_GRAPH_TYPE_DEFAULT,
                            .sched = graph.sched.get(),
                            .backend_cpu = backends_.back(),
                            .cvec = &no_control_vector_,
                            .loras = &no_adapters_,
                            .mctx = &memory,
                            .cross = &no_encoder_,
                            .prec_policy = &model_.prec_policy,
                            .samplers = {},
                            .n_outputs = graph.shape.n_outputs,
                            .cb = name_tensor,
                            .res = &graph.result};
    params.ubatch.n_seqs_unq = graph.shape.n_sequences;
    return params;
}

// Called for every tensor of a graph under construction.
void KeptGraphs::name_tensor(const llama_ubatch& /*pass*/, ggml_tensor* tensor, const char* name, int layer) {
    if (layer < 0) {
        ggml_set_name(tensor, name);
    } else {
        ggml_format_name(tensor, "%s-%d", name, layer);
    }
}

bool KeptGraphs::build(Graph& graph, const llm_graph_params& params) {
    ++n_built_;
    graph.is_built = false;
    graph.result.reset();
    ggml_backend_sched_reset(graph.sched.get());
    ggml_cgraph* nodes = model_.build_graph(params);
    ggml_tensor* logits = graph.result.get_logits();
    const bool is_searched = nodes != nullptr && logits != nullptr && n_searched_ > 0;
    graph.found = is_searched ? append_search(graph.result.get_ctx(), nodes, logits, n_searched_) : nullptr;
    if (nodes == nullptr || !ggml_backend_sched_alloc_graph(graph.sched.get(), nodes)) {
        return false;
    }
    graph.is_built = true;
    count_bytes();
    return true;
}

void KeptGraphs::set_threads(bool is_batch) const {
    const auto n_threads = is_batch ? context_.n_threads_batch() : context_.n_threads();
    for (const auto& [backend, set] : threaded_) {
        set(backend, static_cast<int>(n_threads));
    }
}

// Rows of a pass that failed are in no sequence.
void KeptGraphs::forget_rows(const llama_ubatch& pass) {
    std::map<llama_seq_id, llama_pos> first;
    for (uint32_t row = 0; row < pass.n_tokens; ++row) {
        const auto [at, is_new] = first.try_emplace(pass.seq_id[row][0], pass.pos[row]);
        at->second = std::min(at->second, pass.pos[row]);
    }
    for (const auto& [sequence, position] : first) {
        context_.get_memory()->seq_rm(sequence, position, -1);
    }
}

int32_t KeptGraphs::output_of(int32_t row) const { return outputs_.at(static_cast<size_t>(row)); }

const float* KeptGraphs::logits(int32_t row) const {
    const int32_t output = output_of(row);
    return output < 0 || logits_.data == nullptr ? nullptr : logits_.row(output);
}

void KeptGraphs::search_logits(int32_t k) {
    n_searched_ = k;
    drop();
}

std::span<const Ranked> KeptGraphs::largest(int32_t row) const {
    const int32_t output = output_of(row);
    if (output < 0 || found_.data == nullptr) {
        return {};
    }
    const auto* found = reinterpret_cast<const Ranked*>(found_.row(output));
    return {found + 1, static_cast<size_t>(std::max(found->id, 0))};
}

const float* KeptGraphs::state(int32_t row) const {
    const int32_t output = output_of(row);
    return output < 0 || states_.data == nullptr ? nullptr : states_.row(output);
}

const float* KeptGraphs::layer_input(int32_t layer) const { return layers_.at(static_cast<size_t>(layer)).data; }

size_t KeptGraphs::bytes_of(const Graph& graph) const {
    size_t n_bytes = graph.result.buf_compute_meta.size();
    for (ggml_backend_t backend : backends_) {
        n_bytes += ggml_backend_sched_get_buffer_size(graph.sched.get(), backend);
    }
    return n_bytes;
}

void KeptGraphs::count_bytes() {
    size_t n_bytes = 0;
    for (const Graphs* graphs : {&silent_, &telling_}) {
        for (const auto& graph : *graphs) {
            n_bytes += bytes_of(*graph);
        }
    }
    *n_bytes_ = n_bytes;
}

void KeptGraphs::Result::point_to(const ggml_tensor* tensor) {
    data = tensor == nullptr ? nullptr : static_cast<const float*>(tensor->data);
    width = tensor == nullptr ? 0 : static_cast<size_t>(tensor->ne[0]);
}

} // namespace dspark
