// One llama.cpp context: batches in, logits, states and layer inputs out.
#include "kernels/kernels.h"
#include "llama_api_impl.h"
#include "llama_kept_graphs.h"
#include "thread_choice.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <limits>

namespace dspark {

struct Context::Impl {
    ContextOptions options;
    llama_context* context = nullptr;
    llama_batch_ext* batch = nullptr;
    int32_t n_positions = 1; // per feature row: 4 for M-RoPE drafters
    int32_t n_rows = 0;      // of the last decode
    std::vector<bool> has_output;
    std::vector<bool> is_tapped;
    std::vector<int32_t> n_shared; // by sequence: cells before this position may belong to others too
    bool may_choose_threads = false;
    ThreadChoice token_threads;
    ThreadChoice feature_threads;
    std::unique_ptr<KeptGraphs> graphs; // null: the context's own
    bool is_kept = false;               // the last pass was one of `graphs`

    ~Impl() {
        graphs.reset();
        if (batch != nullptr) {
            llama_batch_ext_free(batch);
        }
        llama_free(context);
    }
};

namespace {

llama_context_params context_params(const ContextOptions& options) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(options.n_cells);
    params.n_batch = static_cast<uint32_t>(options.n_batch);
    params.n_ubatch = static_cast<uint32_t>(options.n_ubatch);
    params.n_seq_max = static_cast<uint32_t>(options.n_sequences);
    params.n_outputs_max = static_cast<uint32_t>(std::max(options.n_outputs, options.n_sequences));
    params.n_threads = options.n_threads;
    params.n_threads_batch = options.n_threads_batch;
    params.n_rs_seq = static_cast<uint32_t>(options.n_rollback);
    params.embeddings = options.embeddings;
    params.attention_type = options.is_causal ? LLAMA_ATTENTION_TYPE_CAUSAL : LLAMA_ATTENTION_TYPE_NON_CAUSAL;
    params.flash_attn_type = options.flash_attention_off ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
    params.offload_kqv = options.offload_kv;
    // One decode is one forward pass only with a unified cache (DESIGN section 4).
    params.kv_unified = true;
    return params;
}

ggml_type parse_kv_type(const std::string& name) {
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw std::invalid_argument("kv_type must be one of f32, f16, bf16, q8_0, q4_0, got " + name);
}

void check_options(const ContextOptions& options) {
    auto require = [](bool holds, const std::string& message) {
        if (!holds) {
            throw std::invalid_argument(message);
        }
    };
    require(options.n_sequences >= 1 && options.n_sequences <= static_cast<int32_t>(llama_max_parallel_sequences()),
            "n_parallel must be in 1 .. " + std::to_string(llama_max_parallel_sequences()) + ", got " +
                std::to_string(options.n_sequences));
    require(options.n_cells >= 1, "the KV cache must have at least one cell, got " + std::to_string(options.n_cells));
    require(options.n_batch >= 1 && options.n_ubatch >= 1 && options.n_ubatch <= options.n_batch,
            "batch sizes must satisfy 1 <= n_ubatch <= n_batch, got " + std::to_string(options.n_ubatch) + " and " +
                std::to_string(options.n_batch));
    require(options.n_threads >= 1 && options.n_threads_batch >= 1 && options.n_threads <= 512 &&
                options.n_threads_batch <= 512,
            "n_threads must be in 1 .. 512, got " + std::to_string(options.n_threads));
}

} // namespace

