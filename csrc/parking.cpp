#include "parking.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dspark {

namespace {

constexpr int32_t kParkedSteps = 8;    // steps between two looks at requests that are all parked
constexpr int32_t kComparedSteps = 16; // plain steps that are run to compare: the first ones are slow (step_costs.h)
constexpr double kSameShare = 0.75;    // of the requests: with so many of those that were parked, nothing new is found
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
    return n_known > 0 && kSameShare * static_cast<double>(n_most) <= static_cast<double>(n_known) && --n_steps_ >= 0;
}

void Parking::note(std::span<const Proposal> proposals, const StepLoad& load) {
    parked_.clear();
    n_steps_ = (std::exchange(is_comparing_, false) ? kComparedSteps : kParkedSteps) - 1;
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

bool Parking::compares(double promised_speedup, double plain_ms) {
    const double cost_ms = kComparedSteps * plain_ms * (promised_speedup - 1);
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

double Overrun::factor() const { return std::exp(log_factor_); }

void Overrun::learn(double extra_ms, double expected_ms) {
    if (expected_ms > 0) {
        const double ratio = std::clamp(extra_ms / expected_ms, 1 / kMost, kMost);
        log_factor_ += kStep * (std::log(ratio) - log_factor_);
    }
}

} // namespace dspark
