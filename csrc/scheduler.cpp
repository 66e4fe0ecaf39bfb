#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dspark {

namespace {

constexpr double kMemory = 0.97;    // of the speedup: about 30 steps
constexpr double kBonusStep = 0.05; // of the bonus: about 20 drafted steps
// Of the tokens that drafting is expected to gain: a smaller advantage is less than what costs and survivals err by.
constexpr double kDoubt = 0.04;
constexpr double kDoubtGoingOn = 0.02; // drafts that go on show what they take, and to leave them takes some slow steps
constexpr double kMostOf = 0.7;        // of the requests: drafts of few among many are dear
constexpr double kMinPlain = 8;        // plain tokens' worth of time before the measured speedup counts

int32_t fixed_rows(const Proposal& proposal) { return std::min(proposal.policy.length, proposal.most); }

// Drafted rows that a request under a policy other than adaptive brings, at most.
int32_t other_rows(const Proposal& proposal) {
    switch (proposal.policy.kind) {
    case Policy::Kind::fixed:
        return fixed_rows(proposal);
    case Policy::Kind::threshold:
    case Policy::Kind::algorithm1:
        return proposal.most;
    default:
        return 0;
    }
}

double round_tokens(const DraftedBlock& block) {
    return expected_tokens(block.expected.first(static_cast<size_t>(block.most)));
}

int32_t sum_rows(std::span<const int32_t> prefix_len) {
    return std::accumulate(prefix_len.begin(), prefix_len.end(), 0);
}

} // namespace

Scheduler::Scheduler(SchedulerOptions options)
    : options_(std::move(options)), costs_(options_.costs, options_.equal_lengths),
      survival_(options_.block_size, options_.calibration) {}

double Scheduler::speedup() const { return n_plain_ < kMinPlain ? 1.0 : std::max(1.0, n_committed_ / n_plain_); }

// ---- what things cost ----

void Scheduler::price_rows(const StepLoad& load, const StepShape& step) {
    int32_t n_most = 0;
    for (const DraftedBlock& block : group_.blocks) {
        n_most += block.most;
    }
    costs_.price_rows(load, step, n_most, row_ms_);
}

// A first draft injects all rows that wait, a prompt's mostly: worth it the more, the more rounds are to come. How many
// tokens a text still has is not known: at most n_left, and on average what texts of its length have had.
void Scheduler::price_entries(std::span<const Proposal> proposals) {
    int32_t n_rows = 0;
    for (const size_t i : group_.members) {
        n_rows += std::max(0, proposals[i].n_waiting - kRoundRows);
    }
    if (n_rows == 0 || parking_.has_compared()) {
        return;
    }
    const double row_ms = costs_.inject_ms(n_rows) / n_rows; // those who begin together inject in one pass
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        DraftedBlock& block = group_.blocks[member];
        const double n_left = std::min<double>(proposal.n_left, lengths_.left(proposal.n_written));
        const double n_rounds = std::max(1.0, n_left / round_tokens(block));
        block.entry_ms = std::max(0, proposal.n_waiting - kRoundRows) * row_ms / n_rounds;
    }
}

// ---- gathering ----

void Scheduler::gather(std::span<const Proposal> proposals, Policy::Kind kind, bool is_after_draft) {
    const auto block = static_cast<size_t>(options_.block_size);
    group_.members.clear();
    group_.blocks.clear();
    for (size_t i = 0; i < proposals.size(); ++i) {
        const bool is_timed = proposals[i].decision == DraftDecision::timed; // a whole block, whatever it says
        const bool may_draft = !is_after_draft || (is_drafting(proposals[i].decision) && !is_timed);
        if (proposals[i].policy.kind == kind && proposals[i].most > 0 && may_draft) {
            group_.members.push_back(i);
        }
    }
    group_.rates.resize(group_.members.size() * 2 * block);
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        const auto confidence = std::span(group_.rates).subspan(2 * member * block, block);
        const auto expected = std::span(group_.rates).subspan((2 * member + 1) * block, block);
        survival_.expect(proposal.key, expected);
        if (proposal.confidence_logits.empty()) {
            std::ranges::copy(expected, confidence.begin());
        } else {
            survival_.read_confidence(proposal.key, proposal.confidence_logits, confidence);
        }
        group_.blocks.push_back({proposal.most, confidence, expected, proposal.is_free});
    }
    if (options_.objective == Objective::latency) {
        weigh();
    }
}

