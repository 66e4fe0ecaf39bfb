// What the target's rows decide about one request: which drafted tokens stand, and the token behind them. Owns: the
// buffers of that, the penalties' and mask's view of drafted tokens while rows are read. Must not know: batches,
// caches, other requests. Threads: one per thread; different requests may be decided at the same time.
#pragma once

#include "acceptance.h"
#include "masked_sampling.h"
#include "request.h"
#include "synthetic_acceptance.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

// Row j stands behind the anchor and drafted[0 .. j). All of it must live until decide() returns.
struct DecidedRows {
    Request* request = nullptr; // its counts and mask are used meanwhile, and are as before afterwards
    std::span<const std::span<const float>> logits; // (1 + drafted.size()) rows of n_vocab
    std::span<const int32_t> drafted;
    std::span<const Distribution> draft_probs; // what each was drawn from; empty where nothing was drafted
    std::span<const int32_t> likeliest;        // the argmax of each row, -1: not known; empty: of none
};

class RoundDecider {
  public:
    // With `synthetic` the number of accepted tokens is drawn and everything else computed as ever (for timing alone).
    [[nodiscard]] VerifyResult decide(const DecidedRows& rows, const SyntheticAcceptance* synthetic);

    // Whether the argmax of its raw logits is all that a row of this request is read for.
    [[nodiscard]] static bool needs_argmax_only(const Request& request);
    [[nodiscard]] int32_t argmax(std::span<const float> logits);

  private:
    [[nodiscard]] VerifyResult decide_synthetically(const SyntheticAcceptance& synthetic);
    [[nodiscard]] int32_t likeliest_token(int32_t row);
    [[nodiscard]] int32_t masked_token(int32_t row);
    [[nodiscard]] const Distribution& distribution(int32_t row);
    [[nodiscard]] std::span<const float> logits(int32_t row) const { return rows_.logits[static_cast<size_t>(row)]; }
    void push_drafted(int32_t n);

    DecidedRows rows_;
    int32_t n_pushed_ = 0; // drafted tokens that are part of counts and mask
    std::vector<Distribution> distributions_;
    DistributionBuilder builder_;
    MaskedSampler masked_sampler_;
};

} // namespace dspark
