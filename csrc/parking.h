// Requests that do not draft because it does not pay: how long they go on so without a look, and how far a promise that
// drafting pays is believed. Must not know: costs, survivals, models. Engine thread only.
#pragma once

#include "proposal.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

// Requests that were all parked go on so for some steps without a look: nothing is learned of them meanwhile, and
// looking at many small requests takes as long as a per cent of a small model's step. Of many requests one that comes
// or goes changes little.
class Parking {
  public:
    // Whether this step needs no look.
    [[nodiscard]] bool goes_on(std::span<const Proposal> proposals);
    // What a look decided; of plain steps to compare with there are more. worth: of the best drafts, what they gain to
    // what they cost; plain_ms: a step.
    void note(std::span<const Proposal> proposals, const StepLoad& load, double worth, double plain_ms);
    // Whether it is time for plain steps although drafting is said to pay, promised_speedup times as fast: while drafts
    // go on, nothing shows what plain steps take by now. leaving_ms: what the way there and back takes.
    [[nodiscard]] bool compares(double promised_speedup, double plain_ms, double leaving_ms);
    // Whether plain steps to compare with are over: drafting goes on if it still pays.
    [[nodiscard]] bool has_compared() const { return has_compared_; }
    void earn(double drafted_ms) { credit_ms_ += kCompareShare * drafted_ms; } // a step with drafts

  private:
    [[nodiscard]] static int32_t steps_to_look(double worth, double plain_ms);

    static constexpr double kCompareShare = 0.003; // of drafted time is lost by comparing

    std::vector<uint64_t> parked_; // the requests of the last look, if all were parked
    int32_t n_steps_ = 0;          // that they go on so
    bool is_far_ = false;          // drafts will not pay soon
    bool is_comparing_ = false;    // this step begins plain steps to compare with
    bool has_compared_ = false;    // this step ends them
    double credit_ms_ = 0;
};

// What drafted steps take beyond their price, whatever they draft: graphs of shapes that are hardly ever run, a
// caller's work. Unlike the tokens of a round that is no matter of luck. In plain steps, which it grows with.
class Overrun {
  public:
    [[nodiscard]] double n_steps() const { return n_steps_; }
    void learn(double n_steps);
    void fade() { n_steps_ *= kMemory; } // a parked step: conditions change

  private:
    static constexpr double kMemory = 0.995;
    static constexpr double kStep = 0.1;
    static constexpr double kMost = 2; // the rest is a moment's

    double n_steps_ = 0;
};

// Drafted steps keep less than they promise where costs or survivals are off in a way that no estimate shows.
class Trust {
  public:
    [[nodiscard]] double share() const; // of a promise, at most 1
    // A drafted step: the tokens it made, and those that it was to make in the time it took.
    void learn(double n_kept, double n_promised);
    void fade(bool has_drafted); // every step

  private:
    double n_kept_ = 0; // decayed
    double n_promised_ = 0;
};

} // namespace dspark
