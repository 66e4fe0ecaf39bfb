// From one row of logits to the distribution a request samples from, and to a token.
// Owns: sampling options and their rules, penalties, truncation, sampling, log-probabilities.
// Must not know: where logits come from, drafts, batches. Threads: one DistributionBuilder and one TokenCounts per
// thread.
#pragma once

#include "distribution.h"
#include "top_k.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dspark {

// What is left of the options once the logits are final: the part that also shapes draft distributions.
struct Truncation {
    float temperature = 1.0f; // 0 = argmax
    int32_t top_k = 0;        // 0 = off
    float top_p = 1.0f;       // 1 = off
    float min_p = 0.0f;       // 0 = off; relative to the largest probability

    // Below this, logits differing by one float step are already 0/1: treated as argmax, and 1/T stays finite.
    static constexpr float kMinTemperature = 1e-6f;
    [[nodiscard]] bool is_greedy() const { return temperature < kMinTemperature; }
};

struct SamplingOptions {
    float temperature = 1.0f;
    float top_p = 1.0f;
    float min_p = 0.0f;
    int32_t top_k = 0;
    float repetition_penalty = 1.0f; // over prompt and output tokens: positive logits divided, negative multiplied
    float presence_penalty = 0.0f;   // over output tokens only
    float frequency_penalty = 0.0f;  // over output tokens only, times their count
    int32_t penalty_window = -1;     // newest tokens that the three look at; 0: none, -1: all
    std::vector<std::pair<int32_t, float>> logit_bias; // (token id, added to its logit)
    uint64_t seed = 0;

    // Throws std::invalid_argument: "<name> must <rule>, got <value>".
    void validate() const;
    [[nodiscard]] Truncation truncation() const { return {temperature, top_k, top_p, min_p}; }
    [[nodiscard]] bool is_greedy() const { return truncation().is_greedy(); }
    [[nodiscard]] bool has_penalties() const {
        return penalty_window != 0 &&
               (repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f);
    }
    // False: the raw logits are final, so a device-side argmax or top-k may be used.
    [[nodiscard]] bool changes_logits() const { return has_penalties() || !logit_bias.empty(); }
};

// How often each token stands among the newest `window` ones of prompt and output (-1: among all). Push drafted tokens
// while their rows are verified and pop them again, the last one first; both are O(1) and nothing is copied per step.
class TokenCounts {
  public:
    explicit TokenCounts(int32_t window = -1) : window_(window) {}

    struct Entry {
        int32_t id;
        int32_t n_prompt;
        int32_t n_output;
    };

    void push_prompt(int32_t id); // the whole prompt comes before the output
    void push_output(int32_t id);
    void pop_output(int32_t id); // throws std::logic_error when it was not pushed last

    [[nodiscard]] const Entry* find(int32_t id) const {
        const auto it = index_.find(id);
        return it == index_.end() ? nullptr : &entries_[it->second];
    }
    // Every token ever seen, in order of first sight; entries popped back to zero stay (with zero counts).
    [[nodiscard]] std::span<const Entry> entries() const { return entries_; }

  private:
    Entry& entry(int32_t id);
    void count(size_t i, int32_t change);
    void slide(int32_t change);

    std::vector<Entry> entries_;
    std::unordered_map<int32_t, size_t> index_;
    int32_t window_;
    std::vector<int32_t> text_; // prompt and output
    size_t n_prompt_ = 0;       // leading tokens of text_
};

// Token ids and their logits, one for one.
struct Candidates {
    std::vector<int32_t> ids;
    std::vector<float> logits;

    void clear() {
        ids.clear();
        logits.clear();
    }
    void add(int32_t id, float logit) {
        ids.push_back(id);
        logits.push_back(logit);
    }
    void assign(std::span<const Ranked> ranked) {
        clear();
        for (const Ranked& entry : ranked) {
            add(entry.id, entry.weight);
        }
    }
};

// Builds distributions from logits; holds the buffers they need, so keep one and reuse it.
// Errors (std::runtime_error): a NaN or +inf logit, or no finite logit at all. -inf means "forbidden" and is legal.
class DistributionBuilder {
  public:
    // logit bias -> penalties -> temperature -> top_k -> top_p -> min_p. `logits`: (n_vocab,)
    void target_distribution(std::span<const float> logits, const SamplingOptions& options, const TokenCounts& counts,
                             Distribution& out);
    // argmax after bias and penalties; ties go to the lowest id.
    [[nodiscard]] int32_t argmax_token(std::span<const float> logits, const SamplingOptions& options,
                                       const TokenCounts& counts);

    // Truncation alone, on final logits over the whole vocabulary.
    void truncated_distribution(std::span<const float> logits, const Truncation& truncation, Distribution& out);
    // Truncation alone, on a few candidates in any order (ids distinct): the restricted softmax of the drafter.
    void candidate_distribution(const Candidates& candidates, const Truncation& truncation, Distribution& out);

    // The k largest logits above -inf, in descending order, ties by lowest id; fewer if fewer exist.
    void select_top_k(std::span<const float> logits, int32_t k, Candidates& out);
    // The same ones by ascending id.
    void select_candidates(std::span<const float> logits, int32_t k, Candidates& out);

  private:
    float scan(std::span<const float> logits);
    int32_t argmax(std::span<const float> logits);
    std::span<const float> adjusted(std::span<const float> logits, const SamplingOptions& options,
                                    const TokenCounts& counts);
    void full_distribution(std::span<const float> logits, const Truncation& truncation, Distribution& out);
    void collect_nucleus(std::span<const float> logits, float largest, double total, const Truncation& truncation);
    void collect_weights(std::span<const float> logits, float threshold);
    void keep_best(int32_t top_k);
    void keep_mass(double wanted);
    double weigh_ranked(float temperature);
    void emit(const Truncation& truncation, double total, Distribution& out);
    static double sum_weights(std::span<const Ranked> ranked);

    TopSearch search_;
    std::vector<float> adjusted_;  // (n_vocab,) a copy, only when bias or penalties apply
    std::vector<float> weights_;   // (n_vocab,) exp((logit - max) / T)
    std::vector<float> logits_;    // of ranked_
    std::vector<Ranked> ranked_;   // candidates under selection
    std::vector<Ranked> boundary_; // those among which top_p cuts
    Candidates selected_;
};

// Says what is wrong with a row that TopSearch::scan() refuses.
[[noreturn]] void throw_invalid_row(std::span<const float> logits);

// Bias and penalties, in place, on a row over the whole vocabulary, and on one logit where only a few are at hand.
void adjust_logits(std::span<float> logits, const SamplingOptions& options, const TokenCounts& counts);
[[nodiscard]] float adjust_logit(float logit, int32_t id, const SamplingOptions& options, const TokenCounts& counts);

struct TopLogprobs {
    float chosen = 0.0f;                         // log-probability of the chosen token
    std::vector<std::pair<int32_t, float>> best; // (token id, log-probability), descending
};
// Log-softmax of the raw logits (before bias, penalties, temperature). Throws std::invalid_argument for a bad id.
[[nodiscard]] TopLogprobs top_logprobs(std::span<const float> logits, int32_t chosen, int32_t n_best);

} // namespace dspark