Context::Context(std::shared_ptr<Model> model, const ContextOptions& options, Context* other)
    : model_(std::move(model)), impl_(std::make_unique<Impl>()) {
    check_options(options);
    impl_->options = options;
    llama_context_params params = context_params(options);
    params.type_k = params.type_v = parse_kv_type(options.kv_type);
    params.ctx_other = other == nullptr ? nullptr : other->impl_->context;
    clear_error();
    const AbortGuard guard;
    impl_->context = llama_init_from_model(model_->impl().model, params);
    if (impl_->context == nullptr) {
        throw ModelLoadError("cannot make a context for " + model_->path() + ": " +
                             take_error("llama.cpp gave no reason"));
    }
    // With a GPU llama.cpp's own passes: graphs that are kept crashed Mesa's software Vulkan driver
    // (docs/DECISIONS.md).
    const bool is_on_cpu = llama_model_n_devices(model_->impl().model) == 0;
    if (options.n_kept_rows > 0 && is_on_cpu) {
        impl_->graphs = std::make_unique<KeptGraphs>(*impl_->context, options.n_kept_rows);
    }
    impl_->batch = llama_batch_ext_init(impl_->context);
    impl_->n_positions = llama_model_rope_type(model_->impl().model) == LLAMA_ROPE_TYPE_MROPE ? 4 : 1;
    impl_->is_tapped.assign(static_cast<size_t>(model_->n_layer()) + 1, false);
    impl_->n_shared.assign(static_cast<size_t>(options.n_sequences), 0);
    impl_->may_choose_threads =
        model_->uses_kernels() && is_on_cpu && std::max(options.n_threads, options.n_threads_batch) > 1;
}

Context::~Context() = default;

namespace {

int32_t decode(Context::Impl& impl) {
    const std::optional<int32_t> status = impl.graphs ? impl.graphs->process(*impl.batch) : std::nullopt;
    impl.is_kept = status.has_value();
    return status ? *status : llama_process(impl.context, LLAMA_PROCESS_TYPE_DECODE, impl.batch);
}

// The number of threads depends on time, which no text may: where a sum's order follows it (ggml's attention), it is
// left as it is from the first pass on.
int32_t process(Context::Impl& impl, int32_t n_rows, ThreadChoice& threads) {
    const bool is_alone = impl.may_choose_threads && threads.is_alone(n_rows);
    llama_set_n_threads(impl.context, is_alone ? 1 : impl.options.n_threads,
                        is_alone ? 1 : impl.options.n_threads_batch);
    const uint64_t n_foreign = kernels::n_foreign_attention();
    const auto begin = std::chrono::steady_clock::now();
    const int32_t status = decode(impl);
    const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - begin;
    impl.may_choose_threads &= kernels::n_foreign_attention() == n_foreign;
    if (impl.may_choose_threads) {
        threads.observe(n_rows, ms.count());
    }
    return status;
}

void run(Context::Impl& impl, const Model& model, int32_t n_rows, ThreadChoice& threads) {
    clear_error();
    kernels::set_enabled(model.impl().use_kernels);
    const int32_t status = process(impl, n_rows, threads);
    if (status == 0) {
        return;
    }
    impl.n_rows = 0;
    if (status == 1) {
        throw DecodeError("cannot decode a batch: no room in the KV cache");
    }
    throw DecodeError("cannot decode a batch: " + take_error("status " + std::to_string(status)));
}

void check_size(const Context::Impl& impl, size_t n_rows) {
    if (n_rows == 0 || n_rows > llama_n_batch(impl.context)) {
        throw DecodeError("cannot decode a batch: it must have 1 to " + std::to_string(llama_n_batch(impl.context)) +
                          " rows, got " + std::to_string(n_rows));
    }
}

} // namespace

void Context::decode_tokens(std::span<const BatchRow> rows) {
    Impl& impl = *impl_;
    check_size(impl, rows.size());
    llama_batch_ext_clear(impl.batch);
    impl.has_output.assign(rows.size(), false);
    int32_t n_outputs = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
        const BatchRow& row = rows[i];
        const int32_t index = llama_batch_ext_add_token(impl.batch, row.sequence, row.token);
        if (index < 0) {
            throw DecodeError("cannot decode a batch: bad token " + std::to_string(row.token) + " or sequence " +
                              std::to_string(row.sequence));
        }
        const bool output = row.output || impl.options.embeddings;
        llama_batch_ext_set_pos(impl.batch, index, &row.position);
        llama_batch_ext_set_output_logits(impl.batch, index, output);
        impl.has_output[i] = output;
        n_outputs += output ? 1 : 0;
    }
    if (n_outputs > std::max(impl.options.n_outputs, impl.options.n_sequences)) {
        throw DecodeError("cannot decode a batch: at most " + std::to_string(impl.options.n_outputs) +
                          " rows may have outputs, got " + std::to_string(n_outputs));
    }
    impl.n_rows = static_cast<int32_t>(rows.size());
    run(impl, *model_, impl.n_rows, impl.token_threads);
}

