// What the scheduler is told of a request that decodes in a step, and what it answers. Plain data.
#pragma once

#include "cost_table.h"
#include "policy.h"
#include "survival.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

namespace dspark {

enum class DraftDecision {
    none,   // nothing to decide: no room, off, or not asked
    draft,  // by policy, or because it pays
    probe,  // parked, but looked at again
    timed,  // parked, but what a whole block takes is timed again
    parked, // would cost more than it gains
};
[[nodiscard]] inline bool is_drafting(DraftDecision decision) {
    return decision == DraftDecision::draft || decision == DraftDecision::probe || decision == DraftDecision::timed;
}

// One request that decodes in this step. Shares the order of the engine's lanes.
struct Proposal {
    SurvivalKey key;
    Policy policy;
    int32_t n_waiting = 0;                                // context rows that its draft would have to inject first
    int32_t n_written = 0;                                // tokens
    int32_t n_left = std::numeric_limits<int32_t>::max(); // tokens it may still write
    int32_t most = 0;                             // longest prefix its limits allow: block, max_tokens, context, option
    std::span<const float> confidence_logits;     // (block_size,), empty before drafting or without a confidence head
    bool is_free = false;                         // any policy is lossless for it
    DraftDecision decision = DraftDecision::none; // after select

    [[nodiscard]] bool may_adapt() const { return policy.kind == Policy::Kind::adaptive && most > 0; }
    [[nodiscard]] bool drafts_always() const {
        return most > 0 && policy.kind != Policy::Kind::adaptive && !policy.never_drafts();
    }
};

[[nodiscard]] inline bool has_decision(std::span<const Proposal> proposals, DraftDecision decision) {
    return std::ranges::any_of(proposals, [&](const Proposal& proposal) { return proposal.decision == decision; });
}

// What else the step carries.
struct StepLoad {
    int32_t n_prefill_rows = 0;
    ContextLoad context; // of the target's cache
};

} // namespace dspark
