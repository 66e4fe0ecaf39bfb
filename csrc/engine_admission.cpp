// The engine's admission: who leaves the queue, what of a prompt stands in the caches already, how prompts share the
// rows of a pass, and what a finished request leaves behind.
#include "admission.h"
#include "engine.h"

#include <algorithm>

namespace dspark {

void Engine::take_cancelled() {
    std::unordered_set<uint64_t> cancelled;
    std::vector<std::unique_ptr<Request>> waiting;
    {
        const std::lock_guard lock(inbox_mutex_);
        cancelled.swap(cancelled_);
        for (auto& request : queue_) {
            if (cancelled.contains(request->id)) {
                waiting.push_back(std::move(request));
            }
        }
        std::erase(queue_, nullptr);
    }
    for (auto& request : waiting) {
        finish(*request, FinishReason::cancelled);
    }
    for (auto& request : running_) {
        if (cancelled.contains(request->id)) {
            finish(*request, FinishReason::cancelled);
        }
    }
    std::erase_if(running_, [](const auto& request) { return request->phase == Phase::finished; });
}

void Engine::take_queued() {
    const std::lock_guard lock(inbox_mutex_);
    while (!queue_.empty() && running_.size() < static_cast<size_t>(options_.n_parallel)) {
        auto request = std::move(queue_.front());
        queue_.pop_front();
        place(*request);
        request->stats.queue_ms = milliseconds_since(request->submitted);
        const auto block = static_cast<size_t>(drafter_ ? drafter_->block_size() : 0);
        request->stats.scheduled_per_position.assign(block, 0);
        request->stats.accepted_per_position.assign(block, 0);
        running_.push_back(std::move(request));
    }
    n_running_ = static_cast<int32_t>(running_.size());
}

// Tokens of `request`'s prompt that `sequence`, holding `tokens`, could give it. The last one is always computed anew,
// for its logits; a request that drafts needs the drafter's rows too.
int32_t Engine::reusable(const Request& request, int32_t sequence, std::span<const int32_t> tokens) const {
    const auto prompt = std::span(request.tokens).first(static_cast<size_t>(request.n_prompt) - 1);
    const int32_t n = common_prefix(prompt, tokens);
    return n > 0 && keeps_context(request) ? drafter_->reusable(sequence, n) : n;
}

// The sequence, idle or running, that begins like the prompt for longest, and for how long; -1: none. Cells that cannot
// be shared or cut are of use as a whole.
std::pair<int32_t, int32_t> Engine::longest_prefix(const Request& request) const {
    std::pair<int32_t, int32_t> best{-1, 0};
    if (!options_.prefix_reuse) {
        return best;
    }
    const bool is_sharing = can_share();
    auto offer = [&](int32_t sequence, std::span<const int32_t> tokens) {
        const int32_t n = reusable(request, sequence, tokens);
        if (n > best.second && (is_sharing || static_cast<size_t>(n) == tokens.size())) {
            best = {sequence, n};
        }
    };
    for (const int32_t sequence : sequences_.idle()) {
        offer(sequence, sequences_.tokens(sequence));
    }
    for (const auto& other : is_sharing ? std::span(running_) : std::span<std::unique_ptr<Request>>()) {
        offer(other->sequence, std::span(other->tokens).first(static_cast<size_t>(other->n_reusable())));
    }
    return best;
}

// Gives a request its sequence: the idle one that its prompt continues; else the one used longest ago, with a copy of
// the longest common prefix (in a unified cache sequences share cells, so a copy costs none).
void Engine::place(Request& request) {
    const auto [holder, n] = longest_prefix(request);
    if (n > 0 && static_cast<size_t>(n) == sequences_.tokens(holder).size()) {
        sequences_.claim(holder);
        request.sequence = holder;
    } else {
        request.sequence = sequences_.take();
    }
    const bool is_copy = n > 0 && request.sequence != holder;
    cut(request.sequence, is_copy ? 0 : n);
    if (is_copy) {
        sequences_.touch(holder);
        target_->copy(holder, request.sequence, 0, n);
    }
    if (drafter_ && !keeps_context(request)) {
        drafter_->forget(request.sequence);
    } else if (drafter_ && is_copy) {
        drafter_->copy(holder, request.sequence, n);
    }
    request.n_cached = request.stats.n_reused = n;
    step_.n_reused += n;
}

void Engine::cut(int32_t sequence, int32_t begin) {
    target_->remove(sequence, begin);
    if (drafter_) {
        drafter_->remove(sequence, begin);
    }
}

// What a finished request leaves: the cells of its committed tokens, idle in both caches; after an error nothing.
void Engine::release(Request& request, bool is_clean) {
    if (request.sequence < 0) {
        return; // never left the queue
    }
    const auto n_tokens = static_cast<int32_t>(request.tokens.size());
    const int32_t end = is_clean && options_.prefix_reuse ? std::min(request.n_reusable(), n_tokens) : 0;
    cut(request.sequence, end);
    std::erase_if(context_rows_,
                  [&](const ContextRow& row) { return row.sequence == request.sequence && row.position >= end; });
    request.tokens.resize(static_cast<size_t>(end));
    sequences_.put(request.sequence, std::move(request.tokens));
}

void Engine::drop_idle() {
    for (const int32_t sequence : sequences_.idle()) {
        cut(sequence, 0);
        sequences_.put(sequence, {});
    }
}

void Engine::open_lanes() {
    lanes_.clear();
    for (const auto& request : running_) {
        Lane lane;
        lane.request = request.get();
        lane.is_prefill = request->phase == Phase::prefill;
        lane.most = lane.is_prefill ? 0 : most_drafts(*request);
        lanes_.push_back(lane);
    }
}

// While anyone decodes, prompts get a bounded part of each pass: a long one must not stall the others for seconds.
int32_t Engine::prefill_room(int32_t n_decode_rows) const {
    const int32_t room = options_.n_batch - n_decode_rows;
    return n_decode_rows > 0 ? std::min(room, options_.prefill_chunk) : room;
}

StepLoad Engine::step_load() const {
    StepLoad load;
    load.context.n_sequences = std::max(1, static_cast<int32_t>(running_.size()));
    int32_t n_pending = 0;
    for (const auto& request : running_) {
        load.context.n_cells += request->n_cached;
        n_pending += request->phase == Phase::prefill ? request->n_prompt - request->n_cached : 0;
    }
    load.n_prefill_rows = std::min(n_pending, prefill_room(static_cast<int32_t>(proposals_.size())));
    return load;
}

void Engine::add_prompts() {
    std::vector<Lane*> lanes;
    std::vector<int32_t> needs;
    for (Lane& lane : lanes_) {
        if (lane.is_prefill) {
            lanes.push_back(&lane);
            needs.push_back(lane.request->n_prompt - lane.request->n_cached);
        }
    }
    const auto shares = share_rows(needs, prefill_room(static_cast<int32_t>(rows_.size())), n_turns_);
    n_turns_ += lanes.empty() ? 0 : 1;
    for (size_t i = 0; i < lanes.size(); ++i) {
        add_prefill_rows(*lanes[i], shares[i]);
    }
}

void Engine::add_prefill_rows(Lane& lane, int32_t n_rows) {
    const Request& request = *lane.request;
    lane.first_row = static_cast<int32_t>(rows_.size());
    lane.n_rows = n_rows;
    for (int32_t i = 0; i < lane.n_rows; ++i) {
        const int32_t position = request.n_cached + i;
        rows_.push_back({request.tokens[static_cast<size_t>(position)], position, request.sequence,
                         position == request.n_prompt - 1});
    }
}

} // namespace dspark
