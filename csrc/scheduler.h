// Who drafts in a step and how much of each block is verified: the policies put to the engine's figures. Owns: what was
// learned of costs and acceptance. Must not know: caches, models, clocks. Threads: the engine's alone.
#pragma once

#include "answer_lengths.h"
#include "parking.h"
#include "policy.h"
#include "probing.h"
#include "proposal.h"
#include "retiming.h"
#include "step_costs.h"
#include "survival.h"
#include "trial.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

enum class Objective {
    throughput, // committed tokens per second of the whole engine
    latency,    // each request's own speed: a slow request's token is worth more
};

struct SchedulerOptions {
    Policy policy; // of requests that name none
    Objective objective = Objective::throughput;
    bool equal_lengths = false; // the target splits a batch of unequal lengths
    int32_t block_size = 0;
    CostCurves costs; // may be empty: then learned while running
    std::vector<CalibrationEntry> calibration;
};

class Scheduler {
  public:
    explicit Scheduler(SchedulerOptions options);

    // Before drafting: proposals[i].decision of each.
    void select(std::span<Proposal> proposals, const StepLoad& load);
    // After drafting: prefix_len[i] in 0 .. most for those that drafted, 0 for the others.
    void schedule(std::span<const Proposal> proposals, const StepLoad& load, std::span<int32_t> prefix_len);

    // After verification: one call a round that drafted, then one a step.
    void observe_round(const Proposal& proposal, int32_t prefix_len, int32_t n_accepted);
    void observe_injection(int32_t n_rows, double ms) { costs_.observe_injection(n_rows, ms); }
    void observe_step(const StepLoad& load, const StepShape& step, int32_t n_committed, const StepTimes& times);
    // n_generated: tokens that it wrote.
    void finish(uint64_t request_id, int32_t n_generated);

    // Why: of the last step's requests under `adaptive`, the best that drafting was expected to do.
    struct Outlook {
        double n_tokens = 0; // accepted drafts of one round
        double extra_ms = 0; // its time beyond a plain step
        double plain_ms = 0;
    };
    [[nodiscard]] const Outlook& outlook() const { return outlook_; }
    [[nodiscard]] const CostTable& costs() const { return costs_.table(); }
    [[nodiscard]] const SchedulerOptions& options() const { return options_; }
    void set_costs(const CostCurves& curves) { costs_.set(curves); }
    // A pass of plain decoding under this load; 0: unknown, none was ever timed.
    [[nodiscard]] double plain_pass_ms(const StepLoad& load, int32_t n_requests) const {
        return costs().knows_plain() ? costs_.plain_pass_ms(load, n_requests) : 0;
    }
    // Recent committed tokens per time against plain decoding, at least 1: it can always be had.
    [[nodiscard]] double speedup() const;

  private:
    struct Group {                   // the requests of this step that share one decision
        std::vector<size_t> members; // indices of proposals
        std::vector<DraftedBlock> blocks;
        std::vector<double> rates; // what the blocks' spans point into: confidence and expected, block_size each
        std::vector<int32_t> prefix_len;
    };

    void gather(std::span<const Proposal> proposals, Policy::Kind kind, bool is_after_draft);
    void weigh();
    void price_entries(std::span<const Proposal> proposals);
    void price_rows(const StepLoad& load, const StepShape& step);
    void park(std::span<Proposal> proposals);
    [[nodiscard]] bool pays(const DraftChoice& choice, const StepLoad& load, int32_t n_requests) const;
    [[nodiscard]] double busy_share(const DraftChoice& choice, const StepLoad& load, int32_t n_requests) const;
    void price_step(std::span<const Proposal> proposals, const StepLoad& load);
    void select_adaptive(std::span<Proposal> proposals, const StepLoad& load);
    [[nodiscard]] bool stays(std::span<const Proposal> proposals, const DraftChoice& choice, double leaving_ms) const;
    [[nodiscard]] bool goes_on_drafting() const { return costs_.runs().is_drafting() || parking_.has_compared(); }
    [[nodiscard]] bool drafts_on(const Proposal& proposal) const;
    [[nodiscard]] bool tries_all(std::span<const Proposal> proposals, double leaving_ms);
    void probe(std::span<Proposal> proposals, const StepLoad& load);
    void price_probe(const StepLoad& load, int32_t n_requests);
    [[nodiscard]] double expected_accepts(const Proposal& candidate, int32_t length);
    [[nodiscard]] int32_t probe_length(const Proposal& candidate) const;
    void select_all_or_none(std::span<Proposal> proposals) const;
    [[nodiscard]] int32_t threshold_length(const Proposal& proposal);
    void schedule_group(Policy::Kind kind, std::span<const Proposal> proposals, const StepLoad& load,
                        std::span<int32_t> prefix_len);
    [[nodiscard]] double choose_adaptive_prefixes();
    void learn_bonus(double gain);
    void learn_speed(const StepLoad& load, const StepShape& step, int32_t n_committed, double total_ms,
                     double entry_ms);

    SchedulerOptions options_;
    StepCosts costs_;
    SurvivalEstimator survival_;
    Parking parking_;
    Trust trust_;
    Overrun overrun_;
    Probing probing_;
    Retiming retiming_;
    Trial trial_;
    AnswerLengths lengths_;
    Outlook outlook_;
    // Committed tokens of recent steps, and what plain decoding would have made in the same time.
    double n_committed_ = 0;
    double n_plain_ = 0;
    double promised_speedup_ = 0; // of this step, 0: it promises nothing
    double tokens_per_ms_ = 0;    // what this step can be expected to make: the price of its time
    bool is_trial_ = false;       // this step drafts for all to see what it takes
    bool is_staying_ = false;     // this step goes on drafting although it is not said to pay
    double regret_ms_ = 0;        // lost by such steps in a row
    double bonus_tokens_ = 0;     // what confidences gain a block beyond its expectation, see DraftCosts
    double expected_ms_ = 0;   // of this step's drafts and their rows, beyond a plain one; 0: not of this group alone
    double expected_gain_ = 0; // of this step's blocks, before their confidences were known
    // The step's own, capacity kept.
    Group group_;
    std::vector<double> row_ms_;    // [n]: the step with n drafted rows of the group in it
    std::vector<double> priced_ms_; // as row_ms_, without hope
    std::vector<double> probe_ms_;  // as row_ms_, for a probe
    std::vector<double> draft_ms_;  // [n]: drafting n blocks of the group
    std::vector<double> rates_;     // (block_size,)
};

} // namespace dspark
