// When whole blocks are drafted and verified for the sake of their time alone: a price that is too high keeps from
// being run what would correct it, and a probe waits for it the longer, the higher it is. Must not know: survivals,
// policies. Engine thread only.
#pragma once

#include "proposal.h"
#include "step_costs.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

class Retiming {
  public:
    // What a step of the requests in `members` is said to take.
    struct Prices {
        const StepCosts& costs;
        std::span<const double> row_ms;   // [n]: the step with n drafted rows
        std::span<const double> draft_ms; // [n]: drafting n blocks
        int32_t block_size = 0;
        bool equal_lengths = false;
    };

    // Where it is time: of the requests that draft, or else of parked ones, whole blocks, whose times bound those of
    // shorter ones.
    void choose(std::span<Proposal> proposals, std::span<const size_t> members, const Prices& prices);
    // Every step that decodes alone.
    void observe(const StepShape& step, double total_ms);

  private:
    void find_candidates(std::span<const Proposal> proposals, std::span<const size_t> members, const Prices& prices);
    [[nodiscard]] bool begin(double step_ms, double plain_ms, double sure_ms);
    void settle(double total_ms);

    std::vector<size_t> timed_; // proposals
    int32_t block_size_ = 0;
    double credit_ms_ = 0;
    double step_ms_ = 0; // of the step under way, 0: no such step
    double plain_ms_ = 0;
    int32_t n_confirmed_ = 0; // prices in a row
    bool is_of_all_ = false;  // all parked requests in turns with one: large passes have prices of their own
};

} // namespace dspark
