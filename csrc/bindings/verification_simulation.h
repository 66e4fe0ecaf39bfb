// Many short generations with a toy target and a toy drafter whose next-token laws depend on the last token only, so
// that tests can compare what verification emits with what the target's law says. Owns: the loop of rounds. Must not
// know: Python. Threads: one Simulation per thread.
#pragma once

#include "acceptance.h"
#include "random.h"
#include "sampling.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

enum class DraftLength {
    fixed,           // block_size every round
    from_last_round, // decided by the last token drafted in the round before, accepted or not: older information
};

struct SimulationOptions {
    Verification rule = Verification::exact;
    SamplingOptions sampling; // the seed of trial t is sampling.seed + t
    DraftLength draft_length = DraftLength::fixed;
    int32_t block_size = 0; // 0: no speculation
    int32_t n_tokens = 1;   // generated per trial
    int32_t anchor = 0;     // the prompt
};

struct SimulationResult {
    std::vector<int64_t> sequence_counts;      // (n_vocab ** n_tokens,), first token most significant
    std::vector<int64_t> first_round_accepted; // (block_size + 1,): trials by accepted tokens of their first round
};

class Simulation {
  public:
    // Both (n_vocab, n_vocab): row = last token.
    Simulation(std::span<const float> target_logits, std::span<const float> draft_logits, size_t n_vocab,
               SimulationOptions options)
        : target_logits_(target_logits), draft_logits_(draft_logits), n_vocab_(n_vocab), options_(std::move(options)) {
        for (size_t token = 0; token < n_vocab_; ++token) {
            builder_.truncated_distribution(row(target_logits_, token), options_.sampling.truncation(),
                                            target_.emplace_back());
            builder_.truncated_distribution(row(draft_logits_, token), options_.sampling.truncation(),
                                            draft_.emplace_back());
        }
    }

    SimulationResult run(int64_t n_trials) {
        SimulationResult result;
        size_t n_cells = 1;
        for (int32_t i = 0; i < options_.n_tokens; ++i) {
            n_cells *= n_vocab_;
        }
        result.sequence_counts.assign(n_cells, 0);
        result.first_round_accepted.assign(static_cast<size_t>(options_.block_size) + 1, 0);
        for (int64_t trial = 0; trial < n_trials; ++trial) {
            const auto& tokens = generate(options_.sampling.seed + static_cast<uint64_t>(trial));
            size_t cell = 0;
            for (size_t i = 1; i <= static_cast<size_t>(options_.n_tokens); ++i) {
                cell = cell * n_vocab_ + static_cast<size_t>(tokens[i]);
            }
            ++result.sequence_counts[cell];
            ++result.first_round_accepted[static_cast<size_t>(first_accepted_)];
        }
        return result;
    }

    // The anchor and at least n_tokens after it.
    const std::vector<int32_t>& generate(uint64_t seed) {
        tokens_.assign(1, options_.anchor);
        counts_ = TokenCounts(options_.sampling.penalty_window);
        counts_.push_prompt(options_.anchor);
        prefix_len_ = static_cast<size_t>(options_.block_size);
        first_accepted_ = -1;
        while (tokens_.size() <= static_cast<size_t>(options_.n_tokens)) {
            run_round(RandomStream(seed));
        }
        return tokens_;
    }

  private:
    [[nodiscard]] std::span<const float> row(std::span<const float> logits, size_t token) const {
        return logits.subspan(token * n_vocab_, n_vocab_);
    }

    void run_round(const RandomStream& random) {
        const uint64_t start = tokens_.size() - 1;
        draft_block(start, random);
        const std::span<const int32_t> prefix(draft_tokens_.data(), prefix_len_);
        size_t n_pushed = 0;
        const auto verdict =
            verify(options_.rule, {prefix, draft_probs_, start, random}, [&](int32_t j) -> const Distribution& {
                while (n_pushed < static_cast<size_t>(j)) {
                    counts_.push_output(prefix[n_pushed++]);
                }
                return target_after(j == 0 ? tokens_.back() : prefix[static_cast<size_t>(j) - 1],
                                    static_cast<size_t>(j));
            });
        while (n_pushed > 0) {
            counts_.pop_output(prefix[--n_pushed]);
        }
        commit(verdict, prefix);
    }

    void draft_block(uint64_t start, const RandomStream& random) {
        const auto n = static_cast<size_t>(options_.block_size);
        draft_tokens_.resize(n);
        draft_probs_.resize(n);
        auto last = static_cast<size_t>(tokens_.back());
        for (size_t k = 0; k < n; ++k) {
            draft_probs_[k] = draft_[last];
            draft_tokens_[k] = sample(draft_[last], random.draft_sample(start, start + 1 + k));
            last = static_cast<size_t>(draft_tokens_[k]);
        }
    }

    const Distribution& target_after(int32_t last, size_t row_index) {
        const auto token = static_cast<size_t>(last);
        if (!options_.sampling.changes_logits()) {
            return target_[token];
        }
        rows_.resize(static_cast<size_t>(options_.block_size) + 1);
        builder_.target_distribution(row(target_logits_, token), options_.sampling, counts_, rows_[row_index]);
        return rows_[row_index];
    }

    void commit(const VerifyResult& verdict, std::span<const int32_t> prefix) {
        first_accepted_ = first_accepted_ < 0 ? verdict.n_accepted : first_accepted_;
        for (size_t k = 0; k < static_cast<size_t>(verdict.n_accepted); ++k) {
            commit_token(prefix[k]);
        }
        commit_token(verdict.next_token);
        if (options_.draft_length == DraftLength::from_last_round && options_.block_size > 0) {
            prefix_len_ = 1 + static_cast<size_t>(draft_tokens_.back()) % static_cast<size_t>(options_.block_size);
        }
    }

    void commit_token(int32_t token) {
        tokens_.push_back(token);
        counts_.push_output(token);
    }

    std::span<const float> target_logits_;
    std::span<const float> draft_logits_;
    size_t n_vocab_;
    SimulationOptions options_;
    DistributionBuilder builder_;
    std::vector<Distribution> target_; // by last token, without bias and penalties
    std::vector<Distribution> draft_;  // by last token
    std::vector<Distribution> rows_;   // by row, when bias or penalties apply
    std::vector<Distribution> draft_probs_;
    std::vector<int32_t> draft_tokens_;
    std::vector<int32_t> tokens_; // anchor, then output
    TokenCounts counts_;
    size_t prefix_len_ = 0;
    int32_t first_accepted_ = -1;
};

} // namespace dspark
