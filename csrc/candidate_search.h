// Which tokens compete in a slot: the largest U, and the followers of the token before. The former are known before
// that token is, so they are searched a slot ahead. Owns: the search, the table of followers. Must not know: W2's use,
// p^d. Threads: one per thread; the weights it views must outlive it.
#pragma once

#include "follower_table.h"
#include "sampling.h"
#include "sequential_head.h"
#include "top_k.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

class CandidateSearch {
  public:
    CandidateSearch(const HeadWeights& weights, int32_t n_candidates, int32_t n_followers);

    // The largest U of a slot, by ascending id, as many as it would need if it were like the last selected one;
    // select(slot) follows, with at most look_ahead(slot + 1) between.
    std::span<const Ranked> look_ahead(const BlockInput& input, size_t slot);
    // Ids and U, by ascending id. The K best of U + B could only be found by reading all of W2. The best of U (the
    // soft-cap is monotone) and the best of B, which are known beforehand, hold it nearly always.
    const Candidates& select(const BlockInput& input, size_t slot, int32_t previous);
    void end_block() { followers_.end_block(); }
    [[nodiscard]] int32_t n_searched() const { return followers_.knows_all() ? n_candidates_ : n_wide_; }

  private:
    struct Slot {
        TopSearch search;
        std::vector<Ranked> found;
        int32_t n_asked = 0;
    };

    void find_largest(const BlockInput& input, size_t slot, int32_t k);
    void join(std::span<const Ranked> largest, const float* logits, std::span<const int32_t> followers);
    [[nodiscard]] Slot& at(size_t slot) { return slots_[slot % slots_.size()]; }

    size_t n_vocab_;
    int32_t n_candidates_;
    int32_t n_wide_; // while a token's followers are not known
    FollowerTable followers_;
    std::array<Slot, 2> slots_; // one and the one behind it
    bool is_known_ = true;      // the followers of the last slot's token
    std::vector<float> weights_;
    std::vector<int32_t> keys_;
    Candidates joined_;
};

} // namespace dspark
