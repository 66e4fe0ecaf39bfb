#include "scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dspark {

namespace {

constexpr double kMemory = 0.97;      // of the speedup: about 30 steps
constexpr double kBonusStep = 0.05;   // of the bonus: about 20 drafted steps
constexpr double kProbeShare = 0.008; // of the time goes into probing at most
constexpr double kProbeRate = 0.9;    // a probe is as long as would pay if drafts were this good
constexpr int32_t kRoundRows = 3; // context rows a round leaves to be injected; a long wait is paid once, by a probe
constexpr double kMinPlain = 8;   // plain tokens' worth of time before the measured speedup counts

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

bool drafts_always(const Proposal& proposal) {
    return proposal.most > 0 && proposal.policy.kind != Policy::Kind::off &&
           proposal.policy.kind != Policy::Kind::adaptive;
}

} // namespace

Scheduler::Scheduler(SchedulerOptions options)
    : options_(std::move(options)), costs_(options_.costs), survival_(options_.block_size, options_.calibration) {}

double Scheduler::speedup() const { return n_plain_ < kMinPlain ? 1.0 : std::max(1.0, n_committed_ / n_plain_); }

// ---- what things cost ----

double Scheduler::step_ms(const StepLoad& load, int32_t n_rows) const {
    return pass_ms({n_rows, load.n_prefill_rows, load.n_cells}) + overhead_ms_.median();
}

// Where a batch of unequal lengths is split, prompts beside rounds are a pass of their own.
double Scheduler::pass_ms(const PassShape& pass) const {
    if (!options_.equal_lengths) {
        return costs_.verify_ms(pass);
    }
    return costs_.verify_ms({pass.n_rows, 0, pass.n_cells}) + costs_.verify_ms({0, pass.n_prefill_rows, pass.n_cells});
}

// cost[n]: the step with n drafted rows of the group in it.
std::vector<double> Scheduler::row_costs(const StepLoad& load, size_t n_requests, int32_t n_other_rows) const {
    int32_t n_most = 0;
    for (const DraftedBlock& block : group_.blocks) {
        n_most += block.most;
    }
    std::vector<double> cost_ms;
    for (int32_t n = 0; n <= n_most; ++n) {
        cost_ms.push_back(step_ms(load, static_cast<int32_t>(n_requests) + n_other_rows + n) +
                          n * row_overhead_ms_.median());
    }
    return cost_ms;
}

// cost[n]: drafting n blocks of the group beside those of n_others.
std::vector<double> Scheduler::block_costs(const StepLoad& load, int32_t n_others) const {
    std::vector<double> cost_ms;
    for (size_t n = 0; n <= group_.blocks.size(); ++n) {
        cost_ms.push_back(costs_.draft_ms(n_others + static_cast<int32_t>(n), load.n_cells) -
                          costs_.draft_ms(n_others, load.n_cells) +
                          costs_.inject_ms(static_cast<int32_t>(n) * kRoundRows));
    }
    return cost_ms;
}

// Tokens that a millisecond of this engine makes when it only decodes: what time spent elsewhere costs.
double Scheduler::price(const StepLoad& load, size_t n_requests) const {
    const double plain_ms = step_ms({0, load.n_cells}, static_cast<int32_t>(n_requests));
    return plain_ms > 0 ? speedup() * static_cast<double>(n_requests) / plain_ms : 0;
}

// ---- gathering ----

void Scheduler::gather(std::span<const Proposal> proposals, Policy::Kind kind, bool is_after_draft) {
    const auto block = static_cast<size_t>(options_.block_size);
    group_.members.clear();
    group_.blocks.clear();
    for (size_t i = 0; i < proposals.size(); ++i) {
        const DraftDecision decision = proposals[i].decision;
        const bool drafted = decision == DraftDecision::draft || decision == DraftDecision::probe;
        if (proposals[i].policy.kind == kind && proposals[i].most > 0 && (drafted || !is_after_draft)) {
            group_.members.push_back(i);
        }
    }
    group_.rates.resize(group_.members.size() * 2 * block);
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        const auto confidence = std::span(group_.rates).subspan(2 * member * block, block);
        const auto expected = std::span(group_.rates).subspan((2 * member + 1) * block, block);
        survival_.expect(proposal.key, expected);
        survival_.read_confidence(proposal.key, proposal.confidence_logits, confidence);
        group_.blocks.push_back({proposal.most, confidence, expected, proposal.is_free, 1.0});
    }
    if (options_.objective == Objective::latency) {
        weigh();
    }
}

