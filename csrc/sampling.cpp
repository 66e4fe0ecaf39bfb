// Implements sampling.h. A vocabulary has 152k entries in common models: passes over it go through vector_loops.h, and
// nothing here sorts it.
#include "sampling.h"

#include "vector_loops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace dspark {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr size_t kGroup = kMaxGroup; // neighbours under one maximum: what is looked for lies in few cache lines
constexpr size_t kChunk = 16 * kGroup;

std::string show(int32_t value) { return std::to_string(value); }
std::string show(float value) { // to_string would print 1e-7 as 0.000000
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(value));
    return text;
}

template <class T> void require(bool ok, const char* name, const char* rule, T value) {
    if (!ok) {
        throw std::invalid_argument(std::string(name) + " must " + rule + ", got " + show(value));
    }
}

[[noreturn]] void throw_invalid_logit(std::span<const float> logits) {
    const auto it = std::find_if(logits.begin(), logits.end(), [](float x) { return !(x < kInf); });
    throw std::runtime_error("logits must not hold NaN or +inf, got " + std::to_string(*it) + " at token " +
                             std::to_string(it - logits.begin()));
}

// Strictly ascending ids that start at 0 and end at n - 1 are 0 .. n - 1: nothing to write in the steady state.
void assign_all_ids(size_t n, std::vector<int32_t>& ids) {
    if (ids.size() != n || ids.front() != 0 || ids.back() != static_cast<int32_t>(n - 1)) {
        ids.resize(n);
        std::iota(ids.begin(), ids.end(), 0);
    }
}

float apply_penalties(float logit, const TokenCounts::Entry& entry, const SamplingOptions& options) {
    if (entry.n_prompt + entry.n_output == 0) {
        return logit;
    }
    logit = logit > 0.0f ? logit / options.repetition_penalty : logit * options.repetition_penalty;
    if (entry.n_output > 0) {
        logit -= static_cast<float>(entry.n_output) * options.frequency_penalty + options.presence_penalty;
    }
    return logit;
}

} // namespace

void throw_invalid_row(std::span<const float> logits) {
    if (is_below_infinity(logits.data(), logits.size())) {
        throw std::runtime_error("logits must hold a finite value, got none");
    }
    throw_invalid_logit(logits);
}

void SamplingOptions::validate() const {
    require(std::isfinite(temperature) && temperature >= 0.0f, "temperature", "be finite and at least 0", temperature);
    require(top_k >= 0, "top_k", "be 0 (off) or positive", top_k);
    require(top_p > 0.0f && top_p <= 1.0f, "top_p", "be above 0 and at most 1", top_p);
    require(min_p >= 0.0f && min_p <= 1.0f, "min_p", "be between 0 and 1", min_p);
    require(std::isfinite(repetition_penalty) && repetition_penalty > 0.0f, "repetition_penalty",
            "be finite and above 0", repetition_penalty);
    require(std::fabs(presence_penalty) <= 2.0f, "presence_penalty", "be between -2 and 2", presence_penalty);
    require(std::fabs(frequency_penalty) <= 2.0f, "frequency_penalty", "be between -2 and 2", frequency_penalty);
    require(penalty_window >= -1, "penalty_window", "be -1 (all) or more", penalty_window);
    for (const auto& [id, bias] : logit_bias) {
        require(id >= 0, "logit_bias token", "be at least 0", id);
        require(std::isfinite(bias), "logit_bias value", "be finite", bias);
    }
}

TokenCounts::Entry& TokenCounts::entry(int32_t id) {
    const auto [it, is_new] = index_.try_emplace(id, entries_.size());
    if (is_new) {
        entries_.push_back({id, 0, 0});
    }
    return entries_[it->second];
}

void TokenCounts::count(size_t i, int32_t change) {
    Entry& found = entry(text_[i]);
    (i < n_prompt_ ? found.n_prompt : found.n_output) += change;
}

