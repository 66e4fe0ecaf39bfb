#include "parking.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dspark {

namespace {

// Steps between two looks at requests that are all parked. A look takes 0.1 ms, most of it for code and figures that
// are no longer in the processor's caches: a few per cent of some small steps.
constexpr int32_t kParkedSteps = 8;
constexpr int32_t kMostParkedSteps = 48;
constexpr double kNear = 0.9;          // of what they cost, drafts gain more: soon they may pay
constexpr double kFar = 0.8;           // less: they will not pay soon
constexpr double kLookMs = 12;         // between two looks, where it is not near; twice that where it is far
constexpr int32_t kComparedSteps = 16; // plain steps that are run to compare: the first ones are slow (step_costs.h)
constexpr double kSameShare = 0.75;    // of the requests: with so many of those that were parked, nothing new is found
constexpr double kFarShare = 0.3;      // where it is far
constexpr double kSureSpeedup = 2;     // no plain step is that much faster than it was
constexpr double kTrustMemory = 0.97;  // a drafted step
constexpr double kTrustFades = 0.99;   // a parked step: conditions change
constexpr double kTrustLuck = 1.7;     // standard deviations of what is promised, one a token, that may be bad luck

} // namespace

bool Parking::goes_on(std::span<const Proposal> proposals) {
    size_t n_adaptive = 0;
    size_t n_known = 0;
    auto parked = parked_.begin();
    for (const Proposal& proposal : proposals) {
        if (!proposal.may_adapt()) {
            continue;
        }
        ++n_adaptive;
        const auto found = std::find(parked, parked_.end(), proposal.key.request_id); // both in order of arrival
        if (found != parked_.end()) {
            ++n_known;
            parked = found + 1;
        }
    }
    const size_t n_most = std::max(n_adaptive, parked_.size());
    return n_known > 0 &&
           (is_far_ ? kFarShare : kSameShare) * static_cast<double>(n_most) <= static_cast<double>(n_known) &&
           --n_steps_ >= 0;
}

int32_t Parking::steps_to_look(double worth, double plain_ms) {
    if (worth >= kNear || plain_ms <= 0) {
        return kParkedSteps;
    }
    const double n_steps = (worth < kFar ? 2 : 1) * kLookMs / plain_ms;
    return static_cast<int32_t>(std::clamp<double>(n_steps, kParkedSteps, kMostParkedSteps));
}

void Parking::note(std::span<const Proposal> proposals, const StepLoad& load, double worth, double plain_ms) {
    parked_.clear();
    const int32_t n_parked = steps_to_look(worth, plain_ms);
    has_compared_ = is_comparing_;
    is_far_ = worth < kFar;
    n_steps_ = (std::exchange(is_comparing_, false) ? kComparedSteps : n_parked) - 1;
    if (load.n_prefill_rows > 0) {
        return; // other costs
    }
    for (const Proposal& proposal : proposals) {
        if (is_drafting(proposal.decision)) {
            parked_.clear();
            return;
        }
        if (proposal.decision == DraftDecision::parked) {
            parked_.push_back(proposal.key.request_id);
        }
    }
}

bool Parking::compares(double promised_speedup, double plain_ms, double leaving_ms) {
    const double cost_ms = kComparedSteps * plain_ms * (promised_speedup - 1) + leaving_ms;
    is_comparing_ = promised_speedup <= kSureSpeedup && credit_ms_ > 0 && credit_ms_ >= cost_ms;
    credit_ms_ = is_comparing_ ? 0 : credit_ms_;
    return is_comparing_;
}

double Trust::share() const {
    return n_promised_ > 0 ? std::min(1.0, (n_kept_ + kTrustLuck * std::sqrt(n_promised_)) / n_promised_) : 1.0;
}

void Trust::fade(bool has_drafted) {
    const double memory = has_drafted ? kTrustMemory : kTrustFades;
    n_kept_ *= memory;
    n_promised_ *= memory;
}

void Trust::learn(double n_kept, double n_promised) {
    n_kept_ += n_kept;
    n_promised_ += n_promised;
}

void Overrun::learn(double n_steps) { n_steps_ += kStep * (std::clamp(n_steps, -kMost, kMost) - n_steps_); }

} // namespace dspark