// Latency: the sum of the logarithms of the requests' speeds in place of the sum of the speeds.
void Scheduler::weigh() {
    double mean = 0;
    for (DraftedBlock& block : group_.blocks) {
        block.weight = 1 / round_tokens(block);
        mean += block.weight / static_cast<double>(group_.blocks.size());
    }
    for (DraftedBlock& block : group_.blocks) {
        block.weight /= mean;
    }
}

// ---- before drafting ----

void Scheduler::select(std::span<Proposal> proposals, const StepLoad& load) {
    for (Proposal& proposal : proposals) {
        proposal.decision = proposal.drafts_always() ? DraftDecision::draft : DraftDecision::none;
    }
    promised_speedup_ = 0;
    expected_ms_ = 0;
    is_trial_ = false;
    is_staying_ = false;
    if (parking_.goes_on(proposals)) {
        park(proposals);
        return;
    }
    gather(proposals, Policy::Kind::adaptive, false);
    outlook_ = {};
    if (!group_.blocks.empty()) {
        select_adaptive(proposals, load);
    }
    if (options_.equal_lengths) {
        select_all_or_none(proposals);
    }
    const double gained_ms =
        outlook_.n_tokens * outlook_.plain_ms / static_cast<double>(std::max<size_t>(1, proposals.size()));
    parking_.note(proposals, load, outlook_.extra_ms > 0 ? gained_ms / outlook_.extra_ms : 1, outlook_.plain_ms);
}

void Scheduler::park(std::span<Proposal> proposals) {
    for (Proposal& proposal : proposals) {
        if (proposal.may_adapt()) {
            proposal.decision = DraftDecision::parked;
            survival_.fade(proposal.key.request_id);
        }
    }
}

// Equal lengths: one request without a draft leaves all drafts unverified, so a draft, or a probe, is of all requests.
void Scheduler::select_all_or_none(std::span<Proposal> proposals) const {
    const auto has = [&](DraftDecision decision) { return has_decision(proposals, decision); };
    const bool is_probe = has(DraftDecision::probe) && !has(DraftDecision::none);
    if (!is_probe && !has(DraftDecision::none) && !has(DraftDecision::parked)) {
        return;
    }
    for (Proposal& proposal : proposals) {
        if (proposal.decision != DraftDecision::none) {
            proposal.decision = is_probe ? DraftDecision::probe : DraftDecision::parked;
        }
    }
}

// Against plain decoding in the same time, beyond doubt.
bool Scheduler::pays(const DraftChoice& choice, const StepLoad& load, int32_t n_requests) const {
    if (row_ms_[0] <= 0) {
        return true;
    }
    const double plain_tokens = n_requests * (1 + choice.extra_ms / row_ms_[0]); // in the same time
    const double share = trust_.share() * busy_share(choice, load, n_requests);
    const double doubt = goes_on_drafting() ? kDoubtGoingOn : kDoubt;
    return share * (n_requests + (1 - doubt) * choice.n_gained()) > plain_tokens;
}

