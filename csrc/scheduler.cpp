#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace dspark {

namespace {

constexpr double kMemory = 0.97;      // of the speedup: about 30 steps
constexpr double kBonusStep = 0.05;   // of the bonus: about 20 drafted steps
constexpr double kProbeShare = 0.003; // of the time is lost by probing
constexpr double kFirstProbes = 3;    // times as much before the first probe, half of it before the second ..
constexpr double kProbeFloor = 0.2;   // of a probe's cost is taken for lost, whatever it is expected to give
constexpr double kProbeRate = 0.9;    // a probe is as long as would pay if drafts were this good
constexpr int32_t kParkedSteps = 8;   // steps between two looks at requests that are all parked
constexpr int32_t kRoundRows = 3; // context rows a round leaves to be injected; a long wait is paid once, by a probe
// Of the tokens that drafting is expected to gain: a smaller advantage is less than what costs and survivals err by.
constexpr double kDoubt = 0.04;
// Drafted steps keep less than they promise where costs or survivals are off in a way that no estimate shows.
constexpr double kTrustMemory = 0.97; // a drafted step
constexpr double kTrustFades = 0.99;  // a parked step: conditions change
constexpr double kTrustTokens = 100;  // that a promise is taken as kept for before steps show it
constexpr double kLengthAnswers = 10; // that the mean length remembers, each weighed by its tokens
constexpr double kMinPlain = 8;       // plain tokens' worth of time before the measured speedup counts

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

// Of a round that verifies the whole block.
double expected_tokens(const DraftedBlock& block) {
    double survival = 1;
    double n_tokens = 1;
    for (int32_t k = 0; k < block.most; ++k) {
        survival *= block.expected[static_cast<size_t>(k)];
        n_tokens += survival;
    }
    return n_tokens;
}

bool drafts_always(const Proposal& proposal) {
    return proposal.most > 0 && proposal.policy.kind != Policy::Kind::adaptive && !proposal.policy.never_drafts();
}

PassShape pass_of(const StepLoad& load, int32_t n_rows) { return {n_rows, load.n_prefill_rows, load.n_cells}; }

bool has_one_shape(const PassShape& a, const PassShape& b) {
    return a.n_rows == b.n_rows && a.n_prefill_rows == 0 && b.n_prefill_rows == 0;
}

int32_t sum_rows(std::span<const int32_t> prefix_len) {
    return std::accumulate(prefix_len.begin(), prefix_len.end(), 0);
}

} // namespace

Scheduler::Scheduler(SchedulerOptions options)
    : options_(std::move(options)), costs_(options_.costs), survival_(options_.block_size, options_.calibration) {}

double Scheduler::speedup() const { return n_plain_ < kMinPlain ? 1.0 : std::max(1.0, n_committed_ / n_plain_); }

// ---- what things cost ----

// Where a batch of unequal lengths is split, prompts beside rounds are a pass of their own.
double Scheduler::pass_ms(const PassShape& pass) const {
    if (!options_.equal_lengths) {
        return costs_.verify_ms(pass);
    }
    return costs_.verify_ms({pass.n_rows, 0, pass.n_cells, pass.is_repeat}) +
           costs_.verify_ms({0, pass.n_prefill_rows, pass.n_cells});
}

double Scheduler::step_ms(const PassShape& pass, int32_t n_drafted_rows) const {
    return pass_ms(pass) + overhead_.at(n_drafted_rows);
}

// Of plain decoding that goes on: pass after pass of one shape.
PassShape Scheduler::plain_pass(const StepLoad& load, int32_t n_requests) {
    return {n_requests, load.n_prefill_rows, load.n_cells, load.n_prefill_rows == 0};
}

double Scheduler::plain_ms(const StepLoad& load, int32_t n_requests) const {
    return step_ms(plain_pass(load, n_requests), 0);
}

