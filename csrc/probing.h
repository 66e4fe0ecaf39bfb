// When a parked request drafts all the same, to see whether it still would not pay: the time that may be lost by it,
// and whose turn it is. Must not know: costs, survivals, models. Engine thread only.
#pragma once

#include "proposal.h"

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace dspark {

class Probing {
  public:
    // Of the parked ones among `members` (indices), who drafted longest ago; null: nobody is parked.
    [[nodiscard]] Proposal* longest_unprobed(std::span<Proposal> proposals, std::span<const size_t> members) const;
    // Whether it may cover a probe of which so much is lost; a first one says what probes cost.
    [[nodiscard]] bool is_due(double least_loss_ms) const { return cost_ms_ == 0 || credit_ms_ >= least_loss_ms; }
    // Whether the time earned covers what a probe is expected to lose of its cost.
    [[nodiscard]] bool can_pay(double cost_ms, double loss_ms);
    // Whether to run one that is due. One that could show nothing with which drafting would pay is due once the least
    // share of the time has covered it: costs may be wrong by more than anyone expects.
    [[nodiscard]] bool may_hope(bool could_pay, int32_t n_requests);
    // That probe. It verifies `length` drafted tokens, and each that stands gains token_ms.
    void begin(Proposal& candidate, int32_t length, double token_ms);
    [[nodiscard]] int32_t length() const { return length_; } // of the last probe
    void settle(int32_t n_accepted);                         // of a round of the last probe
    // Drafting pays for someone: probes have led to something.
    void succeed();
    // A step of decoding alone: a share of its time may be lost.
    void earn(double total_ms, int32_t n_requests);
    void forget(uint64_t request_id) { std::erase(probed_, request_id); }

  private:
    double credit_ms_ = 0;
    double cost_ms_ = 0;  // of the probe last thought of
    double token_ms_ = 0; // of the last probe
    int32_t length_ = 0;
    int32_t n_hopeless_ = std::numeric_limits<int32_t>::max(); // requests from which on no probe could show anything
    int32_t n_failed_ = 0;                                     // probes since one led to something
    std::vector<uint64_t> probed_;                             // parked requests, the longest unprobed first
};

} // namespace dspark