void Context::decode_features(std::span<const float> features, std::span<const int32_t> positions,
                              std::span<const int32_t> sequences, bool outputs) {
    Impl& impl = *impl_;
    const size_t n_rows = positions.size();
    check_size(impl, n_rows);
    const size_t n_features = features.size() / n_rows;
    llama_batch_ext_clear(impl.batch);
    for (size_t i = 0; i < n_rows; ++i) {
        const llama_embd row{features.data() + i * n_features, 1, n_features};
        const int32_t index = llama_batch_ext_add_embd(impl.batch, sequences[i], row);
        if (index < 0) {
            throw DecodeError("cannot inject features: bad row width " + std::to_string(n_features) + " or sequence " +
                              std::to_string(sequences[i]));
        }
        const std::array<llama_pos, 4> position = {positions[i], positions[i], positions[i], 0};
        llama_batch_ext_set_pos(impl.batch, index, position.data());
        llama_batch_ext_set_output_logits(impl.batch, index, outputs);
    }
    impl.has_output.assign(n_rows, false); // no logits, whatever else is read
    impl.n_rows = outputs ? static_cast<int32_t>(n_rows) : 0;
    // With embeddings on, llama.cpp makes an output, V floats wide, of every row: off while injecting.
    llama_set_embeddings(impl.context, outputs);
    try {
        run(impl, *model_, static_cast<int32_t>(n_rows), impl.feature_threads);
    } catch (...) {
        llama_set_embeddings(impl.context, impl.options.embeddings);
        throw;
    }
    llama_set_embeddings(impl.context, impl.options.embeddings);
}

std::span<const float> Context::logits(int32_t row) {
    if (row < 0 || row >= impl_->n_rows || !impl_->has_output[static_cast<size_t>(row)]) {
        throw std::logic_error("logits of row " + std::to_string(row) + " were not asked for");
    }
    const float* logits = impl_->is_kept ? impl_->graphs->logits(row) : llama_get_logits_ith(impl_->context, row);
    return {logits, static_cast<size_t>(model_->n_vocab())};
}

void Context::search_logits(int32_t k) {
    if (impl_->graphs) {
        impl_->graphs->search_logits(k);
    }
}

std::span<const Ranked> Context::largest_logits(int32_t row) {
    const bool is_there = row >= 0 && row < impl_->n_rows && impl_->is_kept;
    return is_there ? impl_->graphs->largest(row) : std::span<const Ranked>{};
}

std::span<const float> Context::embedding(int32_t row) {
    if (row < 0 || row >= impl_->n_rows || !impl_->options.embeddings) {
        throw std::logic_error("the state of row " + std::to_string(row) + " was not asked for");
    }
    const float* state = impl_->is_kept ? impl_->graphs->state(row) : llama_get_embeddings_ith(impl_->context, row);
    return {state, static_cast<size_t>(model_->n_embd())};
}

std::span<const float> Context::layer_input(int32_t layer) const {
    if (layer < 0 || static_cast<size_t>(layer) >= impl_->is_tapped.size() ||
        !impl_->is_tapped[static_cast<size_t>(layer)] || impl_->n_rows == 0) {
        throw std::logic_error("layer " + std::to_string(layer) + " is not tapped or nothing was decoded");
    }
    const size_t n = static_cast<size_t>(impl_->n_rows) * static_cast<size_t>(model_->n_embd());
    const float* states = impl_->is_kept ? impl_->graphs->layer_input(layer)
                                         : llama_get_embeddings_layer_inp(impl_->context, static_cast<uint32_t>(layer));
    return {states, n};
}

