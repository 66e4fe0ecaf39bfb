// What the engine tells its scheduler of time, and how it measures passes before any request runs.
#include "engine.h"

#include "cost_measure.h"
#include "errors.h"

#include <numeric>

namespace dspark {

CostCurves Engine::measure_costs(double budget_ms) {
    const std::lock_guard lock(step_mutex_);
    scheduler_->set_costs(time_passes(budget_ms, false));
    return scheduler_->costs().curves();
}

CostCurves Engine::look_at_costs(double budget_ms) {
    const std::lock_guard lock(step_mutex_);
    return time_passes(budget_ms, true);
}

CostCurves Engine::time_passes(double budget_ms, bool is_look) {
    if (is_closed_) {
        throw EngineClosedError("cannot measure costs: the engine is closed");
    }
    if (!running_.empty()) {
        throw DSparkError("cannot measure costs: requests are running");
    }
    drop_idle();
    const int32_t block = drafter_ ? drafter_->block_size() : 0;
    MeasureOptions options;
    options.n_sequences = options_.n_parallel;
    options.n_rows = options_.n_parallel * (1 + block);
    options.n_batch = options_.n_batch;
    options.n_cells = options_.n_ctx;
    options.budget_ms = budget_ms;
    options.is_look = is_look;
    return dspark::measure_costs(*target_, drafter_.get(), options);
}

CostCurves Engine::costs() const {
    const std::lock_guard lock(step_mutex_);
    return scheduler_->costs().curves();
}

void Engine::set_costs(const CostCurves& curves) {
    const std::lock_guard lock(step_mutex_);
    scheduler_->set_costs(curves);
}

double Engine::speedup() const {
    const std::lock_guard lock(step_mutex_);
    return scheduler_->speedup();
}

// What this step would have taken without a drafter: its pass, and the sampling of one row a request.
double Engine::plain_step_ms() const {
    const auto n_requests = static_cast<int32_t>(proposals_.size());
    const double pass_ms = scheduler_->plain_pass_ms(load_, n_requests);
    const int32_t n_rows = std::accumulate(prefix_len_.begin(), prefix_len_.end(), n_requests);
    return pass_ms > 0 && n_requests > 0 ? pass_ms + step_.sample_ms * n_requests / n_rows : 0;
}

// The pause is part of what a step costs: what the caller does between steps is done once a step, however many tokens.
void Engine::learn(double total_ms) {
    const StepTimes times{step_.draft_ms, step_.inject_ms, step_.verify_ms, total_ms + pause_ms_};
    int32_t n_rows = 0;
    for (const Lane& lane : lanes_) {
        n_rows += lane.is_prefill ? 0 : lane.prefix_len;
    }
    const auto n_committed = static_cast<int32_t>(step_.n_committed);
    StepLoad load = load_;
    load.n_prefill_rows = static_cast<int32_t>(step_.n_prefill_tokens);
    const StepShape step{static_cast<int32_t>(proposals_.size()), static_cast<int32_t>(tasks_.size()), n_rows};
    scheduler_->observe_step(load, step, n_committed, times);
}

} // namespace dspark
