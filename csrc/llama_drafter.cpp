#include "llama_drafter.h"

#include "graph_head.h"
#include "request.h"

#include <algorithm>

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
    context.n_kept_rows = options.keep_graphs ? context.n_batch : 0;
    return context;
}

std::unique_ptr<SequentialHead> make_head(const Model& model, const DrafterOptions& options) {
    if (options.head == "full") {
        return make_full_head(model.head_weights());
    }
    if (options.head == "candidates") {
        return make_candidate_head(model.head_weights(), options.n_candidates, kDefaultFollowers);
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

std::vector<std::unique_ptr<SequentialHead>> make_heads(const Model& model, const DrafterOptions& options) {
    constexpr size_t kMost = 8;
    const bool is_shared = options.workers && options.head != "graph"; // a graph computes all requests at once
    const size_t n_workers = is_shared ? std::min(options.workers->n_workers(), kMost) : 1;
    std::vector<std::unique_ptr<SequentialHead>> heads(std::min(n_workers, static_cast<size_t>(options.n_parallel)));
    const auto make = [&](size_t i, size_t) { heads[i] = make_head(model, options); };
    if (heads.size() > 1) {
        options.workers->run(heads.size(), make);
    } else {
        make(0, 0);
    }
    return heads;
}

} // namespace

LlamaDrafter::LlamaDrafter(std::shared_ptr<Model> model, LlamaTarget& target, const DrafterOptions& options)
    : info_(model->drafter_info()), options_(options), target_(target),
      context_(model, draft_context(*model, options), &target.context()), heads_(make_heads(*model, options)),
      searches_(options.workers ? options.workers->n_workers() : 0),
      queue_(info_.target_layers.size() * static_cast<size_t>(model->n_embd()), options.n_parallel, options.window) {
    if (options.window < 1) {
        throw std::invalid_argument("draft_window must be at least 1, got " + std::to_string(options.window));
    }
    context_.search_logits(heads_.front()->n_searched());
}

void LlamaDrafter::draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) {
    drafting_.clear();
    for (const DraftTask& task : tasks) {
        drafting_.push_back(task.sequence);
    }
    flush(drafting_);
    const auto begin = Clock::now();
    decode_blocks(tasks);
    times_.forward_ms += milliseconds_since(begin);
    draft_heads(tasks, drafts);
    // The block's own rows must not stay: the next round's context is what was really committed.
    for (const DraftTask& task : tasks) {
        context_.remove(task.sequence, task.start, -1);
    }
}

void LlamaDrafter::draft_heads(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) {
    const auto begin = Clock::now();
    const size_t n_slots = tasks.size() * static_cast<size_t>(info_.block_size);
    logits_.resize(n_slots);
    hidden_.resize(n_slots);
    largest_.resize(n_slots);
    inputs_.resize(tasks.size());
    for (size_t i = 0; i < tasks.size(); ++i) {
        read_block(i, tasks[i]);
    }
    search_rows();
    run_heads(tasks, drafts);
    times_.head_ms += milliseconds_since(begin);
}

// The largest U of all slots of all requests, which nothing drafted can change, where the pass did not look for them:
// by all threads there are. Alone a head looks for itself, a slot ahead.
void LlamaDrafter::search_rows() {
    const int32_t k = heads_.front()->n_searched();
    if (!searches_.empty() && k > 0 && std::ranges::any_of(largest_, [](const auto& row) { return row.empty(); })) {
        found_.resize(logits_.size());
        const auto n_vocab = static_cast<size_t>(context_.model().n_vocab());
        options_.workers->run(logits_.size(), [&](size_t row, size_t worker) {
            TopSearch& search = searches_[worker];
            if (search.scan({logits_[row], n_vocab})) { // else the head says what is wrong with it
                const std::span<const Ranked> found = search.top(k);
                found_[row].assign(found.begin(), found.end());
                largest_[row] = found_[row];
            }
        });
    }
    const auto n_slots = static_cast<size_t>(info_.block_size);
    for (size_t i = 0; i < inputs_.size(); ++i) {
        const auto rows = std::span<const std::span<const Ranked>>(largest_).subspan(i * n_slots, n_slots);
        if (std::ranges::none_of(rows, [](const auto& row) { return row.empty(); })) {
            inputs_[i].largest = rows;
        }
    }
}

