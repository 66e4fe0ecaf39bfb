#include "step_costs.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr int32_t kTried = 3;  // passes that show what a size takes, whatever load measured
constexpr size_t kNear = 10;   // sizes this share apart take alike
constexpr double kHope = 0.08; // of what a size takes: load errs by as much

PassShape pass_of(const StepLoad& load, int32_t n_rows) { return {n_rows, load.n_prefill_rows, load.context}; }

bool has_one_shape(const PassShape& a, const PassShape& b) {
    return a.n_rows == b.n_rows && a.n_prefill_rows == 0 && b.n_prefill_rows == 0;
}

// Pass after pass of one shape.
PassShape plain_pass(const StepLoad& load, int32_t n_requests) {
    return {n_requests, load.n_prefill_rows, load.context, load.n_prefill_rows == 0};
}

} // namespace

// Where a batch of unequal lengths is split, prompts beside rounds are a pass of their own.
double StepCosts::pass_ms(const PassShape& pass) const {
    if (!equal_lengths_) {
        return table_.verify_ms(pass);
    }
    return table_.verify_ms({pass.n_rows, 0, pass.context, pass.is_repeat}) +
           table_.verify_ms({0, pass.n_prefill_rows, pass.context});
}

double StepCosts::step_ms(const PassShape& pass, int32_t n_drafted_rows) const {
    return pass_ms(pass) + overhead_.at(n_drafted_rows);
}

double StepCosts::plain_pass_ms(const StepLoad& load, int32_t n_requests) const {
    return pass_ms(plain_pass(load, n_requests));
}

double StepCosts::plain_ms(const StepLoad& load, int32_t n_requests) const {
    return pass_ms(plain_pass(load, n_requests)) + plain_overhead_ms();
}

double StepCosts::return_ms(const StepLoad& load, int32_t n_requests) const {
    const double seen_ms = (1 + runs_.return_share()) * plain_pass_ms(load, n_requests);
    return std::max(seen_ms, pass_ms({n_requests, 0, load.context})) + plain_overhead_ms();
}

// While drafts go on, the line knows steps of many rows alone, and where it begins is a guess: high, plain steps would
// look dear, and nothing would show that they are not.
double StepCosts::plain_overhead_ms() const {
    return plain_overhead_.is_empty() ? overhead_.at(0) : std::min(overhead_.at(0), plain_overhead_.at(0));
}

void StepCosts::note_size(const PassShape& pass) {
    if (!pass.is_behind_draft || pass.n_prefill_rows > 0) {
        return;
    }
    const auto n = static_cast<size_t>(pass.n_rows);
    n_timed_.resize(std::max(n_timed_.size(), n + n / kNear + 1));
    for (size_t near = n - n / kNear; near <= n + n / kNear; ++near) {
        ++n_timed_[near];
    }
}

void StepCosts::price_rows(const StepLoad& load, const StepShape& step, int32_t n_most,
                           std::vector<double>& row_ms) const {
    const int32_t n_rows = step.n_requests + step.n_drafted_rows;
    row_ms.clear();
    row_ms.push_back(undrafted_ms(load, step));
    for (int32_t n = 1; n <= n_most; ++n) {
        PassShape pass = pass_of(load, n_rows + n);
        pass.is_behind_draft = true;
        // Never less than without them: the two kinds of passes have ratios of their own, and while nobody drafts that
        // of drafted ones is an old one.
        row_ms.push_back(std::max(row_ms.front(), step_ms(pass, step.n_drafted_rows + n)));
    }
    if (load.n_prefill_rows > 0) {
        leave_prompts_out(load, step, row_ms);
    }
}

// What prompts take beside rounds is taken whatever these draft: time that drafts could not save must not make time
// look cheap.
void StepCosts::leave_prompts_out(StepLoad load, const StepShape& step, std::vector<double>& row_ms) const {
    load.n_prefill_rows = 0;
    const double alone_ms = undrafted_ms(load, step);
    const double prompt_ms = std::max(0.0, row_ms.front() - alone_ms);
    for (double& ms : row_ms) {
        ms -= prompt_ms;
    }
}

// Without rows beyond those that the step has anyway.
double StepCosts::undrafted_ms(const StepLoad& load, const StepShape& step) const {
    const int32_t n_rows = step.n_requests + step.n_drafted_rows;
    return step.n_drafting == 0 ? plain_ms(load, n_rows) : step_ms(pass_of(load, n_rows), step.n_drafted_rows);
}

