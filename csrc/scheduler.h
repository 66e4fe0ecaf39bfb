// Who drafts in a step and how much of each block is verified: the policies put to the engine's figures. Owns: what was
// learned of costs and acceptance, parking. Must not know: caches, models, clocks. Threads: the engine's alone.
#pragma once

#include "cost_table.h"
#include "policy.h"
#include "survival.h"

#include <cstdint>
#include <limits>
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

enum class DraftDecision {
    none,   // nothing to decide: no room, off, or not asked
    draft,  // by policy, or because it pays
    probe,  // parked, but looked at again
    parked, // would cost more than it gains
};
[[nodiscard]] inline bool is_drafting(DraftDecision decision) {
    return decision == DraftDecision::draft || decision == DraftDecision::probe;
}

// One request that decodes in this step. Shares the order of the engine's lanes.
struct Proposal {
    SurvivalKey key;
    Policy policy;
    int32_t n_waiting = 0;                                // context rows that its draft would have to inject first
    int32_t n_left = std::numeric_limits<int32_t>::max(); // tokens it may still write
    int32_t most = 0;                             // longest prefix its limits allow: block, max_tokens, context, option
    std::span<const float> confidence_logits;     // (block_size,), empty before drafting or without a confidence head
    bool is_free = false;                         // any policy is lossless for it
    DraftDecision decision = DraftDecision::none; // after select
};

// What else the step carries.
struct StepLoad {
    int32_t n_prefill_rows = 0;
    int32_t n_cells = 0; // cells of the target's cache in use
};

struct StepTimes {
    double draft_ms = 0;
    double inject_ms = 0;
    double verify_ms = 0;
    double total_ms = 0; // of the step and the pause before it, passes included
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
    void observe_injection(int32_t n_rows, double ms) { costs_.observe_inject(n_rows, ms); }
    void observe_step(const StepLoad& load, int32_t n_requests, int32_t n_drafting, int32_t n_drafted_rows,
                      int32_t n_committed, const StepTimes& times);
    // n_generated: tokens that it wrote.
    void finish(uint64_t request_id, int32_t n_generated);

    // Why: of the last step's requests under `adaptive`, the best that drafting was expected to do.
    struct Outlook {
        double n_tokens = 0; // accepted drafts of one round
        double extra_ms = 0; // its time beyond a plain step
        double plain_ms = 0;
    };
    [[nodiscard]] const Outlook& outlook() const { return outlook_; }
    [[nodiscard]] const CostTable& costs() const { return costs_; }
    [[nodiscard]] const SchedulerOptions& options() const { return options_; }
    void set_costs(const CostCurves& curves) { costs_ = CostTable(curves); }
    // A pass of plain decoding under this load; 0: unknown, none was ever timed.
    [[nodiscard]] double plain_pass_ms(const StepLoad& load, int32_t n_requests) const {
        return costs_.knows_plain() ? pass_ms(plain_pass(load, n_requests)) : 0;
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
    void price_rows(const StepLoad& load, size_t n_requests, int32_t n_other_rows, bool is_after_draft);
    void price_drafts(const StepLoad& load, int32_t n_others);
    [[nodiscard]] static PassShape plain_pass(const StepLoad& load, int32_t n_requests);
    [[nodiscard]] double plain_ms(const StepLoad& load, int32_t n_requests) const;
    [[nodiscard]] double pass_ms(const PassShape& pass) const;
    [[nodiscard]] double step_ms(const PassShape& pass, int32_t n_drafted_rows) const;
    [[nodiscard]] double trust() const;
    void learn_trust(bool has_drafted, int32_t n_committed, double n_plain);
    [[nodiscard]] bool pays(const DraftChoice& choice, int32_t n_requests) const;
    void select_adaptive(std::span<Proposal> proposals, const StepLoad& load);
    [[nodiscard]] bool stay_parked(std::span<Proposal> proposals);
    void note_parked(std::span<const Proposal> proposals, const StepLoad& load);
    void probe(std::span<Proposal> proposals, const StepLoad& load);
    [[nodiscard]] double expected_accepts(const Proposal& candidate, int32_t length);
    [[nodiscard]] Proposal* longest_unprobed(std::span<Proposal> proposals) const;
    [[nodiscard]] int32_t probe_length(const Proposal& candidate) const;
    void select_all_or_none(std::span<Proposal> proposals) const;
    [[nodiscard]] int32_t threshold_length(const Proposal& proposal);
    void schedule_group(Policy::Kind kind, std::span<const Proposal> proposals, const StepLoad& load,
                        std::span<int32_t> prefix_len);
    [[nodiscard]] double choose_adaptive_prefixes();
    void learn_bonus(double gain);

    SchedulerOptions options_;
    CostTable costs_;
    SurvivalEstimator survival_;
    Outlook outlook_;
    // Committed tokens of recent steps, and what plain decoding would have made in the same time.
    double n_committed_ = 0;
    double n_plain_ = 0;
    double promised_speedup_ = 0; // of this step, 0: it promises nothing
    double n_kept_ = 0;           // tokens of drafted steps, decayed
    double n_promised_ = 0;       // that they were expected to have
    OverheadLine overhead_;
    PassShape last_pass_;        // of the step before
    double mean_length_ = 0;     // of recent answers, 0: none has ended yet
    double tokens_per_ms_ = 0;   // what this step can be expected to make: the price of its time
    double bonus_tokens_ = 0;    // what confidences gain a block beyond its expectation, see DraftCosts
    double expected_gain_ = 0;   // of this step's blocks, before their confidences were known
    double probe_credit_ms_ = 0; // time that probing may cost
    double probe_cost_ms_ = 0;   // of the probe last thought of
    int32_t probe_len_ = 0;
    int64_t n_probes_ = 0;
    std::vector<uint64_t> probed_; // parked requests, the longest unprobed first
    std::vector<uint64_t> parked_; // the requests of the step before, if all were parked
    int32_t n_parked_steps_ = 0;   // that they go on so without a look
    // The step's own, capacity kept.
    Group group_;
    std::vector<double> row_ms_;   // [n]: the step with n drafted rows of the group in it
    std::vector<double> draft_ms_; // [n]: drafting n blocks of the group
};

} // namespace dspark
