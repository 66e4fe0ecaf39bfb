#include "trial.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr int32_t kSteps = 8; // until prices have followed (cost_table.h)
constexpr double kLeastPromise = 0.88;
constexpr double kDoubt = 0.03; // of a trial's time is taken for lost, whatever is promised
// Of the parked time, what trials may lose: the more of the last ones failed, the less.
constexpr double kFirstShare = 0.01;
constexpr double kLeastShare = 0.001;
constexpr double kShareOfGain = 0.2; // of what drafts have gained, what trials may lose
constexpr double kMostCredit = 64;   // plain steps

} // namespace

bool Trial::is_due(double plain_ms, double entry_ms) const {
    return n_left_ > 0 || credit_ms_ >= kSteps * kDoubt * plain_ms + entry_ms;
}

bool Trial::goes_on(double promised_speedup, double step_ms, double entry_ms) {
    if (n_left_ > 0) {
        --n_left_;
        return true;
    }
    const double loss_ms = kSteps * step_ms * std::max(kDoubt, 1 + kDoubt - promised_speedup) + entry_ms;
    if (promised_speedup < kLeastPromise || credit_ms_ < loss_ms) {
        return false;
    }
    credit_ms_ = 0;
    ++n_failed_;
    n_left_ = kSteps - 1;
    return true;
}

void Trial::succeed() {
    if (n_left_ > 0) {
        n_failed_ /= 2;
        n_left_ = 0;
    }
}

void Trial::gain(double gained_ms, double plain_ms) {
    credit_ms_ = std::clamp(credit_ms_ + kShareOfGain * gained_ms, 0.0, std::max(credit_ms_, kMostCredit * plain_ms));
}

void Trial::earn(double parked_ms) { credit_ms_ += std::max(kLeastShare, kFirstShare / (1 + n_failed_)) * parked_ms; }

} // namespace dspark