// The token right before the window of the text as it is.
void TokenCounts::slide(int32_t change) {
    const auto n_window = static_cast<size_t>(window_);
    if (window_ >= 0 && text_.size() > n_window) {
        count(text_.size() - n_window - 1, change);
    }
}

void TokenCounts::push_prompt(int32_t id) {
    ++n_prompt_;
    push_output(id);
}

void TokenCounts::push_output(int32_t id) {
    text_.push_back(id);
    count(text_.size() - 1, 1);
    slide(-1);
}

void TokenCounts::pop_output(int32_t id) {
    if (text_.size() == n_prompt_ || text_.back() != id) {
        throw std::logic_error("pop_output token must have been pushed last, got " + std::to_string(id));
    }
    slide(1);
    count(text_.size() - 1, -1);
    text_.pop_back();
}

void adjust_logits(std::span<float> logits, const SamplingOptions& options, const TokenCounts& counts) {
    for (const auto& [id, bias] : options.logit_bias) {
        if (id < 0 || static_cast<size_t>(id) >= logits.size()) {
            throw std::invalid_argument("logit_bias token must be below n_vocab " + std::to_string(logits.size()) +
                                        ", got " + std::to_string(id));
        }
        logits[static_cast<size_t>(id)] += bias;
    }
    if (!options.has_penalties()) {
        return;
    }
    for (const auto& entry : counts.entries()) {
        if (entry.id >= 0 && static_cast<size_t>(entry.id) < logits.size()) {
            float& logit = logits[static_cast<size_t>(entry.id)];
            logit = apply_penalties(logit, entry, options);
        }
    }
}

float adjust_logit(float logit, int32_t id, const SamplingOptions& options, const TokenCounts& counts) {
    for (const auto& [bias_id, bias] : options.logit_bias) {
        logit += bias_id == id ? bias : 0.0f;
    }
    const auto* entry = options.has_penalties() ? counts.find(id) : nullptr;
    return entry != nullptr ? apply_penalties(logit, *entry, options) : logit;
}

// Returns the row's maximum.
float DistributionBuilder::scan(std::span<const float> logits) {
    if (!search_.scan(logits)) {
        throw_invalid_row(logits);
    }
    return search_.largest();
}

// The weights of all logits >= threshold into ranked_, by ascending id. Appending without a branch, chunk by chunk,
// beats walking groups when much is kept.
void DistributionBuilder::collect_weights(std::span<const float> logits, float threshold) {
    ranked_.clear();
    for (size_t begin = 0; begin < logits.size(); begin += kChunk) {
        const size_t end = std::min(logits.size(), begin + kChunk);
        const auto maxima = search_.group_maxima().subspan(begin / kGroup, (end - begin + kGroup - 1) / kGroup);
        if (*std::max_element(maxima.begin(), maxima.end()) < threshold) {
            continue;
        }
        size_t n = ranked_.size();
        ranked_.resize(n + end - begin);
        for (size_t i = begin; i < end; ++i) {
            ranked_[n] = {weights_[i], static_cast<int32_t>(i)};
            n += logits[i] >= threshold ? 1 : 0;
        }
        ranked_.resize(n);
    }
}

int32_t DistributionBuilder::argmax(std::span<const float> logits) {
    return search_.at_least(scan(logits)).front().id; // of equal ones the first
}

void DistributionBuilder::select_top_k(std::span<const float> logits, int32_t k, Candidates& out) {
    scan(logits);
    const std::span<const Ranked> found = search_.top(k);
    ranked_.assign(found.begin(), found.end());
    std::sort(ranked_.begin(), ranked_.end(), ranks_before);
    out.assign(ranked_);
}

void DistributionBuilder::select_candidates(std::span<const float> logits, int32_t k, Candidates& out) {
    scan(logits);
    out.assign(search_.top(k));
}

std::span<const float> DistributionBuilder::adjusted(std::span<const float> logits, const SamplingOptions& options,
                                                     const TokenCounts& counts) {
    if (!options.changes_logits()) {
        return logits;
    }
    adjusted_.assign(logits.begin(), logits.end());
    adjust_logits(adjusted_, options, counts);
    return adjusted_;
}

