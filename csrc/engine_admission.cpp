// The engine's admission: who leaves the queue, and how prompts share the rows of a pass.
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
    while (!queue_.empty() && !free_sequences_.empty()) {
        auto request = std::move(queue_.front());
        queue_.pop_front();
        request->sequence = free_sequences_.back();
        free_sequences_.pop_back();
        request->stats.queue_ms = milliseconds_since(request->submitted);
        const auto block = static_cast<size_t>(drafter_ ? drafter_->block_size() : 0);
        request->stats.scheduled_per_position.assign(block, 0);
        request->stats.accepted_per_position.assign(block, 0);
        running_.push_back(std::move(request));
    }
    n_running_ = static_cast<int32_t>(running_.size());
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
    int32_t n_pending = 0;
    for (const auto& request : running_) {
        load.n_cells += request->n_cached;
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
