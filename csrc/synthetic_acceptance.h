// Accept events drawn from given rates, in place of what verification found: lets a pair of random weights be timed as
// if it were trained. What comes out is NO TEXT. Owns: the law of the events and of the confidences that go with them.
// Must not know: models, batches, time. Threads: immutable after construction.
//
// A round has a difficulty z, normal in logits: draft k survives with p_k(z) = sigmoid(m_k + spread * z), independently
// given z. The m_k are solved for, so that averaged over rounds draft k is accepted with exactly the given rate when
// those before it were. The confidence sees z through noise, y = z + noise * normal, and is the exact conditional
// probability given y: calibrated by construction, and the less informative the larger the noise.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

struct SyntheticOptions {
    // Per domain: P(draft k accepted | all before it were), k = 0 .. ; a list shorter than the block goes on with its
    // last rate. A request with seed s follows domain s modulo their number. Empty: real verification.
    std::vector<std::vector<double>> rates;
    double spread = 1.5;
    double noise = 0.7;
    double bias = 0.0; // added to the confidence logits: a calibration that does not fit
    uint64_t seed = 0;

    // Throws std::invalid_argument: "<name> must <rule>, got <value>".
    void validate() const;
};

class SyntheticAcceptance {
  public:
    SyntheticAcceptance(const SyntheticOptions& options, int32_t block_size);

    // The round of a request (by its seed) at anchor position `start`: what its drafts' confidences are, and how many
    // of its first `prefix_len` drafts stand. Both depend on nothing else.
    void confidence_logits(uint64_t request_seed, uint64_t start, std::span<float> out) const; // (block_size)
    [[nodiscard]] int32_t n_accepted(uint64_t request_seed, uint64_t start, int32_t prefix_len) const;

  private:
    struct Round {
        size_t domain;
        size_t node;     // index of the difficulty
        double observed; // the difficulty as the confidence sees it
    };

    void solve(std::span<const double> rates, std::span<double> survival) const;
    [[nodiscard]] Round round(uint64_t request_seed, uint64_t start) const;
    [[nodiscard]] double conditional(const Round& round, size_t slot) const;

    SyntheticOptions options_;
    size_t block_size_;
    std::vector<double> difficulty_; // (n_nodes,) the values z takes
    std::vector<double> weight_;     // (n_nodes,) their probabilities
    std::vector<double> survival_;   // (n_domains, 1 + block_size, n_nodes): P(first k drafts accepted | z)
};

} // namespace dspark