void DistributionBuilder::target_distribution(std::span<const float> logits, const SamplingOptions& options,
                                              const TokenCounts& counts, Distribution& out) {
    truncated_distribution(adjusted(logits, options, counts), options.truncation(), out);
}

int32_t DistributionBuilder::argmax_token(std::span<const float> logits, const SamplingOptions& options,
                                          const TokenCounts& counts) {
    return argmax(adjusted(logits, options, counts));
}

void DistributionBuilder::truncated_distribution(std::span<const float> logits, const Truncation& truncation,
                                                 Distribution& out) {
    if (truncation.is_greedy()) {
        out.assign_single(argmax(logits));
    } else if (truncation.top_k > 0 && static_cast<size_t>(truncation.top_k) < logits.size()) {
        select_top_k(logits, truncation.top_k, selected_);
        candidate_distribution(selected_, truncation, out);
    } else {
        full_distribution(logits, truncation, out);
    }
}

void DistributionBuilder::candidate_distribution(const Candidates& candidates, const Truncation& truncation,
                                                 Distribution& out) {
    ranked_.clear();
    for (size_t i = 0; i < candidates.ids.size(); ++i) {
        if (!(candidates.logits[i] < kInf)) {
            throw_invalid_logit(candidates.logits);
        }
        if (candidates.logits[i] > -kInf) {
            ranked_.push_back({candidates.logits[i], candidates.ids[i]});
        }
    }
    if (ranked_.empty()) {
        throw std::runtime_error("logits must hold a finite value, got none");
    }
    if (truncation.is_greedy()) {
        out.assign_single(std::min_element(ranked_.begin(), ranked_.end(), ranks_before)->id);
        return;
    }
    keep_best(truncation.top_k);
    emit(truncation, weigh_ranked(truncation.temperature), out);
}

// top_k = 0 keeps all.
void DistributionBuilder::keep_best(int32_t top_k) {
    if (top_k > 0 && static_cast<size_t>(top_k) < ranked_.size()) {
        std::nth_element(ranked_.begin(), ranked_.begin() + top_k, ranked_.end(), ranks_before);
        ranked_.resize(static_cast<size_t>(top_k));
    }
}

// Logits become weights relative to the largest; returns their sum.
double DistributionBuilder::weigh_ranked(float temperature) {
    logits_.clear();
    std::transform(ranked_.begin(), ranked_.end(), std::back_inserter(logits_),
                   [](const Ranked& r) { return r.weight; });
    exp_all(logits_, *std::max_element(logits_.begin(), logits_.end()), 1.0f / temperature, weights_);
    for (size_t i = 0; i < ranked_.size(); ++i) {
        ranked_[i].weight = weights_[i];
    }
    return sum_weights(ranked_);
}

// Keeps the smallest best-ranked set whose mass reaches `wanted`, in place and in order. Bins of an eighth of an
// octave, read off the weight's bits, leave only the boundary bin to sort: O(n) for a flat distribution over the whole
// vocabulary too.
void DistributionBuilder::keep_mass(double wanted) {
    const auto bin_of = [](float weight) { // 0 for weight 1, 1016 for weight 0
        return (std::bit_cast<uint32_t>(1.0f) - std::bit_cast<uint32_t>(weight)) >> 20;
    };
    std::array<double, 1017> bin_mass{};
    for (const auto& entry : ranked_) {
        bin_mass[bin_of(entry.weight)] += static_cast<double>(entry.weight);
    }
    size_t bin = 0;
    while (bin + 1 < bin_mass.size() && bin_mass[bin] < wanted) {
        wanted -= bin_mass[bin++];
    }
    boundary_.clear();
    std::copy_if(ranked_.begin(), ranked_.end(), std::back_inserter(boundary_),
                 [&](const Ranked& r) { return bin_of(r.weight) == bin; });
    std::sort(boundary_.begin(), boundary_.end(), ranks_before);
    for (const auto& entry : boundary_) {
        wanted -= static_cast<double>(entry.weight);
        if (wanted <= 0.0) {
            std::erase_if(ranked_, [&](const Ranked& r) { return ranks_before(entry, r); });
            return;
        }
    }
}

