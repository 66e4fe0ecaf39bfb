// The part of the sequential head that reads the past: previous token (and the slot's state, for gated and rnn) to the
// vector q with B = W2 q. Owns: gate and joint matrices in f32, the recurrent state. Must not know: logits, candidates,
// sampling. Threads: one per thread.
#pragma once

#include "sequential_head.h"
#include "vector_loops.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// A small matrix in f32, decoded once. The large W1 and W2 stay in their own storage.
struct Dense {
    std::vector<float> values;
    size_t n_rows = 0;
    size_t n_cols = 0;

    [[nodiscard]] const float* row(size_t i) const { return values.data() + i * n_cols; }
};

inline Dense decode_all(const RowTable& table) {
    Dense out{{}, static_cast<size_t>(table.n_rows), static_cast<size_t>(table.n_cols)};
    out.values.resize(out.n_rows * out.n_cols);
    for (size_t i = 0; i < out.n_rows; ++i) {
        table.decode(static_cast<int64_t>(i), out.values.data() + i * out.n_cols);
    }
    return out;
}

// Eq. 4-6 of the paper up to W2. Usage: prepare() for all blocks of a round, then per block begin() and, slot by slot,
// advance().
class TransitionModel {
  public:
    explicit TransitionModel(const HeadWeights& weights)
        : type_(weights.type), w1_(weights.w1), hidden_size_(static_cast<size_t>(weights.hidden_size)),
          rank_(static_cast<size_t>(weights.rank)) {
        if (type_ == MarkovHeadType::gated || type_ == MarkovHeadType::rnn) {
            const bool is_gated = type_ == MarkovHeadType::gated;
            mix_ = decode_all(is_gated ? weights.gate : weights.joint);
            mix_bias_ = is_gated ? weights.gate_bias : weights.joint_bias;
            mix_bias_.resize(mix_.n_rows, 0.0f);
        }
        mixed_.resize(mix_.n_rows);
        embedding_.resize(rank_);
        state_.resize(rank_);
        recurrent_.resize(rank_);
    }

    // What does not depend on drafted tokens: W[:, h columns] h + b for every slot of every block, so that the wide
    // matrix is read once per round and not once per slot.
    void prepare(std::span<const BlockInput> inputs) {
        from_hidden_.clear();
        first_slot_.clear();
        std::vector<const float*> hidden;
        for (const auto& input : inputs) {
            first_slot_.push_back(hidden.size());
            hidden.insert(hidden.end(), input.hidden.begin(), input.hidden.end());
        }
        from_hidden_.resize(hidden.size() * mix_.n_rows);
        for (size_t row = 0; row < mix_.n_rows; ++row) {
            for (size_t slot = 0; slot < hidden.size(); ++slot) {
                from_hidden_[slot * mix_.n_rows + row] =
                    dot(mix_.row(row) + hidden_column(), hidden[slot], hidden_size_) + mix_bias_[row];
            }
        }
    }

    void begin(size_t block) {
        first_ = first_slot_[block];
        std::fill(recurrent_.begin(), recurrent_.end(), 0.0f);
    }

    // Sets embedding() and state() for one slot, given the token before it.
    void advance(size_t slot, int32_t previous) {
        if (type_ == MarkovHeadType::none) {
            return;
        }
        w1_.decode(previous, embedding_.data());
        if (type_ == MarkovHeadType::vanilla) {
            state_ = embedding_;
        } else if (type_ == MarkovHeadType::gated) {
            advance_gated(slot);
        } else {
            advance_rnn(slot);
        }
    }

    [[nodiscard]] const std::vector<float>& embedding() const { return embedding_; }
    [[nodiscard]] const std::vector<float>& state() const { return state_; }

  private:
    // Input orders differ: gate reads [h; e], joint reads [s; e; h].
    [[nodiscard]] size_t hidden_column() const { return type_ == MarkovHeadType::gated ? 0 : 2 * rank_; }

    void advance_gated(size_t slot) {
        const float* prepared = from_hidden_.data() + (first_ + slot) * mix_.n_rows;
        for (size_t i = 0; i < rank_; ++i) {
            const float gate = sigmoid(prepared[i] + dot(mix_.row(i) + hidden_size_, embedding_.data(), rank_));
            state_[i] = gate * embedding_[i];
        }
    }

    void advance_rnn(size_t slot) {
        const float* prepared = from_hidden_.data() + (first_ + slot) * mix_.n_rows;
        for (size_t i = 0; i < mix_.n_rows; ++i) {
            const float from_recurrent = dot(mix_.row(i), recurrent_.data(), rank_);
            mixed_[i] = prepared[i] + from_recurrent + dot(mix_.row(i) + rank_, embedding_.data(), rank_);
        }
        for (size_t i = 0; i < rank_; ++i) {
            const float gate = sigmoid(mixed_[i]);
            recurrent_[i] = gate * recurrent_[i] + (1.0f - gate) * std::tanh(mixed_[rank_ + i]);
            state_[i] = std::tanh(mixed_[2 * rank_ + i]);
        }
    }

    MarkovHeadType type_;
    RowTable w1_;
    size_t hidden_size_;
    size_t rank_;
    Dense mix_; // gate (r, d + r) or joint (3r, 2r + d)
    std::vector<float> mix_bias_;
    std::vector<float> from_hidden_; // (all slots of the round, mix rows)
    std::vector<size_t> first_slot_; // per block, into from_hidden_
    size_t first_ = 0;
    std::vector<float> mixed_;     // (mix rows,)
    std::vector<float> embedding_; // e (r,)
    std::vector<float> state_;     // q (r,): B = W2 q
    std::vector<float> recurrent_; // s (r,)
};

} // namespace dspark
