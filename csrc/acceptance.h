// How many drafted tokens of one request stand, and which token follows them.
// Owns: the three verification rules. Must not know: logits, models, batches, other requests.
// Threads: pure functions; the caller's row functions run on the caller's thread.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "random.h"
#include "sampling.h"

namespace dspark {

enum class Verification {
    exact,     // sample the target at each position, go on while it equals the draft
    rejection, // token-wise speculative sampling
    block,     // block verification, Sun et al., arXiv 2403.10444, algorithm 2
};

struct VerifyInput {
    std::span<const int32_t> draft_tokens; // (prefix_len,): may be shorter than what was drafted
    // (>= prefix_len,): what each token was really drawn from. May be empty under `exact`.
    std::span<const Distribution> draft_probs;
    uint64_t start = 0; // absolute position of the anchor; row j decides position start + 1 + j
    RandomStream random{0};
};

struct VerifyResult {
    int32_t n_accepted = 0; // in 0 .. prefix_len
    int32_t next_token = 0; // committed after the accepted ones: correction, residual or bonus
};

// Gives the target's distribution after anchor and draft_tokens[0 .. row), for row in 0 .. prefix_len. Called at most
// once per row, in ascending order, and only for rows that are needed. The reference must stay valid until verify()
// returns.
using TargetRow = std::function<const Distribution&(int32_t row)>;

// Whether prefix_len may depend on the drafted tokens: under `exact` any policy is lossless; otherwise the decision to
// verify slot j may use only what was known before draft token j was drawn (paper, appendix A).
[[nodiscard]] VerifyResult verify(Verification rule, const VerifyInput& input, const TargetRow& target_row);

// `exact` with any sampler (grammar, argmax taken on the device): `decide(row)` returns the target's own token for
// that row and is not called again after the first mismatch.
using TargetToken = std::function<int32_t(int32_t row)>;
[[nodiscard]] VerifyResult verify_exact(std::span<const int32_t> draft_tokens, const TargetToken& decide);

} // namespace dspark
