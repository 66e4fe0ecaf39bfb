#include "probing.h"

#include <algorithm>
#include <cstddef>

namespace dspark {

namespace {

// Of the time, what probing may lose: the more of the last probes failed, the less likely the next one is not to.
constexpr double kFirstShare = 0.012; // before the first one failed, half of it before the second ..
constexpr double kLeastShare = 0.001;
constexpr int32_t kRemembered = 3; // failed probes that still count once drafting has paid
constexpr double kMostCredit = 2;  // probes

} // namespace

Proposal* Probing::longest_unprobed(std::span<Proposal> proposals, std::span<const size_t> members) const {
    Proposal* candidate = nullptr;
    std::ptrdiff_t oldest = 0;
    for (const size_t i : members) {
        const bool is_ending = proposals[i].most >= proposals[i].n_left - 1; // less than a block: it would tell little
        if (proposals[i].decision != DraftDecision::parked || is_ending) {
            continue;
        }
        const auto found = std::find(probed_.begin(), probed_.end(), proposals[i].key.request_id);
        const std::ptrdiff_t rank = found == probed_.end() ? -1 : found - probed_.begin();
        if (candidate == nullptr || rank < oldest) {
            candidate = &proposals[i];
            oldest = rank;
        }
    }
    return candidate;
}

bool Probing::can_pay(double cost_ms, double loss_ms) {
    cost_ms_ = cost_ms;
    return credit_ms_ >= loss_ms;
}

bool Probing::may_hope(bool could_pay, int32_t n_requests) {
    const bool was_hopeless = n_requests >= n_hopeless_;
    if (could_pay) {
        n_hopeless_ = was_hopeless ? std::numeric_limits<int32_t>::max() : n_hopeless_;
        return true;
    }
    n_hopeless_ = std::min(n_hopeless_, n_requests);
    credit_ms_ = was_hopeless ? credit_ms_ : 0;
    return was_hopeless;
}

void Probing::begin(Proposal& candidate, int32_t length, double token_ms) {
    credit_ms_ -= cost_ms_;
    token_ms_ = token_ms;
    length_ = length;
    ++n_failed_;
    candidate.decision = DraftDecision::probe;
    forget(candidate.key.request_id);
    probed_.push_back(candidate.key.request_id);
}

// What it really gained is given back: a probe that paid was no loss, one that was expected to and did not is one.
void Probing::settle(int32_t n_accepted) {
    credit_ms_ += n_accepted * token_ms_;
    if (n_accepted * token_ms_ >= cost_ms_) {
        n_failed_ /= 2;
    }
}

void Probing::succeed() { n_failed_ = std::min(n_failed_, kRemembered); }

void Probing::earn(double total_ms, int32_t n_requests) {
    const bool is_hopeless = n_requests >= n_hopeless_;
    const double share = is_hopeless ? kLeastShare : std::max(kLeastShare, kFirstShare / (1 + n_failed_));
    credit_ms_ = std::min(credit_ms_ + share * total_ms, kMostCredit * cost_ms_);
}

} // namespace dspark
