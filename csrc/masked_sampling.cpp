#include "masked_sampling.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace dspark {

int32_t MaskedSampler::draw(const Row& row, DistributionBuilder& builder) {
    if (row.options->is_greedy()) {
        const int32_t token = builder.argmax_token(row.logits, *row.options, *row.counts);
        return allows(*row.mask, token) ? token : builder.argmax_token(masked(row), *row.options, *row.counts);
    }
    builder.target_distribution(row.logits, *row.options, *row.counts, distribution_);
    const int32_t token = sample(distribution_, row.first_uniform);
    if (allows(*row.mask, token)) {
        return token;
    }
    if (!restrict_to(*row.mask)) {
        builder.target_distribution(masked(row), *row.options, *row.counts, distribution_);
    }
    return sample(distribution_, row.second_uniform);
}

bool MaskedSampler::allows(const TokenMask& mask, int32_t token) {
    uint8_t is_allowed = 0;
    mask.check(std::span(&token, 1), std::span(&is_allowed, 1));
    return is_allowed != 0;
}

// Takes the forbidden tokens out of distribution_. False: nothing is left.
bool MaskedSampler::restrict_to(const TokenMask& mask) {
    is_allowed_.assign(distribution_.size(), 0);
    mask.check(distribution_.ids, is_allowed_);
    size_t n_kept = 0;
    double mass = 0.0;
    for (size_t i = 0; i < distribution_.size(); ++i) {
        if (is_allowed_[i] != 0) {
            distribution_.ids[n_kept] = distribution_.ids[i];
            distribution_.probs[n_kept] = distribution_.probs[i];
            mass += static_cast<double>(distribution_.probs[n_kept++]);
        }
    }
    distribution_.ids.resize(n_kept);
    distribution_.probs.resize(n_kept);
    for (float& prob : distribution_.probs) {
        prob = static_cast<float>(static_cast<double>(prob) / mass);
    }
    return mass > 0.0;
}

std::span<const float> MaskedSampler::masked(const Row& row) {
    ids_.resize(row.logits.size());
    std::iota(ids_.begin(), ids_.end(), 0);
    is_allowed_.assign(ids_.size(), 0);
    row.mask->check(ids_, is_allowed_);
    if (std::none_of(is_allowed_.begin(), is_allowed_.end(), [](uint8_t is_allowed) { return is_allowed != 0; })) {
        throw std::runtime_error("grammar must allow a token at every place, got one where none can come");
    }
    logits_.assign(row.logits.begin(), row.logits.end());
    for (size_t i = 0; i < logits_.size(); ++i) {
        if (is_allowed_[i] == 0) {
            logits_[i] = -std::numeric_limits<float>::infinity();
        }
    }
    return logits_;
}

} // namespace dspark