double DistributionBuilder::sum_weights(std::span<const Ranked> ranked) {
    return std::accumulate(ranked.begin(), ranked.end(), 0.0,
                           [](double sum, const Ranked& r) { return sum + static_cast<double>(r.weight); });
}

// ranked_ holds weights relative to the largest, `total` is what top_p is a fraction of.
void DistributionBuilder::emit(const Truncation& truncation, double total, Distribution& out) {
    if (truncation.top_p < 1.0f) {
        keep_mass(static_cast<double>(truncation.top_p) * total);
    }
    std::erase_if(ranked_, [&](const Ranked& r) { return r.weight < truncation.min_p; });
    const auto by_id = [](const Ranked& a, const Ranked& b) { return a.id < b.id; };
    if (!std::is_sorted(ranked_.begin(), ranked_.end(), by_id)) {
        std::sort(ranked_.begin(), ranked_.end(), by_id);
    }
    const double kept = sum_weights(ranked_);
    out.ids.clear();
    out.probs.clear();
    for (const auto& entry : ranked_) {
        out.ids.push_back(entry.id);
        out.probs.push_back(static_cast<float>(static_cast<double>(entry.weight) / kept));
    }
}

void DistributionBuilder::full_distribution(std::span<const float> logits, const Truncation& truncation,
                                            Distribution& out) {
    const float largest = scan(logits);
    exp_all(logits, largest, 1.0f / truncation.temperature, weights_);
    const double total = sum_all(weights_);
    if (truncation.top_p < 1.0f || truncation.min_p > 0.0f) {
        collect_nucleus(logits, largest, total, truncation);
        emit(truncation, total, out);
        return;
    }
    assign_all_ids(weights_.size(), out.ids);
    out.probs.resize(weights_.size());
    const auto scale = static_cast<float>(1.0 / total);
    std::transform(weights_.begin(), weights_.end(), out.probs.begin(), [scale](float w) { return w * scale; });
}

// Into ranked_: a superset of what top_p and min_p keep, found by lowering a threshold until the mass above it
// suffices.
void DistributionBuilder::collect_nucleus(std::span<const float> logits, float largest, double total,
                                          const Truncation& truncation) {
    // One hundredth of a nat below the exact bound: emit() applies min_p itself.
    const float floor = largest + truncation.temperature * (std::log(truncation.min_p) - 0.01f);
    const double wanted = static_cast<double>(truncation.top_p) * total;
    for (float depth_nats = 8.0f;; depth_nats *= 2.0f) {
        const float threshold =
            depth_nats > 87.0f ? floor : std::max(floor, largest - depth_nats * truncation.temperature);
        collect_weights(logits, threshold);
        if (threshold == floor || sum_weights(ranked_) >= wanted) {
            return;
        }
    }
}

TopLogprobs top_logprobs(std::span<const float> logits, int32_t chosen, int32_t n_best) {
    if (chosen < 0 || static_cast<size_t>(chosen) >= logits.size()) {
        throw std::invalid_argument("chosen token must be below n_vocab " + std::to_string(logits.size()) + ", got " +
                                    std::to_string(chosen));
    }
    DistributionBuilder builder;
    Candidates best;
    builder.select_top_k(logits, std::max(n_best, 1), best);
    const float largest = best.logits.front();
    std::vector<float> weights;
    exp_all(logits, largest, 1.0f, weights);
    const double log_total = static_cast<double>(largest) + std::log(sum_all(weights));
    const auto log_prob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - log_total); };
    TopLogprobs out{log_prob(logits[static_cast<size_t>(chosen)]), {}};
    for (size_t i = 0; i < static_cast<size_t>(std::max(n_best, 0)) && i < best.ids.size(); ++i) {
        out.best.emplace_back(best.ids[i], log_prob(best.logits[i]));
    }
    return out;
}

} // namespace dspark
