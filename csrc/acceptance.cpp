// Implements acceptance.h. All arithmetic on probabilities is in double; the stored probabilities are float.
//
// Why every rule keeps the target's distribution over many rounds: a position is settled once, and each uniform that
// enters a decision is fresh given everything that led to the present prefix (see random.h for the keys).
#include "acceptance.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dspark {
namespace {

// Position decided by row j: the token after anchor and j accepted drafts.
uint64_t position_of(const VerifyInput& input, int32_t row) { return input.start + 1 + static_cast<uint64_t>(row); }

int32_t prefix_len(const VerifyInput& input) { return static_cast<int32_t>(input.draft_tokens.size()); }

// The target's own draw: under `exact`, and as the bonus token when every draft stands.
int32_t draw_target(const VerifyInput& input, int32_t row, const Distribution& target) {
    return sample(target, input.random.target_sample(position_of(input, row)));
}

// The weight that is left of a target probability after the draft's share is taken out.
double residual_weight(double scale, float target_prob, float draft_prob) {
    return std::max(scale * static_cast<double>(target_prob) - static_cast<double>(draft_prob), 0.0);
}

// sum_x max(scale * p^t(x) - p^d(x), 0) = scale - sum over the draft's support of min(scale * p^t(x), p^d(x)): costs
// the draft's few candidates, not the vocabulary.
double residual_mass(double scale, const Distribution& target, const Distribution& draft) {
    double overlap = 0.0;
    for (size_t i = 0; i < draft.ids.size(); ++i) {
        overlap +=
            std::min(scale * static_cast<double>(target.prob(draft.ids[i])), static_cast<double>(draft.probs[i]));
    }
    return std::max(scale - overlap, 0.0);
}

// Calls visit(token, weight) for every token of the target in ascending order until it returns true.
template <class Visit>
void visit_residual(double scale, const Distribution& target, const Distribution& draft, Visit visit) {
    size_t d = 0;
    for (size_t t = 0; t < target.ids.size(); ++t) {
        while (d < draft.ids.size() && draft.ids[d] < target.ids[t]) {
            ++d;
        }
        const bool is_shared = d < draft.ids.size() && draft.ids[d] == target.ids[t];
        if (visit(target.ids[t], residual_weight(scale, target.probs[t], is_shared ? draft.probs[d] : 0.0f))) {
            return;
        }
    }
}

// Draws from norm(max(scale * p^t - p^d, 0)). The residual is empty only when the two agree to the last bit, where the
// rejection that led here had probability 0 but for rounding: the target itself is then the right law.
int32_t draw_residual(const VerifyInput& input, int32_t row, double scale, const Distribution& target) {
    const Distribution& draft = input.draft_probs[static_cast<size_t>(row)];
    const double u = input.random.residual(position_of(input, row));
    double mass = 0.0;
    visit_residual(scale, target, draft, [&](int32_t, double weight) {
        mass += weight;
        return false;
    });
    if (mass <= 0.0) {
        return sample(target, u);
    }
    int32_t token = -1;
    double cumulative = 0.0;
    visit_residual(scale, target, draft, [&](int32_t id, double weight) {
        cumulative += weight;
        token = weight > 0.0 ? id : token;
        return weight > 0.0 && cumulative > u * mass;
    });
    return token;
}

float draft_prob_of(const VerifyInput& input, int32_t slot) {
    const auto k = static_cast<size_t>(slot);
    const float prob = input.draft_probs[k].prob(input.draft_tokens[k]);
    if (!(prob > 0.0f)) {
        throw std::invalid_argument("draft token must have a positive draft probability, got token " +
                                    std::to_string(input.draft_tokens[k]) + " with " + std::to_string(prob));
    }
    return prob;
}

double prob_ratio(const VerifyInput& input, int32_t slot, const Distribution& target) {
    const auto target_prob = static_cast<double>(target.prob(input.draft_tokens[static_cast<size_t>(slot)]));
    return target_prob / static_cast<double>(draft_prob_of(input, slot));
}

VerifyResult verify_rejection(const VerifyInput& input, const TargetRow& target_row) {
    const int32_t n = prefix_len(input);
    for (int32_t k = 0; k < n; ++k) {
        const Distribution& target = target_row(k);
        const double u = input.random.accept_test(input.start, position_of(input, k));
        if (!(u < prob_ratio(input, k, target))) {
            return {k, draw_residual(input, k, 1.0, target)};
        }
    }
    return {n, draw_target(input, n, target_row(n))};
}

// Acceptance threshold h_i of a prefix of weight p_i < whole draft; `target` is row i. With p_i = 1 and no residual
// (p^t = p^d on the next slot) stopping here would leave nothing to draw from, and 0 / 0 means "go on".
double block_threshold(const VerifyInput& input, int32_t i, double weight, const Distribution& target) {
    const double residual = residual_mass(weight, target, input.draft_probs[static_cast<size_t>(i)]);
    const double total = residual + 1.0 - weight;
    return total > 0.0 ? residual / total : 1.0;
}

// Every prefix is examined and the longest that passes its own test stands. Weight p_i couples the slots: what an
// earlier slot has in excess (p^t > p^d) pays for a later one, where token-wise rejection would cut.
VerifyResult verify_block(const VerifyInput& input, const TargetRow& target_row) {
    const int32_t n = prefix_len(input);
    const Distribution* row = n > 0 ? &target_row(0) : nullptr;
    const Distribution* kept_row = row;
    double kept_weight = 1.0;
    double weight = 1.0;
    int32_t n_kept = 0;
    for (int32_t i = 1; i <= n; ++i) {
        weight = std::min(weight * prob_ratio(input, i - 1, *row), 1.0);
        if (weight <= 0.0) { // stays 0 and passes no test
            break;
        }
        row = i < n ? &target_row(i) : nullptr; // the bonus row is asked for only when it is drawn from
        const double threshold = i < n ? block_threshold(input, i, weight, *row) : weight;
        if (input.random.accept_test(input.start, position_of(input, i - 1)) < threshold) {
            n_kept = i;
            kept_row = row;
            kept_weight = weight;
        }
    }
    if (n_kept == n) {
        return {n, draw_target(input, n, target_row(n))};
    }
    return {n_kept, draw_residual(input, n_kept, kept_weight, *kept_row)};
}

} // namespace

VerifyResult verify_exact(std::span<const int32_t> draft_tokens, const TargetToken& decide) {
    const auto n = static_cast<int32_t>(draft_tokens.size());
    for (int32_t k = 0; k < n; ++k) {
        const int32_t token = decide(k);
        if (token != draft_tokens[static_cast<size_t>(k)]) {
            return {k, token};
        }
    }
    return {n, decide(n)};
}

VerifyResult verify(Verification rule, const VerifyInput& input, const TargetRow& target_row) {
    if (rule == Verification::exact) {
        return verify_exact(input.draft_tokens, [&](int32_t row) { return draw_target(input, row, target_row(row)); });
    }
    if (input.draft_probs.size() < input.draft_tokens.size()) {
        throw std::invalid_argument("draft_probs must hold a distribution per draft token, got " +
                                    std::to_string(input.draft_probs.size()) + " for " +
                                    std::to_string(input.draft_tokens.size()));
    }
    return rule == Verification::rejection ? verify_rejection(input, target_row) : verify_block(input, target_row);
}

} // namespace dspark