// Beside others the place of an answer that ends stays empty for a step, whoever comes next: such a step makes fewer
// tokens, and is shorter by less. Relative to plain decoding.
double Scheduler::busy_share(const DraftChoice& choice, const StepLoad& load, int32_t n_requests) const {
    if (n_requests == 1) {
        return 1;
    }
    const double n_written = lengths_.left(0);
    const double plain_ms = row_ms_[0];
    const double saved_plain_ms = std::max(0.0, plain_ms - costs_.plain_ms(load, n_requests - 1));
    const size_t n_fewer_rows = choice.n_rows - choice.n_rows / choice.n_blocks;
    const double saved_ms = saved_plain_ms + draft_ms_[choice.n_blocks] - draft_ms_[choice.n_blocks - 1] +
                            row_ms_[choice.n_rows] - row_ms_[n_fewer_rows];
    const double n_plain_lost = std::max(0.0, 1 - n_requests * saved_plain_ms / plain_ms);
    const double n_tokens = n_requests + choice.n_tokens;
    const double n_lost = std::max(0.0, 1 + choice.n_tokens / static_cast<double>(choice.n_blocks) -
                                            n_tokens * saved_ms / (plain_ms + choice.extra_ms));
    return (n_written + n_plain_lost) / (n_written + n_lost);
}

// Prices of this step: of rows, drafts, entries.
void Scheduler::price_step(std::span<const Proposal> proposals, const StepLoad& load) {
    int32_t n_other_rows = 0;
    int32_t n_other_blocks = 0;
    for (const Proposal& proposal : proposals) {
        n_other_rows += other_rows(proposal);
        n_other_blocks += proposal.drafts_always() ? 1 : 0;
    }
    price_rows(load, {static_cast<int32_t>(proposals.size()), n_other_blocks, n_other_rows});
    costs_.price_drafts(load, n_other_blocks, static_cast<int32_t>(group_.blocks.size()), draft_ms_);
    price_entries(proposals);
}

void Scheduler::select_adaptive(std::span<Proposal> proposals, const StepLoad& load) {
    const auto n_requests = static_cast<int32_t>(proposals.size());
    price_step(proposals, load);
    DraftChoice choice = choose_fastest_drafting(group_.blocks, {row_ms_, draft_ms_, bonus_tokens_}, n_requests);
    choice.extra_ms += overrun_.n_steps() * row_ms_[0];
    const double leaving_ms = costs_.leaving_ms(load, n_requests, row_ms_[0] + choice.extra_ms);
    choice.extra_ms += costs_.entering_ms(leaving_ms);
    const double promised_ms = row_ms_[0] + choice.extra_ms;
    const double promised =
        promised_ms > 0 ? (n_requests + choice.n_gained()) / n_requests * row_ms_[0] / promised_ms : 0;
    const bool would_pay = pays(choice, load, n_requests);
    const bool is_comparing = would_pay && parking_.compares(promised, row_ms_[0], leaving_ms);
    const bool is_paying = would_pay && !is_comparing;
    is_staying_ = !would_pay && stays(proposals, choice, leaving_ms);
    is_trial_ = !would_pay && !is_staying_ && tries_all(proposals, leaving_ms);
    promised_speedup_ = is_paying || is_staying_ ? promised : 0;
    outlook_ = {choice.n_tokens, choice.extra_ms, row_ms_[0]};
    expected_gain_ = choice.verify_gain_tokens;
    tokens_per_ms_ = choice.tokens_per_ms;
    for (size_t member = 0; member < group_.members.size(); ++member) {
        Proposal& proposal = proposals[group_.members[member]];
        const bool is_chosen = (is_staying_ || is_paying) && choice.is_drafting[member] != 0;
        proposal.decision = is_trial_ || is_chosen ? DraftDecision::draft : DraftDecision::parked;
        if (proposal.decision == DraftDecision::parked) {
            survival_.fade(proposal.key.request_id);
        }
    }
    if (is_paying) {
        probing_.succeed();
        trial_.succeed();
    }
    if (!is_comparing && !is_trial_ && !is_staying_) {
        probe(proposals, load);
        if (load.n_prefill_rows == 0) {
            retiming_.choose(proposals, group_.members,
                             {costs_, row_ms_, draft_ms_, options_.block_size, options_.equal_lengths});
        }
    }
}