void StepCosts::hope_for_untried(int32_t n_rows, std::vector<double>& row_ms) const {
    for (size_t n = 1; n < row_ms.size(); ++n) {
        const size_t size = static_cast<size_t>(n_rows) + n;
        if (size >= n_timed_.size() || n_timed_[size] < kTried) {
            row_ms[n] = std::min(row_ms[n], std::max(row_ms[n - 1], (1 - kHope) * row_ms[n]));
        }
    }
}

void StepCosts::price_drafts(const StepLoad& load, int32_t n_others, int32_t n_most,
                             std::vector<double>& draft_ms) const {
    const double others_ms = table_.draft_ms(n_others, load.context);
    draft_ms.clear();
    for (int32_t n = 0; n <= n_most; ++n) {
        draft_ms.push_back(table_.draft_ms(n_others + n, load.context) - others_ms + inject_ms(n * kRoundRows));
    }
}

// Draft and verification.
double StepCosts::drafted_ms(const StepLoad& load, const StepShape& step) const {
    PassShape pass = pass_of(load, step.n_requests + step.n_drafted_rows);
    pass.is_behind_draft = true;
    return pass_ms(pass) + table_.draft_ms(step.n_drafting, load.context);
}

double StepCosts::entry_ms(const StepLoad& load, const StepShape& step, const StepTimes& times) const {
    const double cold_ms = runs_.was_cold() ? times.draft_ms + times.verify_ms - drafted_ms(load, step) : 0;
    return std::max(0.0, cold_ms) + std::max(0.0, times.inject_ms - inject_ms(step.n_drafting * kRoundRows));
}

// A price that even such a step shows to be too dear is learned all the same.
bool StepCosts::learns_apart(const StepLoad& load, const StepShape& step, const StepTimes& times) {
    if (step.n_drafting == 0 || load.n_prefill_rows > 0 || (runs_.is_calm() && !runs_.was_cold())) {
        return false;
    }
    const double expected_ms = drafted_ms(load, step);
    const double ms = times.draft_ms + times.verify_ms;
    if (expected_ms <= 0) {
        return false;
    }
    if (runs_.was_cold()) {
        runs_.observe_cold(ms / expected_ms);
    }
    return ms > expected_ms;
}

void StepCosts::observe_passes(const StepLoad& load, const StepShape& step, const StepTimes& times) {
    PassShape pass = pass_of(load, step.n_requests + step.n_drafted_rows);
    pass.is_behind_draft = step.n_drafting > 0;
    pass.is_repeat = has_one_shape(pass, last_pass_);
    last_pass_ = pass;
    n_settled_ = pass.is_plain() ? n_settled_ + 1 : 0;
    runs_.observe(step.n_requests, load.n_prefill_rows, step.n_drafting > 0);
    const double plain_ms = plain_pass_ms(load, step.n_requests);
    if (runs_.is_return() && runs_.is_calm() && plain_ms > 0) {
        runs_.observe_return(times.verify_ms / plain_ms);
    }
    if (learns_apart(load, step, times)) {
        return;
    }
    note_size(pass);
    const bool is_split = equal_lengths_ && step.n_requests > 0 && load.n_prefill_rows > 0;
    // The first ones behind others take longer; the very first, of another shape than the one before, is no drafted
    // pass.
    const bool is_settling = step.n_drafting == 0 && load.n_prefill_rows == 0 && n_settled_ < kSettling;
    if (step.n_drafting > 0) {
        table_.observe_draft(step.n_drafting, load.context, times.draft_ms);
    }
    if (times.verify_ms > 0 && !is_split && !is_settling) { // of two passes nobody knows which took how long
        table_.observe_verify(pass, times.verify_ms);
    } else if (is_settling && times.verify_ms > 0) {
        table_.observe_settling(pass, times.verify_ms);
    }
}

void StepCosts::observe_overhead(const StepShape& step, const StepTimes& times) {
    if (!runs_.is_calm() && !overhead_.is_empty()) {
        return;
    }
    const double ms = std::max(0.0, times.total_ms - times.draft_ms - times.inject_ms - times.verify_ms);
    overhead_.push(step.n_drafted_rows, ms);
    if (step.n_drafting == 0) {
        plain_overhead_.push(0, ms);
    }
}

} // namespace dspark