// Latency: the sum of the logarithms of the requests' speeds in place of the sum of the speeds.
void Scheduler::weigh() {
    double mean = 0;
    for (DraftedBlock& block : group_.blocks) {
        double survival = 1;
        double n_tokens = 1;
        for (int32_t k = 0; k < block.most; ++k) {
            survival *= block.expected[static_cast<size_t>(k)];
            n_tokens += survival;
        }
        block.weight = 1 / n_tokens;
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
    gather(proposals, Policy::Kind::adaptive, false);
    outlook_ = {};
    if (!group_.blocks.empty()) {
        select_adaptive(proposals, load);
    }
    if (options_.equal_lengths) {
        select_all_or_none(proposals);
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

void Scheduler::select_adaptive(std::span<Proposal> proposals, const StepLoad& load) {
    int32_t n_other_rows = 0;
    int32_t n_other_blocks = 0;
    for (const Proposal& proposal : proposals) {
        n_other_rows += other_rows(proposal);
        n_other_blocks += drafts_always(proposal) ? 1 : 0;
    }
    const std::vector<double> cost_ms = row_costs(load, proposals.size(), n_other_rows);
    const std::vector<double> draft_ms = block_costs(load, n_other_blocks);
    const double tokens_per_ms = price(load, proposals.size());
    const DraftChoice choice = choose_drafting(group_.blocks, cost_ms, draft_ms, tokens_per_ms, bonus_tokens_);
    outlook_ = {choice.n_tokens, choice.extra_ms, cost_ms[0]};
    expected_gain_ = choice.verify_gain_tokens;
    for (size_t member = 0; member < group_.members.size(); ++member) {
        proposals[group_.members[member]].decision =
            choice.is_drafting[member] != 0 ? DraftDecision::draft : DraftDecision::parked;
    }
    probe(proposals, cost_ms, draft_ms[1], tokens_per_ms);
}

// One parked request drafts when the time allowed for probing covers what it costs if nothing is accepted.
void Scheduler::probe(std::span<Proposal> proposals, std::span<const double> cost_ms, double draft_ms,
                      double tokens_per_ms) {
    const size_t n_block = static_cast<size_t>(options_.block_size);
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
    if (candidate == nullptr) {
        return;
    }
    const std::vector<double> good(n_block, kProbeRate);
    const DraftedBlock block{candidate->most, good, good, true, 1};
    int32_t length = 0;
    adaptive_prefixes({&block, 1}, cost_ms, tokens_per_ms, {&length, 1});
    length = std::max(length, 1);
    const double cost =
        draft_ms + costs_.inject_ms(candidate->n_waiting) + cost_ms[static_cast<size_t>(length)] - cost_ms[0];
    probe_cost_ms_ = cost;
    if (probe_credit_ms_ < cost) {
        return;
    }
    probe_credit_ms_ -= cost;
    probe_len_ = length;
    candidate->decision = DraftDecision::probe;
    std::erase(probed_, candidate->key.request_id);
    probed_.push_back(candidate->key.request_id);
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
            std::vector<double> raw(static_cast<size_t>(options_.block_size));
            if (proposal.confidence_logits.empty()) {
                survival_.expect(proposal.key, raw);
            }
            for (size_t k = 0; k < proposal.confidence_logits.size(); ++k) {
                raw[k] = 1 / (1 + std::exp(-static_cast<double>(proposal.confidence_logits[k])));
            }
            prefix_len[i] = threshold_prefix({proposal.most, raw, raw, proposal.is_free, 1}, proposal.policy.threshold);
        }
    }
    schedule_algorithm1(proposals, load, prefix_len);
    schedule_adaptive(proposals, load, prefix_len);
    if (options_.equal_lengths && !prefix_len.empty()) {
        std::fill(prefix_len.begin(), prefix_len.end(), *std::min_element(prefix_len.begin(), prefix_len.end()));
    }
}

namespace {

int32_t sum_rows(std::span<const int32_t> prefix_len) {
    int32_t n_rows = 0;
    for (const int32_t length : prefix_len) {
        n_rows += length;
    }
    return n_rows;
}

} // namespace

void Scheduler::schedule_algorithm1(std::span<const Proposal> proposals, const StepLoad& load,
                                    std::span<int32_t> prefix_len) {
    gather(proposals, Policy::Kind::algorithm1, true);
    if (group_.blocks.empty()) {
        return;
    }
    const std::vector<double> cost_ms = row_costs(load, proposals.size(), sum_rows(prefix_len));
    group_.prefix_len.assign(group_.blocks.size(), 0);
    algorithm1_prefixes(group_.blocks, cost_ms, static_cast<int32_t>(proposals.size()), group_.prefix_len);
    for (size_t member = 0; member < group_.members.size(); ++member) {
        prefix_len[group_.members[member]] = group_.prefix_len[member];
    }
}

void Scheduler::schedule_adaptive(std::span<const Proposal> proposals, const StepLoad& load,
                                  std::span<int32_t> prefix_len) {
    gather(proposals, Policy::Kind::adaptive, true);
    if (group_.blocks.empty()) {
        return;
    }
    const std::vector<double> cost_ms = row_costs(load, proposals.size(), sum_rows(prefix_len));
    const double tokens_per_ms = price(load, proposals.size());
    group_.prefix_len.assign(group_.blocks.size(), 0);
    double gain = 0;
    if (options_.equal_lengths) {
        const int32_t length = equal_prefix(group_.blocks, cost_ms, tokens_per_ms);
        group_.prefix_len.assign(group_.blocks.size(), length);
    } else {
        gain = adaptive_prefixes(group_.blocks, cost_ms, tokens_per_ms, group_.prefix_len);
        const double surprise = (gain - expected_gain_) / static_cast<double>(group_.blocks.size());
        bonus_tokens_ = std::max(0.0, bonus_tokens_ + kBonusStep * (surprise - bonus_tokens_));
    }
    for (size_t member = 0; member < group_.members.size(); ++member) {
        const Proposal& proposal = proposals[group_.members[member]];
        const bool is_probe = proposal.decision == DraftDecision::probe;
        prefix_len[group_.members[member]] = is_probe ? std::min(probe_len_, proposal.most) : group_.prefix_len[member];
    }
}

// ---- learning ----

void Scheduler::observe_round(const Proposal& proposal, int32_t prefix_len, int32_t n_accepted) {
    survival_.observe(proposal.key, proposal.confidence_logits, prefix_len, n_accepted);
}

void Scheduler::observe_step(const StepLoad& load, int32_t n_requests, int32_t n_drafting, int32_t n_drafted_rows,
                             int32_t n_committed, const StepTimes& times) {
    const bool is_split = options_.equal_lengths && n_requests > 0 && load.n_prefill_rows > 0;
    if (times.verify_ms > 0 && !is_split) { // of two passes nobody knows which took how long
        costs_.observe_verify({n_requests + n_drafted_rows, load.n_prefill_rows, load.n_cells}, times.verify_ms);
    }
    if (n_drafting > 0) {
        costs_.observe_draft(n_drafting, load.n_cells, times.draft_ms);
    }
    probe_credit_ms_ = std::min(probe_credit_ms_ + kProbeShare * times.total_ms, 2 * probe_cost_ms_);
    if (n_requests == 0 || load.n_prefill_rows > 0) {
        return;
    }
    const double overhead = std::max(0.0, times.total_ms - times.draft_ms - times.inject_ms - times.verify_ms);
    if (n_drafted_rows == 0) {
        overhead_ms_.push(overhead);
    } else {
        row_overhead_ms_.push(std::max(0.0, overhead - overhead_ms_.median()) / n_drafted_rows);
    }
    const double plain_ms = step_ms({0, load.n_cells}, n_requests);
    if (plain_ms > 0) {
        n_committed_ = kMemory * n_committed_ + n_committed;
        n_plain_ = kMemory * n_plain_ + n_requests * times.total_ms / plain_ms;
    }
}

void Scheduler::forget(uint64_t request_id) {
    survival_.forget(request_id);
    std::erase(probed_, request_id);
}

} // namespace dspark