void LlamaDrafter::run_heads(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) {
    if (heads_.size() == 1) {
        heads_.front()->draft_blocks(inputs_, drafts);
        return;
    }
    const auto draft_with = [&](size_t head, size_t) {
        for (size_t i = 0; i < tasks.size(); ++i) {
            if (static_cast<size_t>(tasks[i].sequence) % heads_.size() == head) {
                heads_[head]->draft_blocks(std::span(inputs_).subspan(i, 1), drafts.subspan(i, 1));
            }
        }
    };
    if (tasks.size() == 1) {
        draft_with(static_cast<size_t>(tasks.front().sequence) % heads_.size(), 0);
    } else {
        options_.workers->run(heads_.size(), draft_with);
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
        largest_[offset + k] = context_.largest_logits(row);
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

void LlamaDrafter::begin_recording() {
    if (std::exchange(is_recording_, true)) {
        return;
    }
    for (const int32_t layer : info_.target_layers) {
        target_.context().tap_layer(layer);
    }
}

void LlamaDrafter::remove(int32_t sequence, int32_t begin) {
    queue_.remove(sequence, begin);
    context_.remove(sequence, begin, -1);
}

void LlamaDrafter::copy(int32_t from, int32_t to, int32_t end) {
    forget(to);
    context_.copy(from, to, 0, end);
    queue_.copy(from, to, end);
}

// Waiting rows move too; those before the gap must first stand in the cache, since a queue holds one gapless run.
void LlamaDrafter::shift(int32_t sequence, int32_t begin, int32_t n) {
    if (queue_.n_rows(sequence) > 0 && queue_.first_position(sequence) < begin + n) {
        flush({&sequence, 1});
    }
    queue_.shift(sequence, n);
    context_.shift(sequence, begin, n);
}

// Rows that left the window are gone: of a text cut further back at least half a window must remain.
int32_t LlamaDrafter::reusable(int32_t sequence, int32_t n) const {
    const int32_t end = std::min(n, last_position(sequence) + 1);
    const int32_t last_injected = context_.last_position(sequence);
    const bool has_injected =
        last_injected >= 0 && (queue_.n_rows(sequence) == 0 || last_injected + 1 >= queue_.first_position(sequence));
    const int32_t first = has_injected ? context_.first_position(sequence) : queue_.first_position(sequence);
    return end > first && (first == 0 || end - first >= options_.window / 2) ? end : 0;
}

int32_t LlamaDrafter::last_position(int32_t sequence) const {
    return queue_.n_rows(sequence) > 0 ? queue_.last_position(sequence) : context_.last_position(sequence);
}

// An injection reads the same weights for one row as for many, and what is drafted depends on no row before a draft
// asks for it: so rows wait. Requests that do not draft, or end, never pay for most of theirs.
void LlamaDrafter::inject(std::span<const ContextRow> rows) {
    layers_.clear();
    for (const int32_t layer : info_.target_layers) {
        layers_.push_back(target_.context().layer_input(layer).data());
    }
    for (const ContextRow& row : rows) {
        if (row.position != last_position(row.sequence) + 1) {
            forget(row.sequence); // what comes before a gap cannot stay: positions must be gapless
        }
        copy_features(row, queue_.push(row.sequence, row.position));
    }
    while (queue_.n_bytes() > options_.queue_bytes) {
        const int32_t longest = queue_.longest();
        flush({&longest, 1});
    }
}

void LlamaDrafter::copy_features(const ContextRow& row, std::span<float> features) const {
    const auto n_embd = static_cast<size_t>(context_.model().n_embd());
    for (size_t tap = 0; tap < layers_.size(); ++tap) {
        const float* state = layers_[tap] + static_cast<size_t>(row.batch_row) * n_embd;
        std::copy_n(state, n_embd, features.subspan(tap * n_embd).begin());
    }
}

void LlamaDrafter::flush(std::span<const int32_t> sequences) {
    const auto begin = Clock::now();
    for (const int32_t sequence : sequences) {
        make_room(sequence);
    }
    collect_chunk(sequences);
    while (!positions_.empty()) {
        inject_chunk();
        collect_chunk(sequences);
    }
    context_.synchronize(); // so that the time is the injection's and not that of the block behind it
    times_.inject_ms += milliseconds_since(begin);
}

// Cells that the waiting rows push out of the window, and all of them when waiting rows fell out of it too.
void LlamaDrafter::make_room(int32_t sequence) {
    if (queue_.n_rows(sequence) == 0) {
        return;
    }
    const bool has_gap = context_.last_position(sequence) + 1 < queue_.first_position(sequence);
    const int32_t end = queue_.last_position(sequence) + 1 - options_.window;
    if (has_gap) {
        context_.remove(sequence, 0, -1);
    } else if (end > 0 && context_.first_position(sequence) < end) {
        context_.remove(sequence, 0, end);
    }
}

// The next rows in turn, as many as one pass takes.
void LlamaDrafter::collect_chunk(std::span<const int32_t> sequences) {
    features_.clear();
    positions_.clear();
    sequences_.clear();
    for (const int32_t sequence : sequences) {
        const int32_t room = kInjectRows - static_cast<int32_t>(positions_.size());
        for (int32_t row = 0; row < std::min(room, queue_.n_rows(sequence)); ++row) {
            const std::span<const float> features = queue_.features(sequence, row);
            features_.insert(features_.end(), features.begin(), features.end());
            positions_.push_back(queue_.first_position(sequence) + row);
            sequences_.push_back(sequence);
        }
    }
}

// Rows leave the queue only once they stand in the cache.
void LlamaDrafter::inject_chunk() {
    context_.decode_features(features_, positions_, sequences_);
    for (const int32_t sequence : sequences_) {
        queue_.drop_oldest(sequence, 1);
    }
}

} // namespace dspark
