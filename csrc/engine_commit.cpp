// The engine's last call of a step: what each request's rows decided, and what the drafter gets to see of it.
#include "engine.h"

#include <algorithm>
#include <stdexcept>

namespace dspark {

void Engine::commit() {
    const auto begin = Clock::now();
    context_rows_.clear();
    decide_rounds();
    for (size_t i = 0; i < lanes_.size(); ++i) {
        Lane& lane = lanes_[i];
        if (lane.n_rows == 0) {
            continue; // no room in this batch
        }
        try {
            lane.is_prefill ? commit_prefill(lane) : commit_round(lane, decisions_[i]);
        } catch (const std::exception& error) {
            finish(*lane.request, FinishReason::error, error.what()); // its logits or options: nobody else's fault
        }
    }
    step_.sample_ms = milliseconds_since(begin);
    inject();
    shift_full();
}

// All of them before any is committed: none depends on another, so that threads can share the work.
void Engine::decide_rounds() {
    decisions_.assign(lanes_.size(), {});
    row_logits_.assign(rows_.size(), {});
    likeliest_.assign(rows_.size(), -1);
    deciding_.clear();
    searched_rows_.clear();
    size_t n_heavy = 0; // requests that read more than the likeliest token of a row
    for (size_t i = 0; i < lanes_.size(); ++i) {
        const Lane& lane = lanes_[i];
        if (lane.is_prefill || lane.n_rows == 0) {
            continue;
        }
        deciding_.push_back(i);
        const bool is_searched = RoundDecider::needs_argmax_only(*lane.request);
        n_heavy += is_searched ? 0 : 1;
        for (int32_t row = lane.first_row; row < lane.first_row + lane.n_rows; ++row) {
            row_logits_[static_cast<size_t>(row)] = target_->logits(row);
            if (is_searched) {
                searched_rows_.push_back(static_cast<size_t>(row));
            }
        }
    }
    if (workers_) {
        find_likeliest();
    }
    const auto decide_lane = [this](size_t task, size_t worker) {
        Decision& decision = decisions_[deciding_[task]];
        try {
            decision.result = decide(lanes_[deciding_[task]], deciders_[worker]);
        } catch (...) {
            decision.error = std::current_exception();
        }
    };
    if (workers_ && n_heavy > 1) {
        workers_->run(deciding_.size(), decide_lane);
        return;
    }
    for (size_t task = 0; task < deciding_.size(); ++task) {
        decide_lane(task, 0);
    }
}

// Most requests read nothing but the likeliest token of a row. With threads to share them, all rows are read at once;
// alone, one after the other, and none behind the first rejection.
void Engine::find_likeliest() {
    workers_->run(searched_rows_.size(), [this](size_t task, size_t worker) {
        const size_t row = searched_rows_[task];
        try {
            likeliest_[row] = deciders_[worker].argmax(row_logits_[row]);
        } catch (const std::runtime_error&) {
            likeliest_[row] = -1; // found again, and said, if the row is read
        }
    });
}

void Engine::commit_prefill(Lane& lane) {
    Request& request = *lane.request;
    request.n_cached += lane.n_rows;
    step_.n_prefill_tokens += lane.n_rows;
    keep_context(lane, lane.n_rows);
    if (request.n_cached < request.n_prompt) {
        return;
    }
    lane.first_row += lane.n_rows - 1; // only the prompt's last row has logits
    request.phase = Phase::decode;
    is_awaited_ = true;
    lane.n_rows = 1;
    row_logits_[static_cast<size_t>(lane.first_row)] = target_->logits(lane.first_row);
    append(lane, decide(lane, deciders_.front()));
}

void Engine::commit_round(Lane& lane, const Decision& decision) {
    if (decision.error) {
        std::rethrow_exception(decision.error);
    }
    Request& request = *lane.request;
    const VerifyResult& result = decision.result;
    const int32_t n_text = accepted_text(lane, result.n_accepted);
    const int32_t n_accepted = std::min(n_text + 1, result.n_accepted); // an end-of-generation token counts
    request.n_cached += 1 + n_text;
    keep_context(lane, 1 + n_text);
    if (n_text < lane.prefix_len) {
        target_->remove(request.sequence, request.n_cached);
    }

    if (lane.is_drafting) {
        scheduler_->observe_round(proposals_[lane.proposal], lane.prefix_len, result.n_accepted);
    }
    record_decision(lane);

    RequestStats& stats = request.stats;
    const int32_t n_drafted = lane.is_drafting ? static_cast<int32_t>(drafts_[lane.draft].tokens.size()) : 0;
    stats.n_rounds += 1;
    stats.n_drafted += n_drafted;
    stats.n_scheduled += lane.prefix_len;
    stats.n_accepted += n_accepted;
    for (int32_t k = 0; k < lane.prefix_len; ++k) {
        stats.scheduled_per_position[static_cast<size_t>(k)] += 1;
        stats.accepted_per_position[static_cast<size_t>(k)] += k < n_accepted ? 1 : 0;
    }
    const int32_t n_before = stats.n_committed;
    if (request.options.trace) {
        trace_round(lane, result);
    }
    append(lane, result);
    step_.n_drafted += n_drafted;
    step_.n_scheduled += lane.prefix_len;
    step_.n_accepted += n_accepted;
    lane.n_committed = stats.n_committed - n_before;
    step_.n_committed += lane.n_committed;
}

void Engine::record_decision(const Lane& lane) {
    RequestStats& stats = lane.request->stats;
    const DraftDecision decision = proposals_[lane.proposal].decision;
    const bool is_look = decision == DraftDecision::probe || decision == DraftDecision::timed;
    stats.n_probes += is_look ? 1 : 0;
    step_.n_probes += is_look ? 1 : 0;
    if (decision != DraftDecision::parked) {
        return;
    }
    stats.n_parked += 1;
    step_.n_parked += 1;
    const Scheduler::Outlook& outlook = scheduler_->outlook();
    stats.park_tokens = outlook.n_tokens;
    stats.park_extra_ms = outlook.extra_ms;
    stats.park_plain_ms = outlook.plain_ms;
}

void Engine::trace_round(const Lane& lane, const VerifyResult& result) {
    RoundRecord& record = event_of(*lane.request).rounds.emplace_back();
    if (lane.is_drafting) {
        const BlockDraft& draft = drafts_[lane.draft];
        record.n_drafted = static_cast<int32_t>(draft.tokens.size());
        record.confidence_logits = draft.confidence_logits;
    }
    record.prefix_len = lane.prefix_len;
    record.n_accepted = result.n_accepted;
    record.draft_ms = step_.draft_ms;
    record.verify_ms = step_.verify_ms;
}

// Accepted drafts that become text: those before an end-of-generation token.
int32_t Engine::accepted_text(const Lane& lane, int32_t n_accepted) const {
    if (lane.request->options.ignore_eos) {
        return n_accepted;
    }
    for (int32_t k = 0; k < n_accepted; ++k) {
        if (target_->is_end_of_generation(drafts_[lane.draft].tokens[static_cast<size_t>(k)])) {
            return k;
        }
    }
    return n_accepted;
}

VerifyResult Engine::decide(const Lane& lane, RoundDecider& decider) const {
    const auto first = static_cast<size_t>(lane.first_row);
    const auto n = static_cast<size_t>(lane.prefix_len);
    DecidedRows rows;
    rows.request = lane.request;
    rows.logits = std::span(row_logits_).subspan(first, n + 1);
    rows.likeliest = std::span(likeliest_).subspan(first, n + 1);
    if (n > 0) {
        rows.drafted = std::span(drafts_[lane.draft].tokens).first(n);
        rows.draft_probs = drafts_[lane.draft].probs;
    }
    return decider.decide(rows, synthetic_ ? &*synthetic_ : nullptr);
}

// Adds what a round decided to the text: accepted drafts, then the target's own token; an end-of-generation token ends
// the text there and what follows it is dropped.
void Engine::append(Lane& lane, const VerifyResult& result) {
    Request& request = *lane.request;
    Event& event = event_of(request);
    const bool is_round = !lane.is_prefill;
    for (int32_t k = 0; k <= result.n_accepted; ++k) {
        const bool is_drafted = k < result.n_accepted;
        const int32_t token = is_drafted ? drafts_[lane.draft].tokens[static_cast<size_t>(k)] : result.next_token;
        request.stats.n_committed += is_round ? 1 : 0;
        if (!request.options.ignore_eos && target_->is_end_of_generation(token)) {
            finish(request, FinishReason::stop);
            return;
        }
        request.tokens.push_back(token);
        request.counts.push_output(token);
        if (request.mask) {
            request.mask->commit(token);
        }
        event.tokens.push_back(token);
        event.drafted.push_back(is_drafted);
        if (request.options.n_logprobs >= 0) {
            event.logprobs.push_back(
                top_logprobs(target_->logits(lane.first_row + k), token, request.options.n_logprobs));
        }
    }
    if (request.n_remaining() <= 0) {
        finish(request, FinishReason::length);
    } else if (static_cast<int32_t>(request.tokens.size()) >= options_.n_ctx && !request.options.context_shift) {
        finish(request, FinishReason::context_full);
    }
}

// ---- after verification ----

// A request that never drafts leaves no features: whoever goes on with its sequence sees that in last_position().
bool Engine::keeps_context(const Request& request) const {
    if (!drafter_ || request.options.draft_limit == 0) {
        return false;
    }
    return !policy_of(request).never_drafts();
}

void Engine::keep_context(const Lane& lane, int32_t n_rows) {
    if (!keeps_context(*lane.request)) {
        return;
    }
    for (int32_t i = 0; i < n_rows; ++i) {
        const BatchRow& row = rows_[static_cast<size_t>(lane.first_row + i)];
        context_rows_.push_back({lane.first_row + i, row.position, row.sequence});
    }
}

void Engine::inject() {
    if (!drafter_) {
        return;
    }
    if (context_rows_.empty()) {
        return;
    }
    const auto begin = Clock::now();
    drafter_->inject(context_rows_);
    step_.inject_ms += milliseconds_since(begin);
}

void Engine::shift_full() {
    for (const auto& request : running_) {
        if (request->phase != Phase::decode || static_cast<int32_t>(request->tokens.size()) < options_.n_ctx) {
            continue;
        }
        try {
            shift(*request);
        } catch (const std::exception& error) {
            finish(*request, FinishReason::error, error.what());
        }
    }
}

// The older half of what a full context need not keep goes, in both caches.
void Engine::shift(Request& request) {
    const int32_t n_kept = request.n_kept(options_.n_ctx);
    const int32_t n = std::max(1, (options_.n_ctx - n_kept) / 2);
    target_->shift(request.sequence, n_kept, n);
    if (drafter_ && keeps_context(request)) {
        drafter_->shift(request.sequence, n_kept, n);
    }
    request.discard(n_kept, n);
}

// ---- what is told of it ----

// A step's times go to everyone who took part in it: this is what each of them waited.
void Engine::record_step(double total_ms) {
    const double host_ms = total_ms - step_.draft_ms - step_.verify_ms;
    const double plain_ms = plain_step_ms();
    for (const Lane& lane : lanes_) {
        RequestStats& stats = lane.request->stats;
        if (lane.is_prefill) {
            stats.prefill_ms += total_ms;
        } else {
            stats.draft_ms += step_.draft_ms;
            stats.verify_ms += step_.verify_ms;
            stats.host_ms += host_ms;
            stats.plain_ms += plain_ms * lane.n_committed;
        }
        if (lane.request->phase == Phase::finished) {
            event_of(*lane.request).stats = stats; // this step's times included
        }
    }
    const std::lock_guard lock(inbox_mutex_);
    stats_.n_steps += 1;
    stats_.n_prefill_tokens += step_.n_prefill_tokens;
    stats_.n_reused += step_.n_reused;
    stats_.n_drafted += step_.n_drafted;
    stats_.n_scheduled += step_.n_scheduled;
    stats_.n_accepted += step_.n_accepted;
    stats_.n_committed += step_.n_committed;
    stats_.n_parked += step_.n_parked;
    stats_.n_probes += step_.n_probes;
    if (step_.n_prefill_tokens > 0) {
        stats_.n_prefill_steps += 1;
        stats_.prefill_ms += total_ms;
        return;
    }
    stats_.draft_ms += step_.draft_ms;
    stats_.head_ms += step_.head_ms;
    stats_.sample_ms += step_.sample_ms;
    stats_.verify_ms += step_.verify_ms;
    stats_.inject_ms += step_.inject_ms;
    stats_.host_ms += host_ms - step_.inject_ms;
}

// Of those who go on, once a turn: a step tells many requests something.
void Engine::tell_stats() {
    for (const auto& request : running_) {
        for (Event& event : events_) {
            if (event.request_id == request->id) {
                event.stats = request->stats;
            }
        }
    }
}

} // namespace dspark
