// Drawing a token from a request's distribution restricted to what its mask allows.
// Owns: the restricted law and how it is drawn lazily. Must not know: drafts, models. Threads: one object per thread.
#pragma once

#include "sampling.h"
#include "token_mask.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

// The law: the request's distribution (bias, penalties, temperature, truncation), with the forbidden tokens taken out
// and renormalised; if truncation leaves no allowed token, the truncation of the masked logits. Masking a whole
// vocabulary costs milliseconds, so a token is drawn from the unrestricted distribution p first and kept if allowed;
// otherwise a second, independent draw decides among the allowed ones. With mass Z allowed this gives p(x) + (1 - Z)
// p(x) / Z = p(x) / Z: the same law, and one look at the mask where the model keeps to it anyway.
class MaskedSampler {
  public:
    struct Row {
        std::span<const float> logits; // (n_vocab,)
        const SamplingOptions* options;
        const TokenCounts* counts;
        const TokenMask* mask;
        double first_uniform;
        double second_uniform;
    };
    // Throws std::runtime_error when the mask allows no token that has a finite logit.
    [[nodiscard]] int32_t draw(const Row& row, DistributionBuilder& builder);

  private:
    [[nodiscard]] static bool allows(const TokenMask& mask, int32_t token);
    [[nodiscard]] bool restrict_to(const TokenMask& mask);
    [[nodiscard]] std::span<const float> masked(const Row& row);

    Distribution distribution_;
    std::vector<uint8_t> is_allowed_;
    std::vector<int32_t> ids_;
    std::vector<float> logits_;
};

} // namespace dspark
