// Implements candidate_search.h.
#include "candidate_search.h"

#include <algorithm>
#include <limits>

namespace dspark {
namespace {

constexpr int64_t kUnknownFactor = 4; // more of U while a token's followers are not known

} // namespace

CandidateSearch::CandidateSearch(const HeadWeights& weights, int32_t n_candidates, int32_t n_followers)
    : n_vocab_(static_cast<size_t>(weights.n_vocab)), n_candidates_(n_candidates),
      n_wide_(static_cast<int32_t>(std::min(kUnknownFactor * n_candidates, weights.n_vocab))),
      followers_(weights, n_followers) {}

std::span<const Ranked> CandidateSearch::look_ahead(const BlockInput& input, size_t slot) {
    if (input.largest.empty()) {
        const std::span<const float> logits(input.base_logits[slot], n_vocab_);
        if (!at(slot).search.scan(logits)) {
            throw_invalid_row(logits);
        }
    }
    find_largest(input, slot, is_known_ ? n_candidates_ : n_wide_);
    return at(slot).found;
}

void CandidateSearch::find_largest(const BlockInput& input, size_t slot, int32_t k) {
    Slot& own = at(slot);
    const std::span<const Ranked> found = input.largest.empty() ? own.search.top(k) : input.largest[slot];
    own.n_asked = k;
    own.found.assign(found.begin(), found.end());
    keep_top(own.found, static_cast<size_t>(k), weights_, keys_);
}

const Candidates& CandidateSearch::select(const BlockInput& input, size_t slot, int32_t previous) {
    Slot& own = at(slot);
    is_known_ = followers_.knows(previous);
    if (!is_known_) {
        followers_.want(previous);
    }
    const int32_t n_wanted = is_known_ ? n_candidates_ : n_wide_;
    if (own.n_asked < n_wanted) {
        find_largest(input, slot, n_wanted);
    }
    keep_top(own.found, static_cast<size_t>(n_wanted), weights_, keys_);
    join(own.found, input.base_logits[slot], followers_.find(previous));
    return joined_;
}

// Into joined_; all three by ascending id, as distributions are.
void CandidateSearch::join(std::span<const Ranked> largest, const float* logits, std::span<const int32_t> followers) {
    joined_.clear();
    size_t next = 0;
    for (const int32_t id : followers) {
        for (; next < largest.size() && largest[next].id < id; ++next) {
            joined_.add(largest[next].id, largest[next].weight);
        }
        const bool is_there = next < largest.size() && largest[next].id == id;
        if (!is_there && logits[id] > -std::numeric_limits<float>::infinity()) {
            joined_.add(id, logits[id]);
        }
    }
    for (; next < largest.size(); ++next) {
        joined_.add(largest[next].id, largest[next].weight);
    }
}

} // namespace dspark