void Context::tap_layer(int32_t layer) {
    if (!model_->can_tap_layers()) {
        throw ModelMismatchError("cannot tap layers of architecture " + model_->architecture());
    }
    if (layer < 0 || layer > model_->last_tappable_layer()) {
        throw ModelMismatchError("tapped layers must lie in 0 .. " + std::to_string(model_->last_tappable_layer()) +
                                 ", got " + std::to_string(layer));
    }
    llama_set_embeddings_layer_inp(impl_->context, static_cast<uint32_t>(layer), true);
    impl_->is_tapped[static_cast<size_t>(layer)] = true;
    if (impl_->graphs) {
        impl_->graphs->drop();
    }
}

void Context::remove(int32_t sequence, int32_t begin, int32_t end) {
    if (!llama_memory_seq_rm(llama_get_memory(impl_->context), sequence, begin, end)) {
        throw DecodeError("cannot remove positions from sequence " + std::to_string(sequence) +
                          ": the model's memory does not allow it");
    }
    if (end < 0) {
        int32_t& n_shared = impl_->n_shared[static_cast<size_t>(sequence)];
        n_shared = std::min(n_shared, begin);
    }
}

void Context::copy(int32_t from, int32_t to, int32_t begin, int32_t end) {
    llama_memory_seq_cp(llama_get_memory(impl_->context), from, to, begin, end);
    for (const int32_t sequence : {from, to}) {
        int32_t& n_shared = impl_->n_shared[static_cast<size_t>(sequence)];
        n_shared = std::max(n_shared, end);
    }
}

void Context::shift(int32_t sequence, int32_t begin, int32_t n) {
    if (impl_->n_shared[static_cast<size_t>(sequence)] > begin + n) {
        own_cells(sequence);
    }
    remove(sequence, begin, begin + n);
    llama_memory_seq_add(llama_get_memory(impl_->context), sequence, begin + n, -1, -n);
}

// A shared cell has one position for all its sequences: before it moves for one, that one gets a copy. There is room:
// the cache holds a full context for every sequence.
void Context::own_cells(int32_t sequence) {
    std::vector<uint8_t> state(llama_state_seq_get_size(impl_->context, sequence));
    const size_t n_written = llama_state_seq_get_data(impl_->context, state.data(), state.size(), sequence);
    remove(sequence, 0, -1);
    if (n_written == 0 || llama_state_seq_set_data(impl_->context, state.data(), n_written, sequence) == 0) {
        throw DecodeError("cannot copy the cells of sequence " + std::to_string(sequence) + ": " +
                          take_error("llama.cpp gave no reason"));
    }
}

bool Context::can_shift() const { return can_share() && llama_memory_can_shift(llama_get_memory(impl_->context)); }

// A cache with a sliding window gives up the cells behind it, a recurrent state cannot be cut: sharing asks for
// neither.
bool Context::can_share() const {
    const bool is_plain = dynamic_cast<const llama_kv_cache*>(llama_get_memory(impl_->context)) != nullptr;
    return is_plain && llama_model_n_swa(model_->impl().model) == 0;
}

// llama.cpp keeps the states of a pass's last rows in turn, as many as n_rs_seq says.
int32_t Context::max_rollback() const {
    return model_->has_state() ? static_cast<int32_t>(llama_n_rs_seq(impl_->context))
                               : std::numeric_limits<int32_t>::max();
}

void Context::clear() { llama_memory_clear(llama_get_memory(impl_->context), true); }

int32_t Context::last_position(int32_t sequence) const {
    return llama_memory_seq_pos_max(llama_get_memory(impl_->context), sequence);
}

int32_t Context::first_position(int32_t sequence) const {
    return llama_memory_seq_pos_min(llama_get_memory(impl_->context), sequence);
}

void Context::synchronize() { llama_synchronize(impl_->context); }

int64_t Context::n_graphs_built() const { return impl_->graphs ? impl_->graphs->n_built() : 0; }

std::shared_ptr<const std::atomic<size_t>> Context::kept_bytes() const {
    return impl_->graphs ? impl_->graphs->n_bytes() : nullptr;
}

size_t Context::memory_bytes() const {
    size_t n_bytes = 0;
    for (const auto& [type, data] : llama_get_memory_breakdown(impl_->context)) {
        n_bytes += data.context + data.compute;
    }
    return n_bytes;
}

} // namespace dspark