void Scheduler::price_rows(const StepLoad& load, size_t n_requests, int32_t n_other_rows, bool is_after_draft) {
    int32_t n_most = 0;
    for (const DraftedBlock& block : group_.blocks) {
        n_most += block.most;
    }
    const int32_t n_rows = static_cast<int32_t>(n_requests) + n_other_rows;
    row_ms_.clear();
    const bool is_plain = n_other_rows == 0 && !is_after_draft;
    row_ms_.push_back(is_plain ? plain_ms(load, n_rows) : step_ms(pass_of(load, n_rows), n_other_rows));
    for (int32_t n = 1; n <= n_most; ++n) {
        PassShape pass = pass_of(load, n_rows + n);
        pass.is_behind_draft = true;
        pass.is_repeat = has_one_shape(pass, last_pass_);
        row_ms_.push_back(step_ms(pass, n_other_rows + n));
    }
}

// Beside the blocks of n_others that are drafted anyway.
void Scheduler::price_drafts(const StepLoad& load, int32_t n_others) {
    draft_ms_.clear();
    for (int32_t n = 0; n <= static_cast<int32_t>(group_.blocks.size()); ++n) {
        draft_ms_.push_back(costs_.draft_ms(n_others + n, load.n_cells) - costs_.draft_ms(n_others, load.n_cells) +
                            costs_.inject_ms(n * kRoundRows));
    }
}

// A first draft injects all rows that wait, a prompt's mostly: worth it the more, the more rounds are to come. How many
// tokens a text still has is not known: at most n_left, and on average what texts have had (as if ends came at random).
void Scheduler::price_entries(std::span<const Proposal> proposals) {
    int32_t n_rows = 0;
    for (const size_t i : group_.members) {
        n_rows += std::max(0, proposals[i].n_waiting - kRoundRows);
    }
    if (n_rows == 0) {
        return;
    }
    const double row_ms = costs_.inject_ms(n_rows) / n_rows; // those who begin together inject in one pass
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        DraftedBlock& block = group_.blocks[member];
        double n_left = proposal.n_left;
        if (mean_length_ > 0) {
            n_left = std::min(n_left, mean_length_);
        }
        const double n_rounds = std::max(1.0, n_left / expected_tokens(block));
        block.entry_ms = std::max(0, proposal.n_waiting - kRoundRows) * row_ms / n_rounds;
    }
}

// ---- gathering ----

void Scheduler::gather(std::span<const Proposal> proposals, Policy::Kind kind, bool is_after_draft) {
    const auto block = static_cast<size_t>(options_.block_size);
    group_.members.clear();
    group_.blocks.clear();
    for (size_t i = 0; i < proposals.size(); ++i) {
        const bool may_draft = !is_after_draft || is_drafting(proposals[i].decision);
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
        block.weight = 1 / expected_tokens(block);
        mean += block.weight / static_cast<double>(group_.blocks.size());
    }
    for (DraftedBlock& block : group_.blocks) {
        block.weight /= mean;
    }
}

// ---- before drafting ----

