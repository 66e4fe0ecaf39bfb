#include "engine.h"

#include "errors.h"

#include <algorithm>
#include <stdexcept>

namespace dspark {

namespace {

void check_options(const EngineOptions& options) {
    auto require = [](bool holds, const std::string& message) {
        if (!holds) {
            throw std::invalid_argument(message);
        }
    };
    require(options.n_ctx >= 2, "n_ctx must be at least 2, got " + std::to_string(options.n_ctx));
    require(options.n_parallel >= 1, "n_parallel must be at least 1, got " + std::to_string(options.n_parallel));
    require(options.n_batch >= 1, "n_batch must be at least 1, got " + std::to_string(options.n_batch));
    require(options.prefill_chunk >= 1,
            "prefill_chunk must be at least 1, got " + std::to_string(options.prefill_chunk));
    require(options.max_queue >= 1, "max_queue must be at least 1, got " + std::to_string(options.max_queue));
}

// Under `exact` the likeliest token is accepted most often.
Truncation draft_truncation(const RequestOptions& options) {
    Truncation truncation = options.sampling.truncation();
    if (options.rule() == Verification::exact) {
        truncation.temperature = 0;
    }
    return truncation;
}

} // namespace

Engine::Engine(std::unique_ptr<Target> target, std::unique_ptr<Drafter> drafter, std::unique_ptr<Scheduler> scheduler,
               const EngineOptions& options, std::shared_ptr<WorkerPool> workers)
    : options_(options), target_(std::move(target)), drafter_(std::move(drafter)), scheduler_(std::move(scheduler)),
      sequences_(options.n_parallel), workers_(std::move(workers)), deciders_(workers_ ? workers_->n_workers() : 1) {
    check_options(options_);
    const int32_t block = drafter_ ? drafter_->block_size() : 0;
    if (block > target_->max_rollback()) {
        throw ModelMismatchError("the target must be able to take back a block of " + std::to_string(block) +
                                 " tokens, got " + std::to_string(target_->max_rollback()));
    }
    options_.n_batch = std::max(options_.n_batch, options_.n_parallel * (1 + block));
    options_.synthetic.validate();
    if (!options_.synthetic.rates.empty()) {
        synthetic_.emplace(options_.synthetic, block);
    }
    is_shifting_ = target_->can_shift() && (!drafter_ || drafter_->can_shift());
}

Engine::~Engine() = default;

// ---- any thread ----

uint64_t Engine::submit(std::vector<int32_t> prompt, RequestOptions options) {
    options.validate();
    if (prompt.empty()) {
        throw std::invalid_argument("prompt must hold at least 1 token, got 0");
    }
    const std::lock_guard lock(inbox_mutex_);
    if (is_closed_) {
        throw EngineClosedError("cannot submit a request: the engine is closed");
    }
    const int32_t n_vocab = target_->n_vocab();
    for (const int32_t token : prompt) {
        if (token < 0 || token >= n_vocab) {
            throw std::invalid_argument("prompt tokens must be in [0, " + std::to_string(n_vocab) + "), got " +
                                        std::to_string(token));
        }
    }
    for (const auto& [token, bias] : options.sampling.logit_bias) {
        if (token < 0 || token >= n_vocab) {
            throw std::invalid_argument("logit_bias tokens must be in [0, " + std::to_string(n_vocab) + "), got " +
                                        std::to_string(token));
        }
    }
    if (options.context_shift && !is_shifting_) {
        throw std::invalid_argument("context_shift must be off: this pair's caches cannot be shifted");
    }
    if (prompt.size() >= static_cast<size_t>(options_.n_ctx)) {
        throw ContextFullError("prompt must leave room for one token in n_ctx = " + std::to_string(options_.n_ctx) +
                               ", got " + std::to_string(prompt.size()) + " tokens");
    }
    if (queue_.size() >= static_cast<size_t>(options_.max_queue)) {
        throw QueueFullError("cannot submit a request: max_queue = " + std::to_string(options_.max_queue) +
                             " requests are waiting");
    }
    const uint64_t id = next_id_++;
    queue_.push_back(std::make_unique<Request>(id, std::move(prompt), std::move(options)));
    alive_.insert(id);
    return id;
}

bool Engine::cancel(uint64_t request_id) {
    const std::lock_guard lock(inbox_mutex_);
    if (!alive_.contains(request_id)) {
        return false;
    }
    cancelled_.insert(request_id);
    return true;
}

bool Engine::has_work() const {
    const std::lock_guard lock(inbox_mutex_);
    return !is_closed_ && !alive_.empty();
}

int32_t Engine::n_running() const { return n_running_.load(); }

int32_t Engine::n_queued() const {
    const std::lock_guard lock(inbox_mutex_);
    return static_cast<int32_t>(queue_.size());
}

EngineStats Engine::stats() const {
    const std::lock_guard lock(inbox_mutex_);
    return stats_;
}

std::vector<CachePosition> Engine::cache_positions() const {
    const std::lock_guard lock(step_mutex_);
    std::vector<CachePosition> positions;
    for (const auto& request : running_) {
        positions.push_back({request->id, target_->last_position(request->sequence),
                             drafter_ ? drafter_->last_position(request->sequence) : -1});
    }
    return positions;
}

void Engine::close() {
    is_closed_ = true; // first: who steps while we wait is told so
    const std::lock_guard step_lock(step_mutex_);
    const std::lock_guard lock(inbox_mutex_);
    queue_.clear();
    alive_.clear();
    running_.clear();
    n_running_ = 0;
    drafter_.reset(); // borrows the target's weights: first to go
    target_.reset();
}

// ---- the step ----

std::vector<Event> Engine::step() { return turn(0); }

std::vector<Event> Engine::turn(double budget_ms) {
    const std::unique_lock lock(step_mutex_, std::try_to_lock);
    if (is_closed_) {
        throw EngineClosedError("cannot step: the engine is closed");
    }
    if (!lock.owns_lock()) {
        throw DSparkError("step must be called by one thread at a time");
    }
    const auto begin = Clock::now();
    events_.clear();
    is_awaited_ = false;
    do {
        run_step();
    } while (!is_awaited_ && !running_.empty() && !is_closed_ && milliseconds_since(begin) < budget_ms);
    tell_stats();
    return std::move(events_);
}

void Engine::run_step() {
    const auto begin = Clock::now();
    pause_ms_ = last_step_end_ ? milliseconds_since(*last_step_end_) : 0;
    step_ = {};
    admit();
    try {
        draft();
        schedule();
        verify();
        commit();
        learn(milliseconds_since(begin));
    } catch (const std::exception& error) {
        fail_step(error.what());
    }
    record_step(milliseconds_since(begin));
    last_step_end_ = running_.empty() ? std::nullopt : std::optional(Clock::now());
    std::erase_if(running_, [](const auto& request) { return request->phase == Phase::finished; });
    n_running_ = static_cast<int32_t>(running_.size());
}

void Engine::admit() {
    take_cancelled();
    take_queued();
    open_lanes();
}

// Within max_tokens and the context.
int32_t Engine::tokens_left(const Request& request) const {
    return std::min(request.n_remaining(), options_.n_ctx - static_cast<int32_t>(request.tokens.size()));
}

// A round of l drafted tokens commits up to l + 1.
int32_t Engine::most_drafts(const Request& request) const {
    if (!drafter_) {
        return 0;
    }
    int32_t most = std::min(drafter_->block_size(), tokens_left(request) - 1);
    if (request.options.draft_limit >= 0) {
        most = std::min(most, request.options.draft_limit);
    }
    return std::max(most, 0);
}

const Policy& Engine::policy_of(const Request& request) const {
    return request.options.policy ? *request.options.policy : scheduler_->options().policy;
}

void Engine::propose() {
    proposals_.clear();
    for (Lane& lane : lanes_) {
        if (lane.is_prefill) {
            continue;
        }
        const RequestOptions& options = lane.request->options;
        Proposal proposal;
        proposal.key = {lane.request->id, options.rule(),
                        options.sampling.is_greedy() ? 0.0 : options.sampling.temperature};
        proposal.policy = policy_of(*lane.request);
        proposal.most = lane.most;
        proposal.n_written = lane.request->n_generated();
        proposal.n_left = tokens_left(*lane.request);
        proposal.n_waiting = drafter_ ? drafter_->n_waiting(lane.request->sequence) : 0;
        proposal.is_free = options.rule() == Verification::exact;
        lane.proposal = proposals_.size();
        proposals_.push_back(proposal);
    }
}

void Engine::draft() {
    propose();
    load_ = step_load();
    scheduler_->select(proposals_, load_);
    tasks_.clear();
    int32_t n_waiting = 0;
    for (Lane& lane : lanes_) {
        if (lane.is_prefill) {
            continue;
        }
        const Proposal& proposal = proposals_[lane.proposal];
        lane.is_drafting = is_drafting(proposal.decision);
        if (!lane.is_drafting) {
            continue;
        }
        n_waiting += proposal.n_waiting;
        Request& request = *lane.request;
        lane.draft = tasks_.size();
        tasks_.push_back({request.id, request.sequence, request.tokens.back(), request.anchor_position(),
                          draft_truncation(request.options), request.random, &request.options.sampling,
                          &request.counts});
    }
    if (tasks_.empty()) {
        return;
    }
    const auto begin = Clock::now();
    drafts_.resize(std::max(drafts_.size(), tasks_.size()));
    drafter_->draft(tasks_, std::span(drafts_).first(tasks_.size()));
    if (synthetic_) {
        set_synthetic_confidences();
    }
    const DrafterTimes times = drafter_->take_times();
    step_.inject_ms = times.inject_ms;
    if (n_waiting > 0) {
        scheduler_->observe_injection(n_waiting, times.inject_ms);
    }
    step_.head_ms = times.head_ms;
    step_.draft_ms = milliseconds_since(begin) - times.inject_ms;
}

void Engine::schedule() {
    for (const Lane& lane : lanes_) {
        if (lane.is_drafting) {
            proposals_[lane.proposal].confidence_logits = drafts_[lane.draft].confidence_logits;
        }
    }
    prefix_len_.assign(proposals_.size(), 0);
    scheduler_->schedule(proposals_, load_, prefix_len_);
    for (Lane& lane : lanes_) {
        lane.prefix_len = lane.is_drafting ? std::clamp(prefix_len_[lane.proposal], 0, lane.most) : 0;
    }
}

void Engine::verify() {
    rows_.clear();
    for (Lane& lane : lanes_) {
        if (!lane.is_prefill) {
            add_decode_rows(lane);
        }
    }
    add_prompts();
    if (rows_.empty()) {
        return;
    }
    if (std::any_of(lanes_.begin(), lanes_.end(), [&](const Lane& lane) { return keeps_context(*lane.request); })) {
        drafter_->begin_recording();
    }
    const auto begin = Clock::now();
    target_->decode(rows_);
    step_.verify_ms = milliseconds_since(begin);
}

void Engine::add_decode_rows(Lane& lane) {
    const Request& request = *lane.request;
    const int32_t start = request.anchor_position();
    lane.first_row = static_cast<int32_t>(rows_.size());
    lane.n_rows = 1 + lane.prefix_len;
    rows_.push_back({request.tokens.back(), start, request.sequence, true});
    for (int32_t k = 0; k < lane.prefix_len; ++k) {
        rows_.push_back({drafts_[lane.draft].tokens[static_cast<size_t>(k)], start + 1 + k, request.sequence, true});
    }
}

void Engine::finish(Request& request, FinishReason reason, const std::string& error) {
    request.phase = Phase::finished;
    is_awaited_ = true;
    scheduler_->finish(request.id, request.n_generated());
    Event& event = event_of(request);
    event.finish_reason = reason;
    event.error = error;
    event.stats = request.stats;
    release(request, reason != FinishReason::error);
    const std::lock_guard lock(inbox_mutex_);
    alive_.erase(request.id);
    cancelled_.erase(request.id);
}

void Engine::fail_step(const std::string& error) {
    for (const auto& request : running_) {
        if (request->phase != Phase::finished) {
            finish(*request, FinishReason::error, error);
        }
    }
    drop_idle(); // whatever the pass left half done, nobody goes on with it
}

Event& Engine::event_of(const Request& request) {
    for (Event& event : events_) {
        if (event.request_id == request.id) {
            return event;
        }
    }
    Event& event = events_.emplace_back();
    event.request_id = request.id;
    return event;
}

} // namespace dspark
