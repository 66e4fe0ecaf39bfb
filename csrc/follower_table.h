// The tokens that a vanilla Markov head lifts most after each token: the rows with the largest B = W2 W1[previous]. B
// depends on the previous token alone, so a list once made serves for good. Owns: the lists. Must not know: U, slots,
// sampling. Threads: one per thread; the weights it views must outlive it.
#pragma once

#include "sequential_head.h"

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

class FollowerTable {
  public:
    // Makes the lists of the first tokens (the most frequent ones of a BPE vocabulary), of all where that is quick.
    // n_followers = 0, or a head whose B depends on more than the token: no lists, and all are known to be empty.
    FollowerTable(const HeadWeights& weights, int32_t n_followers);

    [[nodiscard]] bool knows(int32_t previous) const { return n_each_ == 0 || first_[index(previous)] >= 0; }
    [[nodiscard]] bool knows_all() const { return n_each_ == 0 || ids_.size() == first_.size() * n_each_; }
    // Target ids, at most n_followers, ascending. Empty for a token that is not known yet.
    [[nodiscard]] std::span<const int32_t> find(int32_t previous) const;
    // Notes that a list would have been of use; every few blocks lists are made for tokens that were met often enough
    // to be worth one.
    void want(int32_t previous);
    void end_block();

  private:
    static size_t index(int32_t token) { return static_cast<size_t>(token); }
    void make(std::span<const int32_t> tokens);
    void multiply_rows(int64_t begin, int64_t n, std::span<const float> embeddings, std::span<float> biases);
    [[nodiscard]] int32_t target_id(int64_t row) const;

    const HeadWeights& weights_;
    size_t n_each_ = 0;
    std::vector<int32_t> first_; // (n_vocab,) where a token's list begins in ids_, -1: not made
    std::vector<int32_t> ids_;
    std::vector<uint8_t> n_met_; // (n_vocab,) while a list was missing
    std::vector<int32_t> wanted_;
    int64_t n_blocks_ = 0; // since lists were last made
    int64_t n_blocks_between_ = 0;
};

} // namespace dspark