void Scheduler::select(std::span<Proposal> proposals, const StepLoad& load) {
    for (Proposal& proposal : proposals) {
        proposal.decision = drafts_always(proposal) ? DraftDecision::draft : DraftDecision::none;
    }
    promised_speedup_ = 0;
    if (stay_parked(proposals)) {
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
    note_parked(proposals, load);
}

// Requests that were all parked go on so for some steps without a look: nothing is learned of them meanwhile, and
// looking at many small requests takes as long as a per cent of a small model's step.
bool Scheduler::stay_parked(std::span<Proposal> proposals) {
    const auto may_draft = [](const Proposal& p) { return p.policy.kind == Policy::Kind::adaptive && p.most > 0; };
    size_t n = 0;
    for (const Proposal& proposal : proposals) {
        if (may_draft(proposal) && (n >= parked_.size() || parked_[n++] != proposal.key.request_id)) {
            return false;
        }
    }
    if (n != parked_.size() || n == 0 || --n_parked_steps_ < 0) {
        return false;
    }
    for (Proposal& proposal : proposals) {
        if (may_draft(proposal)) {
            proposal.decision = DraftDecision::parked;
            survival_.fade(proposal.key.request_id);
        }
    }
    return true;
}

void Scheduler::note_parked(std::span<const Proposal> proposals, const StepLoad& load) {
    parked_.clear();
    n_parked_steps_ = kParkedSteps - 1;
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

// Equal lengths: one request without a draft leaves all drafts unverified, so a draft, or a probe, is of all requests.
void Scheduler::select_all_or_none(std::span<Proposal> proposals) const {
    const auto has = [&](DraftDecision decision) {
        return std::any_of(proposals.begin(), proposals.end(),
                           [&](const Proposal& p) { return p.decision == decision; });
    };
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
bool Scheduler::pays(const DraftChoice& choice, int32_t n_requests) const {
    if (row_ms_[0] <= 0) {
        return true;
    }
    const double plain_tokens = n_requests * (1 + choice.extra_ms / row_ms_[0]); // in the same time
    return trust() * (n_requests + (1 - kDoubt) * choice.n_gained()) > plain_tokens;
}

double Scheduler::trust() const { return std::min(1.0, (n_kept_ + kTrustTokens) / (n_promised_ + kTrustTokens)); }

// Of a step: the tokens that it made, and those that it was to make in the time it took.
void Scheduler::learn_trust(bool has_drafted, int32_t n_committed, double n_plain) {
    const double memory = has_drafted ? kTrustMemory : kTrustFades;
    n_kept_ *= memory;
    n_promised_ *= memory;
    if (has_drafted && promised_speedup_ > 0) {
        n_kept_ += n_committed;
        n_promised_ += promised_speedup_ * n_plain;
    }
}

void Scheduler::select_adaptive(std::span<Proposal> proposals, const StepLoad& load) {
    int32_t n_other_rows = 0;
    int32_t n_other_blocks = 0;
    for (const Proposal& proposal : proposals) {
        n_other_rows += other_rows(proposal);
        n_other_blocks += drafts_always(proposal) ? 1 : 0;
    }
    price_rows(load, proposals.size(), n_other_rows, false);
    price_drafts(load, n_other_blocks);
    price_entries(proposals);
    const auto n_requests = static_cast<int32_t>(proposals.size());
    const DraftChoice choice = choose_fastest_drafting(group_.blocks, {row_ms_, draft_ms_, bonus_tokens_}, n_requests);
    const bool is_paying = pays(choice, n_requests);
    const double promised_ms = row_ms_[0] + choice.extra_ms;
    promised_speedup_ =
        is_paying && promised_ms > 0 ? (n_requests + choice.n_gained()) / n_requests * row_ms_[0] / promised_ms : 0;
    outlook_ = {choice.n_tokens, choice.extra_ms, row_ms_[0]};
    expected_gain_ = choice.verify_gain_tokens;
    tokens_per_ms_ = choice.tokens_per_ms;
    for (size_t member = 0; member < group_.members.size(); ++member) {
        Proposal& proposal = proposals[group_.members[member]];
        proposal.decision = is_paying && choice.is_drafting[member] != 0 ? DraftDecision::draft : DraftDecision::parked;
        if (proposal.decision == DraftDecision::parked) {
            survival_.fade(proposal.key.request_id);
        }
    }
    probe(proposals, load);
}

// One parked request drafts when the time allowed for probing covers what it is expected to lose.
void Scheduler::probe(std::span<Proposal> proposals, const StepLoad& load) {
    Proposal* candidate = longest_unprobed(proposals);
    if (candidate == nullptr) {
        return;
    }
    const int32_t length = probe_length(*candidate);
    const auto n_requests = static_cast<int32_t>(proposals.size());
    // The plain step behind it has another shape than the pass before, too.
    const double return_ms = step_ms(pass_of(load, n_requests), 0) - row_ms_[0];
    const double cost_ms = draft_ms_[1] + costs_.inject_ms(candidate->n_waiting) + return_ms +
                           row_ms_[static_cast<size_t>(length)] - row_ms_[0];
    probe_cost_ms_ =
        std::max(kProbeFloor * cost_ms, cost_ms - expected_accepts(*candidate, length) * row_ms_[0] / n_requests);
    if (probe_credit_ms_ < probe_cost_ms_) {
        return;
    }
    probe_credit_ms_ -= probe_cost_ms_;
    ++n_probes_;
    probe_len_ = length;
    candidate->decision = DraftDecision::probe;
    std::erase(probed_, candidate->key.request_id);
    probed_.push_back(candidate->key.request_id);
}

Proposal* Scheduler::longest_unprobed(std::span<Proposal> proposals) const {
    Proposal* candidate = nullptr;
    std::ptrdiff_t oldest = 0;
    for (const size_t i : group_.members) {
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

double Scheduler::expected_accepts(const Proposal& candidate, int32_t length) {
    std::vector<double> rates(static_cast<size_t>(options_.block_size));
    survival_.expect(candidate.key, rates);
    DraftedBlock block;
    block.most = length;
    block.expected = rates;
    return expected_tokens(block) - 1;
}

// As long as would pay if drafts were good.
int32_t Scheduler::probe_length(const Proposal& candidate) const {
    const std::vector<double> good(static_cast<size_t>(options_.block_size), kProbeRate);
    const DraftedBlock block{candidate.most, good, good, true};
    int32_t length = 0;
    adaptive_prefixes({&block, 1}, row_ms_, tokens_per_ms_, {&length, 1});
    return std::max(length, 1);
}

// ---- after drafting ----

void Scheduler::schedule(std::span<const Proposal> proposals, const StepLoad& load, std::span<int32_t> prefix_len) {
    std::fill(prefix_len.begin(), prefix_len.end(), 0);
    for (size_t i = 0; i < proposals.size(); ++i) {
        const Proposal& proposal = proposals[i];
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
    price_rows(load, proposals.size(), n_other_rows, true);
    group_.prefix_len.assign(group_.blocks.size(), 0);
    if (kind == Policy::Kind::algorithm1) {
        algorithm1_prefixes(group_.blocks, row_ms_, static_cast<int32_t>(proposals.size()), group_.prefix_len);
    } else {
        const double gain = choose_adaptive_prefixes();
        const bool has_probe = std::ranges::any_of(
            proposals, [](const Proposal& proposal) { return proposal.decision == DraftDecision::probe; });
        if (n_other_rows == 0 && !has_probe && !options_.equal_lengths) {
            learn_bonus(gain);
        }
    }
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        const bool is_probe = proposal.decision == DraftDecision::probe;
        prefix_len[group_.members[member]] = is_probe ? std::min(probe_len_, proposal.most) : group_.prefix_len[member];
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
}

void Scheduler::observe_step(const StepLoad& load, int32_t n_requests, int32_t n_drafting, int32_t n_drafted_rows,
                             int32_t n_committed, const StepTimes& times) {
    PassShape pass = pass_of(load, n_requests + n_drafted_rows);
    pass.is_behind_draft = n_drafting > 0;
    pass.is_repeat = has_one_shape(pass, last_pass_);
    last_pass_ = pass;
    const bool is_split = options_.equal_lengths && n_requests > 0 && load.n_prefill_rows > 0;
    if (times.verify_ms > 0 && !is_split) { // of two passes nobody knows which took how long
        costs_.observe_verify(pass, times.verify_ms);
    }
    if (n_drafting > 0) {
        costs_.observe_draft(n_drafting, load.n_cells, times.draft_ms);
    }
    if (n_requests == 0 || load.n_prefill_rows > 0) {
        return;
    }
    const double share = kProbeShare * (1 + kFirstProbes / (1 + static_cast<double>(n_probes_)));
    probe_credit_ms_ = std::min(probe_credit_ms_ + share * times.total_ms, 2 * probe_cost_ms_);
    overhead_.push(n_drafted_rows, std::max(0.0, times.total_ms - times.draft_ms - times.inject_ms - times.verify_ms));
    const double expected_ms = plain_ms(load, n_requests);
    if (expected_ms > 0) {
        n_committed_ = kMemory * n_committed_ + n_committed;
        n_plain_ = kMemory * n_plain_ + n_requests * times.total_ms / expected_ms;
        learn_trust(n_drafting > 0, n_committed, n_requests * times.total_ms / expected_ms);
    }
}

void Scheduler::finish(uint64_t request_id, int32_t n_generated) {
    survival_.forget(request_id);
    std::erase(probed_, request_id);
    if (n_generated > 0) { // it left the queue; few short answers say little of the long ones that take the time
        const double step = n_generated / (n_generated + kLengthAnswers * mean_length_);
        mean_length_ += step * (n_generated - mean_length_);
    }
}

} // namespace dspark
