#include "retiming.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace dspark {

namespace {

constexpr double kShare = 0.002; // of the time, less the more often prices were confirmed
constexpr int32_t kMostConfirmed = 7;
constexpr double kLeastSteps = 1; // plain steps that such a step may cost: the longest wait for the first one
constexpr double kTooDear = 1.5;  // times what a step took: the price was wrong

} // namespace

void Retiming::choose(std::span<Proposal> proposals, std::span<const size_t> members, const Prices& prices) {
    block_size_ = prices.block_size;
    find_candidates(proposals, members, prices);
    if (timed_.empty()) {
        return;
    }
    int32_t n_waiting = 0;
    for (const size_t i : timed_) {
        n_waiting += proposals[i].n_waiting;
    }
    const size_t n = timed_.size();
    const double step_ms = prices.draft_ms[n] + prices.row_ms[n * static_cast<size_t>(prices.block_size)];
    if (begin(step_ms, prices.row_ms[0], prices.costs.inject_ms(n_waiting))) {
        for (const size_t i : timed_) {
            proposals[i].decision = DraftDecision::timed;
        }
    }
}

void Retiming::find_candidates(std::span<const Proposal> proposals, std::span<const size_t> members,
                               const Prices& prices) {
    timed_.clear();
    if (has_decision(proposals, DraftDecision::probe)) {
        return;
    }
    const bool is_drafted = has_decision(proposals, DraftDecision::draft);
    std::ranges::copy_if(members, std::back_inserter(timed_), [&](size_t i) {
        return proposals[i].most == prices.block_size && is_drafting(proposals[i].decision) == is_drafted;
    });
    if (prices.equal_lengths) {
        timed_.resize(timed_.size() == proposals.size() ? timed_.size() : 0);
    } else if (!timed_.empty() && !is_drafted && !is_of_all_) {
        std::swap(timed_.front(),
                  *std::ranges::min_element(timed_, {}, [&](size_t i) { return proposals[i].n_waiting; }));
        timed_.resize(1);
    }
}

// The price is doubted, so it is not waited for: what a step really takes beyond the plain one is taken off afterwards.
// What is sure already, rows that wait to be injected, has to be there before.
bool Retiming::begin(double step_ms, double plain_ms, double sure_ms) {
    if (credit_ms_ < sure_ms + std::min(step_ms - plain_ms, kLeastSteps * plain_ms)) {
        return false;
    }
    step_ms_ = step_ms;
    plain_ms_ = plain_ms;
    return true;
}

void Retiming::observe(const StepShape& step, double total_ms) {
    const bool is_whole = step.n_drafting > 0 && step.n_drafted_rows == step.n_drafting * block_size_;
    if (step_ms_ > 0) {
        settle(total_ms);
    } else if (is_whole) {
        credit_ms_ = std::min(credit_ms_, 0.0); // it was timed
    } else {
        credit_ms_ += kShare / (1 + n_confirmed_) * total_ms;
    }
}

void Retiming::settle(double total_ms) {
    credit_ms_ -= std::max(0.0, total_ms - plain_ms_);
    n_confirmed_ = kTooDear * total_ms < step_ms_ ? 0 : std::min(n_confirmed_ + 1, kMostConfirmed);
    is_of_all_ = !is_of_all_;
    step_ms_ = 0;
}

} // namespace dspark
