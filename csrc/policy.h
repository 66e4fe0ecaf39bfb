// How many drafted tokens of each request are worth verifying: the policies, as pure functions of survivals and costs.
// Owns: the decisions. Must not know: where costs and confidences come from, models, caches, time.
//
// Losslessness under `rejection` and `block` (paper, appendix A): whether slot j of a request is verified may depend on
// what was known before its token was drawn: that request's confidences up to c_j, everything of other requests, and
// older rounds; never on its later confidences. Every function here keeps to that unless a request `is_free`.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace dspark {

struct Policy {
    enum class Kind {
        off,        // plain decoding
        fixed,      // the first `length` tokens
        threshold,  // up to the first token whose raw confidence is below `threshold` (upstream's rule)
        algorithm1, // the paper's algorithm 1, early stop included
        adaptive,   // the default, see adaptive_prefixes
    };
    Kind kind = Kind::adaptive;
    int32_t length = 0;
    double threshold = 0;

    [[nodiscard]] bool never_drafts() const { return kind == Kind::off || (kind == Kind::fixed && length <= 0); }
    bool operator==(const Policy&) const = default;
};

// "off" | "full" | "fixed:n" | "threshold:p" | "algorithm1" | "adaptive". Throws std::invalid_argument.
[[nodiscard]] Policy parse_policy(std::string_view text);

// One drafted block.
struct DraftedBlock {
    int32_t most = 0;                   // longest prefix allowed
    std::span<const double> confidence; // (>= most,) c_j: slot j survives given that the slots before it did
    std::span<const double> expected;   // (>= most,) the same as older rounds expect it
    bool is_free = false;               // its rule is lossless under any policy: later confidences may be used
    double weight = 1;                  // what one of its tokens is worth
    double entry_ms = 0; // what beginning to draft costs it once, spread over the rounds it can be expected to have
};

// Tokens of a round that verifies as many slots, the target's own included. rates: of each slot, given those before it.
[[nodiscard]] double expected_tokens(std::span<const double> rates);

// The prefix before the first confidence below `threshold`.
[[nodiscard]] int32_t threshold_prefix(const DraftedBlock& block, double threshold);

// cost_ms[n]: time of the target's pass with n drafted tokens in it, n = 0 .. total. n_requests: those that decode in
// it.

// Paper, algorithm 1: pops survivals in descending order, stops at the first that does not raise
// theta = expected tokens * steps per second.
void algorithm1_prefixes(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms, int32_t n_requests,
                         std::span<int32_t> prefix_len);

// Maximises expected tokens - price * time over the step, price in tokens per ms being what the engine earns at large
// (Dinkelbach: maximising a long-run ratio of sums). Takes survivals in descending order as algorithm 1 does, but looks
// over cliffs of the cost curve: a token is taken when it or some run of tokens after it pays, where the tokens after
// it that may not be looked at yet count as older rounds expect them. A deviation from section 5.2 of the paper, whose
// budget comes from older rounds alone: confidences known before a draw may be used, and with one request they are all
// there is to adapt to.
// Returns the gain in tokens.
double adaptive_prefixes(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms, double tokens_per_ms,
                         std::span<int32_t> prefix_len);

// One length for all, from older rounds alone: for targets that split batches of unequal lengths into several passes.
[[nodiscard]] int32_t equal_prefix(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms,
                                   double tokens_per_ms);

// Before drafting: who is worth a draft, from `expected` alone.
struct DraftChoice {
    std::vector<int8_t> is_drafting; // (n_blocks,)
    double gain_tokens = 0;          // expected: tokens - price * extra time; 0 when nobody drafts
    double verify_gain_tokens = 0;   // the same without the time to draft, entries and bonuses
    double tokens_per_ms = 0;        // the price
    // The best that drafting can do, whether that pays or not:
    double n_tokens = 0; // drafted tokens expected to be accepted
    double extra_ms = 0; // time beyond the plain step
    size_t n_rows = 0;   // drafted ones, and who drafts, of the best set
    size_t n_blocks = 0;

    // Where someone drafts: the same in tokens, bonuses included, before its time is paid.
    [[nodiscard]] double n_gained() const { return gain_tokens + tokens_per_ms * extra_ms; }
};

// What drafting costs. bonus_tokens: what knowing the confidences adds to the gain of a block beyond its expectation
// (an option is worth more than the average of what it gives).
struct DraftCosts {
    std::span<const double> cost_ms;  // as above
    std::span<const double> draft_ms; // [n]: time to draft n blocks, n = 0 .. n_blocks
    double bonus_tokens = 0;
};

[[nodiscard]] DraftChoice choose_drafting(std::span<const DraftedBlock> blocks, const DraftCosts& costs,
                                          double tokens_per_ms);

// The same at the price that the step itself sets: the most tokens per ms it can be expected to make, found from plain
// decoding (n_requests tokens in cost_ms[0]) upwards (Dinkelbach). What a request has to write is a text and not a
// time, so each step is best at its own rate, whatever rate other texts reach; and an expectation, unlike the speed of
// recent steps, does not swing with their luck.
[[nodiscard]] DraftChoice choose_fastest_drafting(std::span<const DraftedBlock> blocks, const DraftCosts& costs,
                                                  int32_t n_requests);

// Whether drafting could pay at all: if texts were much easier than expected and all beyond a plain step cheaper than
// measured.
[[nodiscard]] bool could_pay(std::span<const DraftedBlock> blocks, const DraftCosts& costs, int32_t n_requests);

} // namespace dspark