// To leave off drafting takes slow steps, there and back: what is lost by going on is not to be more. New answers are
// taken in: otherwise, as others end, ever fewer draft together until it does not pay.
bool Scheduler::stays(std::span<const Proposal> proposals, const DraftChoice& choice, double leaving_ms) const {
    const DraftRuns& runs = costs_.runs();
    if (!runs.is_drafting()) {
        return false;
    }
    const auto n = static_cast<double>(proposals.size());
    const auto n_drafting =
        static_cast<double>(std::ranges::count_if(proposals, [&](const Proposal& one) { return drafts_on(one); }));
    const double loss_ms = choice.extra_ms - choice.n_tokens * row_ms_[0] / n;
    return static_cast<double>(choice.n_blocks) > kMostOf * n && 2 * n_drafting >= n &&
           regret_ms_ + loss_ms < leaving_ms * runs.share_of_run();
}

// It drafted in the last step.
bool Scheduler::drafts_on(const Proposal& proposal) const { return proposal.n_waiting <= options_.block_size + 1; }

// ---- after drafting ----

void Scheduler::schedule(std::span<const Proposal> proposals, const StepLoad& load, std::span<int32_t> prefix_len) {
    for (size_t i = 0; i < proposals.size(); ++i) {
        const Proposal& proposal = proposals[i];
        prefix_len[i] = proposal.decision == DraftDecision::timed ? proposal.most : 0;
        if (proposal.decision != DraftDecision::draft) {
            continue;
        }
        if (proposal.policy.kind == Policy::Kind::fixed) {
            prefix_len[i] = fixed_rows(proposal);
        } else if (proposal.policy.kind == Policy::Kind::threshold) {
            prefix_len[i] = threshold_length(proposal);
        }
    }
    schedule_group(Policy::Kind::algorithm1, proposals, load, prefix_len);
    schedule_group(Policy::Kind::adaptive, proposals, load, prefix_len);
    if (options_.equal_lengths && !prefix_len.empty()) {
        std::fill(prefix_len.begin(), prefix_len.end(), *std::min_element(prefix_len.begin(), prefix_len.end()));
    }
}

// By the raw confidence: upstream's rule knows no calibration.
int32_t Scheduler::threshold_length(const Proposal& proposal) {
    std::vector<double> raw(static_cast<size_t>(options_.block_size));
    if (proposal.confidence_logits.empty()) {
        survival_.expect(proposal.key, raw);
    }
    for (size_t k = 0; k < proposal.confidence_logits.size(); ++k) {
        raw[k] = 1 / (1 + std::exp(-static_cast<double>(proposal.confidence_logits[k])));
    }
    return threshold_prefix({proposal.most, raw, raw, proposal.is_free}, proposal.policy.threshold);
}

void Scheduler::schedule_group(Policy::Kind kind, std::span<const Proposal> proposals, const StepLoad& load,
                               std::span<int32_t> prefix_len) {
    gather(proposals, kind, true);
    if (group_.blocks.empty()) {
        return;
    }
    const int32_t n_other_rows = sum_rows(prefix_len);
    const auto n_blocks = static_cast<int32_t>(group_.blocks.size());
    price_rows(load, {static_cast<int32_t>(proposals.size()), n_blocks, n_other_rows});
    group_.prefix_len.assign(group_.blocks.size(), 0);
    if (kind == Policy::Kind::algorithm1) {
        algorithm1_prefixes(group_.blocks, row_ms_, static_cast<int32_t>(proposals.size()), group_.prefix_len);
    } else {
        priced_ms_ = row_ms_;
        costs_.hope_for_untried(static_cast<int32_t>(proposals.size()) + n_other_rows, row_ms_);
        const double gain = choose_adaptive_prefixes();
        const bool is_look =
            has_decision(proposals, DraftDecision::probe) || has_decision(proposals, DraftDecision::timed);
        if (n_other_rows == 0 && !is_look && !options_.equal_lengths) {
            if (!is_trial_ && !is_staying_) {
                learn_bonus(gain);
            }
            expected_ms_ = priced_ms_[static_cast<size_t>(sum_rows(group_.prefix_len))] - outlook_.plain_ms +
                           draft_ms_[group_.blocks.size()];
        }
    }
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        const bool is_probe = proposal.decision == DraftDecision::probe;
        prefix_len[group_.members[member]] =
            is_probe ? std::min(probing_.length(), proposal.most) : group_.prefix_len[member];
    }
}

