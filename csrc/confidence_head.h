// The confidence head: a linear read-out that estimates whether a drafted token will survive (paper eq. 7).
// Owns: its weights in f32. Must not know: calibration (its input is the logit returned here), scheduling.
// Threads: immutable after construction.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

class ConfidenceHead {
  public:
    // `weight` is (hidden_size,) or (hidden_size + rank,): the second form also reads e = W1[previous token].
    // Throws std::invalid_argument for any other length.
    ConfidenceHead(std::vector<float> weight, float bias, int64_t hidden_size, int64_t rank);

    // w . [h; e] + b, before the sigmoid. `hidden`: (hidden_size,), `embedding`: (rank,), unread when it is not used.
    [[nodiscard]] float logit(std::span<const float> hidden, std::span<const float> embedding) const;
    [[nodiscard]] bool fits(int64_t hidden_size, int64_t rank) const {
        const auto d = static_cast<size_t>(hidden_size);
        return hidden_size_ == d && (weight_.size() == d || weight_.size() == d + static_cast<size_t>(rank));
    }
    [[nodiscard]] bool has_markov_input() const { return weight_.size() > hidden_size_; }

  private:
    std::vector<float> weight_;
    float bias_;
    size_t hidden_size_;
};

} // namespace dspark
