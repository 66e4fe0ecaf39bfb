// When parked requests all draft together for some steps in a row: what that takes shows in no single probe, whose
// caches are cold and whose draft is shared by nobody. Must not know: costs, survivals, models. Engine thread only.
#pragma once

#include <cstdint>

namespace dspark {

class Trial {
  public:
    // Whether goes_on() may hold, where a plain step takes plain_ms.
    [[nodiscard]] bool is_due(double plain_ms, double entry_ms) const;
    // Whether to begin one, or to go on with it. promised_speedup: of all drafting, said by the prices that are
    // doubted; step_ms: such a step; entry_ms: what the first one takes on top.
    [[nodiscard]] bool goes_on(double promised_speedup, double step_ms, double entry_ms);
    // Drafting pays: a trial under way has led to it.
    void succeed();
    void earn(double parked_ms); // a parked step
    // A drafted step gained so much on plain decoding, or lost: a share of it may pay for the way back. plain_ms: of a
    // plain step.
    void gain(double gained_ms, double plain_ms);

  private:
    double credit_ms_ = 0;
    int32_t n_left_ = 0;   // steps of the one under way
    int32_t n_failed_ = 0; // trials since one led to something
};

} // namespace dspark
