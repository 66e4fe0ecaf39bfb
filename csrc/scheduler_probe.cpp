// When parked requests draft to see whether it would pay: the figures that Probing and Trial decide by.
#include "scheduler.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr double kProbeFloor = 0.2; // of a probe's cost is taken for lost, whatever it is expected to give
constexpr double kProbeRate = 0.9;  // a probe is as long as would pay if drafts were this good

} // namespace

// One parked request drafts when the time allowed for probing covers what it is expected to lose.
void Scheduler::probe(std::span<Proposal> proposals, const StepLoad& load) {
    Proposal* candidate = probing_.longest_unprobed(proposals, group_.members);
    if (candidate == nullptr) {
        return;
    }
    const double sure_ms = draft_ms_[1] + costs_.inject_ms(candidate->n_waiting);
    if (!probing_.is_due(kProbeFloor * sure_ms)) {
        return;
    }
    const int32_t length = probe_length(*candidate);
    const auto n_requests = static_cast<int32_t>(proposals.size());
    price_probe(load, n_requests);
    const double return_ms = std::max(0.0, costs_.return_ms(load, n_requests) - row_ms_[0]); // to plain steps behind it
    const double cost_ms = sure_ms + return_ms + probe_ms_[static_cast<size_t>(length)] - row_ms_[0];
    const double token_ms = row_ms_[0] / n_requests;
    const double loss_ms = cost_ms - expected_accepts(*candidate, length) * token_ms;
    if (probing_.can_pay(cost_ms, std::max(kProbeFloor * cost_ms, loss_ms)) &&
        probing_.may_hope(could_pay(group_.blocks, {probe_ms_, draft_ms_, bonus_tokens_}, n_requests), n_requests)) {
        probing_.begin(*candidate, length, token_ms);
    }
}

// Drafted rows at no less than they add to a drafted pass: while nobody drafts the ratio of drafted passes is an old
// one, and beside plain steps that have become slow since, rows would look free.
void Scheduler::price_probe(const StepLoad& load, int32_t n_requests) {
    costs_.price_rows(load, {n_requests, 1, 0}, static_cast<int32_t>(row_ms_.size()) - 1, probe_ms_);
    const double first_ms = probe_ms_[0];
    for (size_t n = 0; n < row_ms_.size(); ++n) {
        probe_ms_[n] = std::max(row_ms_[n], row_ms_[0] + probe_ms_[n] - first_ms);
    }
}

double Scheduler::expected_accepts(const Proposal& candidate, int32_t length) {
    rates_.resize(static_cast<size_t>(options_.block_size));
    survival_.expect(candidate.key, rates_);
    return expected_tokens(std::span(rates_).first(static_cast<size_t>(length))) - 1;
}

// As long as would pay if drafts were good.
int32_t Scheduler::probe_length(const Proposal& candidate) const {
    const std::vector<double> good(static_cast<size_t>(options_.block_size), kProbeRate);
    const DraftedBlock block{candidate.most, good, good, true};
    int32_t length = 0;
    adaptive_prefixes({&block, 1}, row_ms_, tokens_per_ms_, {&length, 1});
    return std::max(length, 1);
}

// All parked requests draft for some steps where steady drafting of all might pay, whatever entries and the way there
// and back take: that is paid once.
bool Scheduler::tries_all(std::span<const Proposal> proposals, double leaving_ms) {
    int32_t n_waiting = 0;
    for (const Proposal& proposal : proposals) {
        n_waiting += proposal.n_waiting;
    }
    const double entry_ms = costs_.inject_ms(n_waiting) + leaving_ms;
    if (group_.blocks.size() != proposals.size() || row_ms_[0] <= 0 || !trial_.is_due(row_ms_[0], entry_ms)) {
        return false;
    }
    for (DraftedBlock& block : group_.blocks) {
        block.entry_ms = 0;
    }
    std::vector<double> draft_ms(draft_ms_.size(), draft_ms_.back()); // nobody is left out
    draft_ms[0] = 0;
    const auto n = static_cast<int32_t>(proposals.size());
    const DraftChoice choice = choose_fastest_drafting(group_.blocks, {row_ms_, draft_ms, bonus_tokens_}, n);
    const double step_ms = row_ms_[0] + choice.extra_ms;
    const double promised = (1 + bonus_tokens_ + choice.n_tokens / n) * row_ms_[0] / step_ms;
    return trial_.goes_on(promised, step_ms, entry_ms);
}

} // namespace dspark
