#include "probing.h"

#include <algorithm>
#include <cstddef>

namespace dspark {

namespace {

constexpr double kProbeShare = 0.003; // of the time is lost by probing
constexpr double kFirstProbes = 3;    // times as much before the first probe, half of it before the second ..

} // namespace

Proposal* Probing::longest_unprobed(std::span<Proposal> proposals, std::span<const size_t> members) const {
    Proposal* candidate = nullptr;
    std::ptrdiff_t oldest = 0;
    for (const size_t i : members) {
        if (proposals[i].decision != DraftDecision::parked) {
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

bool Probing::can_pay(double cost_ms) {
    cost_ms_ = cost_ms;
    return credit_ms_ >= cost_ms;
}

void Probing::begin(Proposal& candidate, int32_t length) {
    credit_ms_ -= cost_ms_;
    ++n_probes_;
    length_ = length;
    candidate.decision = DraftDecision::probe;
    forget(candidate.key.request_id);
    probed_.push_back(candidate.key.request_id);
}

void Probing::earn(double total_ms) {
    const double share = kProbeShare * (1 + kFirstProbes / (1 + static_cast<double>(n_probes_)));
    credit_ms_ = std::min(credit_ms_ + share * total_ms, 2 * cost_ms_);
}

} // namespace dspark