double Scheduler::choose_adaptive_prefixes() {
    if (options_.equal_lengths) {
        const int32_t length = equal_prefix(group_.blocks, row_ms_, tokens_per_ms_);
        group_.prefix_len.assign(group_.blocks.size(), length);
        return 0;
    }
    return adaptive_prefixes(group_.blocks, row_ms_, tokens_per_ms_, group_.prefix_len);
}

// Against what was expected before the confidences were known, when the alternative was to go on plainly.
void Scheduler::learn_bonus(double gain) {
    const double gain_to_plain = gain - tokens_per_ms_ * (row_ms_[0] - outlook_.plain_ms);
    const double surprise = (gain_to_plain - expected_gain_) / static_cast<double>(group_.blocks.size());
    bonus_tokens_ = std::max(0.0, bonus_tokens_ + kBonusStep * (surprise - bonus_tokens_));
}

// ---- learning ----

void Scheduler::observe_round(const Proposal& proposal, int32_t prefix_len, int32_t n_accepted) {
    survival_.observe(proposal.key, proposal.confidence_logits, prefix_len, n_accepted);
    if (proposal.decision == DraftDecision::probe) {
        probing_.settle(n_accepted);
    }
}

void Scheduler::observe_step(const StepLoad& load, const StepShape& step, int32_t n_committed, const StepTimes& times) {
    costs_.observe_passes(load, step, times);
    const double entry_ms = step.n_drafting > 0 ? costs_.entry_ms(load, step, times) : 0;
    if (step.n_requests == 0 || load.n_prefill_rows > 0) {
        return;
    }
    probing_.earn(times.total_ms, step.n_requests);
    retiming_.observe(step, times.total_ms);
    costs_.observe_overhead(step, times);
    if (step.n_drafting > 0) {
        parking_.earn(times.total_ms);
    } else {
        trial_.earn(times.total_ms);
    }
    regret_ms_ =
        is_staying_ || is_trial_ ? regret_ms_ + times.total_ms - n_committed * outlook_.plain_ms / step.n_requests : 0;
    learn_speed(load, step, n_committed, times.total_ms, entry_ms);
}

void Scheduler::learn_speed(const StepLoad& load, const StepShape& step, int32_t n_committed, double total_ms,
                            double entry_ms) {
    const double expected_ms = costs_.plain_ms(load, step.n_requests);
    if (expected_ms <= 0) {
        return;
    }
    if (step.n_drafting > 0) {
        trial_.gain(n_committed * expected_ms / step.n_requests - total_ms, expected_ms);
    }
    const double n_plain = step.n_requests * total_ms / expected_ms;
    n_committed_ = kMemory * n_committed_ + n_committed;
    n_plain_ = kMemory * n_plain_ + n_plain;
    trust_.fade(step.n_drafting > 0);
    if (step.n_drafting == 0) {
        overrun_.fade();
    } else if (costs_.runs().is_calm() && expected_ms_ > 0 && outlook_.plain_ms > 0) {
        overrun_.learn((total_ms - entry_ms - outlook_.plain_ms - expected_ms_) / outlook_.plain_ms);
    }
    if (step.n_drafting > 0 && promised_speedup_ > 0) {
        trust_.learn(n_committed, promised_speedup_ * n_plain);
    }
}

void Scheduler::finish(uint64_t request_id, int32_t n_generated) {
    survival_.forget(request_id);
    probing_.forget(request_id);
    if (n_generated > 0) { // it left the queue
        lengths_.observe(n_generated);
    }
}

} // namespace dspark
