// One request from submit to its last event. Owns: its tokens, options, counts and figures. Must not know: caches,
// models, other requests. Threads: built by the submitter, then the engine's alone.
#pragma once

#include "acceptance.h"
#include "policy.h"
#include "sampling.h"
#include "token_mask.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace dspark {

using Clock = std::chrono::steady_clock;

[[nodiscard]] inline double milliseconds_since(Clock::time_point begin) {
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

enum class FinishReason { none, stop, length, context_full, cancelled, error };
[[nodiscard]] const char* finish_reason_name(FinishReason reason);

struct RequestOptions {
    SamplingOptions sampling;
    int32_t max_tokens = 128;
    bool ignore_eos = false;
    // At a full context: forget the older half behind the first n_keep tokens (-1: the prompt) and go on, or end.
    bool context_shift = false;
    int32_t n_keep = 0;
    int32_t n_logprobs = -1; // -1: none; 0: the chosen token's; n: the n best too
    // Empty: exact when greedy, block when sampling (DESIGN section 2).
    std::optional<Verification> verification;
    std::optional<Policy> policy; // empty: the engine's
    int32_t draft_limit = -1;     // -1: as the policy says; 0: off; n: at most n drafted tokens a round
    bool trace = false;           // events carry a RoundRecord for every decode round
    // Which tokens may stand where; each request goes on from a copy. Verified by `exact` alone, where any sampler is
    // lossless.
    std::shared_ptr<const TokenMask> mask;

    // Throws std::invalid_argument: "<name> must <rule>, got <value>".
    void validate() const;
    [[nodiscard]] Verification rule() const;
};

// Counts cover decode rounds; the token that prefill yields belongs to no round.
struct RequestStats {
    int32_t n_prompt = 0;
    int32_t n_reused = 0;    // of those, found in the caches
    int32_t n_discarded = 0; // tokens that context shifts have forgotten
    int32_t n_rounds = 0;    // target passes that decoded this request
    int32_t n_drafted = 0;   // tokens the drafter proposed
    int32_t n_scheduled = 0; // of those, sent to the target
    int32_t n_accepted = 0;  // of those, accepted by the verification rule
    int32_t n_committed = 0; // tokens the rounds added to the text, corrections and bonus tokens included
    int32_t n_parked = 0;    // rounds that the scheduler decoded plainly because a draft would not have paid
    int32_t n_probes = 0;    // rounds that were drafted while parked, to see whether that still holds
    // Why it was parked last: a draft was expected to have park_tokens accepted for park_extra_ms beyond a plain step
    // of park_plain_ms (which yields one token a request).
    double park_tokens = 0;
    double park_extra_ms = 0;
    double park_plain_ms = 0;
    std::vector<int32_t> scheduled_per_position; // (block_size)
    std::vector<int32_t> accepted_per_position;  // (block_size)
    // Wall time of the steps this request took part in, shared passes counted in full.
    double queue_ms = 0;
    double prefill_ms = 0;
    double draft_ms = 0;
    double verify_ms = 0;
    double host_ms = 0; // the rest of the rounds: heads' host part, sampling, injection
    // What the rounds' tokens would have taken without a drafter under each step's load, by the measured costs; 0:
    // these are not known.
    double plain_ms = 0;

    [[nodiscard]] double rounds_ms() const { return draft_ms + verify_ms + host_ms; }
};

// One decode round of a traced request: what calibration learns from.
struct RoundRecord {
    int32_t n_drafted = 0;                // 0 in a round without a draft
    int32_t prefix_len = 0;               // of those, sent to the target
    int32_t n_accepted = 0;               // as the rule decided, not cut at an end of text
    std::vector<float> confidence_logits; // (n_drafted,), before calibration; empty without a confidence head
    // Wall time of the step's two passes, shared by all requests in them.
    double draft_ms = 0;
    double verify_ms = 0;
};

enum class Phase { prefill, decode, finished };

struct Request {
    Request(uint64_t request_id, std::vector<int32_t> prompt, RequestOptions request_options);

    [[nodiscard]] int32_t n_generated() const {
        return static_cast<int32_t>(tokens.size()) + stats.n_discarded - n_prompt;
    }
    [[nodiscard]] int32_t n_remaining() const { return options.max_tokens - n_generated(); }
    // Position of the anchor: the last token, whose own state the target has not computed yet.
    [[nodiscard]] int32_t anchor_position() const { return static_cast<int32_t>(tokens.size()) - 1; }
    // Leading tokens that a context of n_ctx keeps when it shifts.
    [[nodiscard]] int32_t n_kept(int32_t n_ctx) const;
    // Forgets n tokens from `begin` on, all of which are cached.
    void discard(int32_t begin, int32_t n);
    // Leading tokens whose cells are what a prompt of these tokens alone would leave: rows behind a shift have seen
    // the forgotten ones.
    [[nodiscard]] int32_t n_reusable() const { return std::min(n_cached, n_unshifted); }

    uint64_t id;
    RequestOptions options;
    std::vector<int32_t> tokens; // prompt, then output, without what shifts have forgotten
    int32_t n_prompt;
    int32_t n_cached = 0; // leading tokens whose rows stand in the target's cache
    int32_t n_unshifted = std::numeric_limits<int32_t>::max();
    int32_t sequence = -1;
    Phase phase = Phase::prefill;
    TokenCounts counts;
    RandomStream random;
    std::unique_ptr<TokenMask> mask; // null: every token may come
    RequestStats stats;
    Clock::time_point submitted = Clock::now();
};

} // namespace dspark
