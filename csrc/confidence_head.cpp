// Implements confidence_head.h.
#include "confidence_head.h"

#include "vector_loops.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace dspark {

ConfidenceHead::ConfidenceHead(std::vector<float> weight, float bias, int64_t hidden_size, int64_t rank)
    : weight_(std::move(weight)), bias_(bias), hidden_size_(static_cast<size_t>(hidden_size)) {
    const auto n = static_cast<int64_t>(weight_.size());
    if (hidden_size <= 0 || rank < 0 || (n != hidden_size && n != hidden_size + rank)) {
        throw std::invalid_argument("confidence weight length must be " + std::to_string(hidden_size) + " or " +
                                    std::to_string(hidden_size + rank) + ", got " + std::to_string(n));
    }
}

float ConfidenceHead::logit(std::span<const float> hidden, std::span<const float> embedding) const {
    const float from_hidden = dot(weight_.data(), hidden.data(), hidden_size_);
    if (!has_markov_input()) {
        return from_hidden + bias_;
    }
    return from_hidden + dot(weight_.data() + hidden_size_, embedding.data(), weight_.size() - hidden_size_) + bias_;
}

} // namespace dspark
