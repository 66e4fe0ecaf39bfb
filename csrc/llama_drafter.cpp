#include "llama_drafter.h"

#include "graph_head.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace dspark {

namespace {

constexpr int32_t kInjectRows = 256; // context rows of one injection pass

int32_t inputs_of(const DrafterInfo& info) { return info.block_size + (info.sample_from_anchor ? 0 : 1); }

// The context's own, small sizes: all blocks in one pass (a cut block silently ruins acceptance), a window of rows.
ContextOptions draft_context(const Model& model, const DrafterOptions& options) {
    const DrafterInfo& info = model.drafter_info();
    const int32_t n_blocks = options.n_parallel * inputs_of(info);
    ContextOptions context;
    context.n_batch = context.n_ubatch = std::max(n_blocks, kInjectRows);
    context.n_cells = options.n_parallel * (std::min(options.window, options.n_ctx) + inputs_of(info) + kInjectRows);
    context.n_sequences = options.n_parallel;
    context.n_outputs = n_blocks;
    context.n_threads = options.n_threads;
    context.n_threads_batch = options.n_threads_batch;
    context.embeddings = true;
    context.is_causal = info.is_causal;
    context.kv_type = options.kv_type;
    context.flash_attention_off = options.flash_attention_off;
    return context;
}

std::unique_ptr<SequentialHead> make_head(const Model& model, const DrafterOptions& options) {
    if (options.head == "full") {
        return make_full_head(model.head_weights());
    }
    if (options.head == "candidates") {
        return make_candidate_head(model.head_weights(), options.n_candidates);
    }
    if (options.head == "graph") {
        GraphHeadOptions graph;
        graph.device = model.output_device();
        graph.n_threads = 1; // more never paid on a CPU: the products are tiny
        graph.n_candidates = options.n_candidates;
        graph.max_requests = options.n_parallel;
        return make_graph_head(model.head_weights(), graph);
    }
    throw std::invalid_argument("head must be candidates, full or graph, got " + options.head);
}

} // namespace

LlamaDrafter::LlamaDrafter(std::shared_ptr<Model> model, LlamaTarget& target, const DrafterOptions& options)
    : info_(model->drafter_info()), options_(options), target_(target),
      context_(model, draft_context(*model, options), &target.context()), head_(make_head(*model, options)) {
    if (options.window < 1) {
        throw std::invalid_argument("draft_window must be at least 1, got " + std::to_string(options.window));
    }
    for (const int32_t layer : info_.target_layers) {
        target_.context().tap_layer(layer);
    }
}

void LlamaDrafter::draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) {
    decode_blocks(tasks);
    const size_t n_slots = tasks.size() * static_cast<size_t>(info_.block_size);
    logits_.resize(n_slots);
    hidden_.resize(n_slots);
    inputs_.resize(tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
        read_block(i, tasks[i]);
    }
    head_->draft_blocks(inputs_, drafts);
    // The block's own rows must not stay: the next round's context is what was really committed.
    for (const DraftTask& task : tasks) {
        context_.remove(task.sequence, task.start, -1);
    }
}

// Inputs [anchor, MASK ...] at positions start .. (DESIGN section 2, block), all requests in one pass.
void LlamaDrafter::decode_blocks(std::span<const DraftTask> tasks) {
    rows_.clear();
    for (const DraftTask& task : tasks) {
        for (int32_t k = 0; k < n_inputs(); ++k) {
            rows_.push_back({k == 0 ? task.anchor : info_.mask_token, task.start + k, task.sequence, true});
        }
    }
    context_.decode_tokens(rows_);
    context_.synchronize();
}

void LlamaDrafter::read_block(size_t index, const DraftTask& task) {
    const int32_t first = static_cast<int32_t>(index) * n_inputs() + (info_.sample_from_anchor ? 0 : 1);
    const auto n_slots = static_cast<size_t>(info_.block_size);
    const size_t offset = index * n_slots;
    for (size_t k = 0; k < n_slots; ++k) {
        const int32_t row = first + static_cast<int32_t>(k);
        logits_[offset + k] = context_.logits(row).data();
        hidden_[offset + k] = context_.embedding(row).data();
    }
    BlockInput& input = inputs_[index];
    input = {};
    input.base_logits = std::span(logits_).subspan(offset, n_slots);
    input.hidden = std::span(hidden_).subspan(offset, n_slots);
    input.anchor = task.anchor;
    input.start = static_cast<uint64_t>(task.start);
    input.truncation = task.truncation;
    input.random = task.random;
    input.sampling = task.sampling;
    input.counts = task.counts;
}

// Rows that would fall out of the window at once are not injected at all (long prompts).
void LlamaDrafter::inject(std::span<const ContextRow> rows) {
    std::map<int32_t, int32_t> newest;
    for (const ContextRow& row : rows) {
        newest[row.sequence] = std::max(newest[row.sequence], row.position);
    }
    kept_rows_.clear();
    for (const ContextRow& row : rows) {
        if (row.position > newest[row.sequence] - options_.window) {
            kept_rows_.push_back(row);
        } else if (last_position(row.sequence) >= 0) {
            forget(row.sequence); // what it holds is older still, and positions must stay gapless
        }
    }
    for (size_t begin = 0; begin < kept_rows_.size(); begin += kInjectRows) {
        const size_t n = std::min<size_t>(kInjectRows, kept_rows_.size() - begin);
        inject_chunk(std::span(kept_rows_).subspan(begin, n));
    }
}

void LlamaDrafter::inject_chunk(std::span<const ContextRow> rows) {
    slide_window(rows);
    const size_t n_taps = info_.target_layers.size();
    const auto n_embd = static_cast<size_t>(context_.model().n_embd());
    features_.resize(rows.size() * n_taps * n_embd);
    positions_.clear();
    sequences_.clear();
    for (const ContextRow& row : rows) {
        positions_.push_back(row.position);
        sequences_.push_back(row.sequence);
    }
    for (size_t tap = 0; tap < n_taps; ++tap) {
        const float* layer = target_.context().layer_input(info_.target_layers[tap]).data(); // (n_rows, n_embd)
        for (size_t i = 0; i < rows.size(); ++i) {
            std::memcpy(features_.data() + (i * n_taps + tap) * n_embd,
                        layer + static_cast<size_t>(rows[i].batch_row) * n_embd, n_embd * sizeof(float));
        }
    }
    context_.decode_features(features_, positions_, sequences_);
}

void LlamaDrafter::slide_window(std::span<const ContextRow> rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
        const bool is_newest = i + 1 == rows.size() || rows[i + 1].sequence != rows[i].sequence;
        const int32_t end = rows[i].position + 1 - options_.window;
        if (is_newest && end > 0 && context_.first_position(rows[i].sequence) < end) {
            context_.remove(rows[i].sequence, 0, end);
        }
    }
}

} // namespace dspark
