#include "synthetic_acceptance.h"

#include "random.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <numeric>
#include <stdexcept>
#include <string>

namespace dspark {

namespace {

// The difficulty takes 61 values from -5 to 5 standard deviations: sums over them are exact, and cheap beside a step.
constexpr size_t kNodes = 61;
constexpr double kFarthest = 5.0;
constexpr double kMostProbability = 1.0 - 1e-6; // keeps logits finite

// Counters of our own in the last word: the request's stream uses 0 to 3 there.
enum class Draw : uint32_t { difficulty = 16, acceptance = 17 };

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

double uniform(uint32_t high, uint32_t low) {
    const uint64_t bits = (uint64_t{high} << 32) | low;
    return (static_cast<double>(bits >> 11) + 0.5) * 0x1.0p-53; // never 0 or 1
}

RandomStream::Block draw(uint64_t key, uint64_t start, size_t slot, Draw what) {
    return RandomStream::philox({static_cast<uint32_t>(start), static_cast<uint32_t>(start >> 32),
                                 static_cast<uint32_t>(slot), static_cast<uint32_t>(what)},
                                key);
}

void require(bool holds, const std::string& message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

} // namespace

void SyntheticOptions::validate() const {
    for (const auto& domain : rates) {
        require(!domain.empty(), "rates must hold at least 1 rate per domain, got 0");
        for (const double rate : domain) {
            require(rate >= 0 && rate <= 1, "rates must be in [0, 1], got " + std::to_string(rate));
        }
    }
    require(spread >= 0 && spread <= 10, "spread must be in [0, 10], got " + std::to_string(spread));
    require(noise >= 0 && noise <= 100, "noise must be in [0, 100], got " + std::to_string(noise));
    require(std::abs(bias) <= 100, "bias must be in [-100, 100], got " + std::to_string(bias));
}

SyntheticAcceptance::SyntheticAcceptance(const SyntheticOptions& options, int32_t block_size)
    : options_(options), block_size_(static_cast<size_t>(block_size)), difficulty_(kNodes), weight_(kNodes) {
    options_.validate();
    require(!options_.rates.empty(), "rates must hold at least 1 domain, got 0");
    for (size_t i = 0; i < kNodes; ++i) {
        difficulty_[i] = kFarthest * (2.0 * static_cast<double>(i) / (kNodes - 1) - 1.0);
        weight_[i] = std::exp(-0.5 * difficulty_[i] * difficulty_[i]);
    }
    const double total = std::accumulate(weight_.begin(), weight_.end(), 0.0);
    std::ranges::for_each(weight_, [total](double& weight) { weight /= total; });
    const size_t n_values = (1 + block_size_) * kNodes;
    survival_.resize(options_.rates.size() * n_values, 1.0);
    for (size_t domain = 0; domain < options_.rates.size(); ++domain) {
        solve(options_.rates[domain], std::span(survival_).subspan(domain * n_values, n_values));
    }
}

// Finds m_k slot after slot by bisection and fills the table of survivals given z.
void SyntheticAcceptance::solve(std::span<const double> rates, std::span<double> survival) const {
    for (size_t slot = 0; slot < block_size_; ++slot) {
        const auto before = survival.subspan(slot * kNodes, kNodes);
        const auto after = survival.subspan((slot + 1) * kNodes, kNodes);
        const double rate = rates[std::min(slot, rates.size() - 1)];
        const double wanted = rate * std::inner_product(weight_.begin(), weight_.end(), before.begin(), 0.0);
        double low = -60;
        double high = 60;
        for (int step = 0; step < 60; ++step) {
            const double middle = 0.5 * (low + high);
            double mass = 0;
            for (size_t i = 0; i < kNodes; ++i) {
                after[i] = before[i] * sigmoid(middle + options_.spread * difficulty_[i]);
                mass += weight_[i] * after[i];
            }
            (mass < wanted ? low : high) = middle;
        }
    }
}

SyntheticAcceptance::Round SyntheticAcceptance::round(uint64_t request_seed, uint64_t start) const {
    const RandomStream::Block bits = draw(request_seed ^ options_.seed, start, 0, Draw::difficulty);
    double left = uniform(bits[0], bits[1]);
    size_t node = 0;
    while (node + 1 < kNodes && left >= weight_[node]) {
        left -= weight_[node++];
    }
    const RandomStream::Block more = draw(request_seed ^ options_.seed, start, 1, Draw::difficulty);
    const double normal = std::sqrt(-2.0 * std::log(uniform(more[0], more[1]))) *
                          std::cos(2.0 * std::numbers::pi * uniform(more[2], more[3]));
    return {static_cast<size_t>(request_seed % options_.rates.size()), node,
            difficulty_[node] + options_.noise * normal};
}

double SyntheticAcceptance::conditional(const Round& round, size_t slot) const {
    const size_t at = (round.domain * (1 + block_size_) + slot) * kNodes + round.node;
    return survival_[at] > 0 ? survival_[at + kNodes] / survival_[at] : 0.0;
}

void SyntheticAcceptance::confidence_logits(uint64_t request_seed, uint64_t start, std::span<float> out) const {
    const Round now = round(request_seed, start);
    const double noise = std::max(options_.noise, 1e-3); // far below the nodes' distance: sees the difficulty itself
    std::array<double, kNodes> posterior;                // of z given the observation, up to a factor
    for (size_t i = 0; i < kNodes; ++i) {
        const double distance = (now.observed - difficulty_[i]) / noise;
        posterior[i] = weight_[i] * std::exp(-0.5 * distance * distance);
    }
    const double* survival = survival_.data() + now.domain * (1 + block_size_) * kNodes;
    double before = std::inner_product(posterior.begin(), posterior.end(), survival, 0.0);
    for (size_t slot = 0; slot < out.size(); ++slot) {
        const double after =
            std::inner_product(posterior.begin(), posterior.end(), survival + (slot + 1) * kNodes, 0.0);
        const double p = std::clamp(before > 0 ? after / before : 0.0, 1 - kMostProbability, kMostProbability);
        out[slot] = static_cast<float>(std::log(p / (1 - p)) + options_.bias);
        before = after;
    }
}

int32_t SyntheticAcceptance::n_accepted(uint64_t request_seed, uint64_t start, int32_t prefix_len) const {
    const Round now = round(request_seed, start);
    int32_t n = 0;
    while (n < prefix_len) {
        const auto slot = static_cast<size_t>(n);
        const RandomStream::Block bits = draw(request_seed ^ options_.seed, start, slot, Draw::acceptance);
        if (uniform(bits[0], bits[1]) >= conditional(now, slot)) {
            break;
        }
        ++n;
    }
    return n;
}

} // namespace dspark
