// What a step costs as a whole: its passes by the cost table, what lies beside them, and the lists of prices that the
// policies read. Owns: the cost table while an engine runs. Must not know: survivals, policies, clocks. Engine thread.
#pragma once

#include "cost_table.h"
#include "draft_runs.h"
#include "proposal.h"

#include <cstdint>
#include <vector>

namespace dspark {

struct StepTimes {
    double draft_ms = 0;
    double inject_ms = 0;
    double verify_ms = 0;
    double total_ms = 0; // of the step and the pause before it, passes included
};

// What a step decodes.
struct StepShape {
    int32_t n_requests = 0;
    int32_t n_drafting = 0;
    int32_t n_drafted_rows = 0;
};

inline constexpr int32_t kRoundRows = 3; // context rows a round leaves to be injected
// Steps until plain passes behind others take what they will take: 0.75 ms falls to 0.6 within 8 on the demo pair.
inline constexpr int32_t kSettling = 4;

class StepCosts {
  public:
    StepCosts(const CostCurves& curves, bool equal_lengths) : table_(curves), equal_lengths_(equal_lengths) {}

    [[nodiscard]] const CostTable& table() const { return table_; }
    void set(const CostCurves& curves) { table_ = CostTable(curves); }

    // A pass of plain decoding that goes on, and a step of it.
    [[nodiscard]] double plain_pass_ms(const StepLoad& load, int32_t n_requests) const;
    [[nodiscard]] double plain_ms(const StepLoad& load, int32_t n_requests) const;
    // The first plain step behind others: its pass has another shape than the one before.
    [[nodiscard]] double return_ms(const StepLoad& load, int32_t n_requests) const;
    // [n]: the step with n drafted rows on top, without its prompts, n = 0 .. n_most. Where nobody drafts, [0] is plain
    // decoding.
    void price_rows(const StepLoad& load, const StepShape& step, int32_t n_most, std::vector<double>& row_ms) const;
    // Drafted passes of sizes that no step has timed yet, as cheap as they may be: a price from load that is too high
    // is never corrected by steps that keep away from it.
    void hope_for_untried(int32_t n_rows, std::vector<double>& row_ms) const;
    // [n]: drafting n blocks beside those of n_others, n = 0 .. n_most.
    void price_drafts(const StepLoad& load, int32_t n_others, int32_t n_most, std::vector<double>& draft_ms) const;
    [[nodiscard]] double inject_ms(int32_t n_rows) const { return table_.inject_ms(n_rows); }

    [[nodiscard]] const DraftRuns& runs() const { return runs_; }
    // To leave off drafting and to begin it again, a drafted step taking so long.
    [[nodiscard]] double leaving_ms(const StepLoad& load, int32_t n_requests, double drafted_ms) const {
        return return_ms(load, n_requests) - plain_ms(load, n_requests) + runs_.cold_share() * drafted_ms;
    }
    // Its share of every step of drafts that would begin now.
    [[nodiscard]] double entering_ms(double leaving_ms) const {
        return runs_.is_cold() ? leaving_ms / runs_.run_length() : 0;
    }

    void observe_injection(int32_t n_rows, double ms) { table_.observe_inject(n_rows, ms); }
    void observe_passes(const StepLoad& load, const StepShape& step, const StepTimes& times);
    // Of a step that drafted, the last one observed: what it took that steps which go on drafting do not.
    [[nodiscard]] double entry_ms(const StepLoad& load, const StepShape& step, const StepTimes& times) const;
    void observe_overhead(const StepShape& step, const StepTimes& times);

  private:
    [[nodiscard]] double pass_ms(const PassShape& pass) const;
    [[nodiscard]] double plain_overhead_ms() const;
    [[nodiscard]] double step_ms(const PassShape& pass, int32_t n_drafted_rows) const;
    [[nodiscard]] double undrafted_ms(const StepLoad& load, const StepShape& step) const;
    void leave_prompts_out(StepLoad load, const StepShape& step, std::vector<double>& row_ms) const;
    void note_size(const PassShape& pass);
    [[nodiscard]] double drafted_ms(const StepLoad& load, const StepShape& step) const;
    // Learns from a drafted step that tells nothing of those that go on; true if nothing is left to learn.
    [[nodiscard]] bool learns_apart(const StepLoad& load, const StepShape& step, const StepTimes& times);

    CostTable table_;
    bool equal_lengths_;
    OverheadLine overhead_;       // of all steps
    OverheadLine plain_overhead_; // of plain ones
    PassShape last_pass_;         // of the step before
    int32_t n_settled_ = 0;       // plain passes in a row
    DraftRuns runs_;
    std::vector<int32_t> n_timed_; // [n]: drafted passes of about n rows
};

} // namespace dspark
