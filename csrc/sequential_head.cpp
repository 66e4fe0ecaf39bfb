// Implements sequential_head.h. TransitionModel turns the previous token (and, for gated and rnn, the slot's state)
// into the vector q with B = W2 q; the two heads differ only in the rows of W2 they read.
#include "sequential_head.h"

#include "candidate_search.h"
#include "transition_model.h"
#include "vector_loops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace dspark {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr size_t kAhead = 6; // rows of W2 under way from memory while one is multiplied

[[noreturn]] void throw_value(const std::string& name, const std::string& rule, const std::string& value) {
    throw std::invalid_argument(name + " must " + rule + ", got " + value);
}

void check_positive(const char* name, int64_t value) {
    if (value <= 0) {
        throw_value(name, "be positive", std::to_string(value));
    }
}

void check_shape(const char* name, const RowTable& table, int64_t n_rows, int64_t n_cols) {
    const auto show = [](int64_t rows, int64_t cols) { return std::to_string(rows) + " x " + std::to_string(cols); };
    if (table.n_rows != n_rows || table.n_cols != n_cols) {
        throw_value(name, "have shape " + show(n_rows, n_cols), show(table.n_rows, table.n_cols));
    }
    if (table.data == nullptr || table.decode_row == nullptr || table.row_bytes == 0) {
        throw_value(name, "hold data and a decoder", "none");
    }
}

void check_bias(const char* name, const std::vector<float>& bias, int64_t n) {
    if (!bias.empty() && static_cast<int64_t>(bias.size()) != n) {
        throw_value(name, "have length " + std::to_string(n), std::to_string(bias.size()));
    }
}

void check_d2t(const HeadWeights& weights) {
    std::vector<bool> is_taken(static_cast<size_t>(weights.n_vocab), false);
    for (const int64_t id : weights.d2t) {
        if (id < 0 || id >= weights.n_vocab || is_taken[static_cast<size_t>(id)]) {
            throw_value("d2t", "map one to one into the target vocabulary", std::to_string(id));
        }
        is_taken[static_cast<size_t>(id)] = true;
    }
}

// Pops on every way out what was pushed while a block was drafted.
class CountsGuard {
  public:
    explicit CountsGuard(TokenCounts* counts) : counts_(counts) {}
    ~CountsGuard() {
        for (auto id = pushed_.rbegin(); id != pushed_.rend(); ++id) {
            counts_->pop_output(*id);
        }
    }
    CountsGuard(const CountsGuard&) = delete;
    CountsGuard& operator=(const CountsGuard&) = delete;

    void push(int32_t id) {
        if (counts_ != nullptr) {
            counts_->push_output(id);
            pushed_.push_back(id);
        }
    }

  private:
    TokenCounts* counts_;
    std::vector<int32_t> pushed_;
};

// The sequential loop that both heads share; a head only says how a slot's distribution comes about.
class SequentialHeadBase : public SequentialHead {
  public:
    explicit SequentialHeadBase(HeadWeights weights) : weights_(std::move(weights)), transition_(weights_) {
        if (!weights_.d2t.empty()) {
            target_to_row_.assign(static_cast<size_t>(weights_.n_vocab), -1);
        }
        for (size_t row = 0; row < weights_.d2t.size(); ++row) {
            target_to_row_[static_cast<size_t>(weights_.d2t[row])] = static_cast<int32_t>(row);
        }
        w2_row_.resize(static_cast<size_t>(weights_.rank));
    }

    void draft_blocks(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) final {
        if (inputs.size() != drafts.size()) {
            throw_value("drafts", "be as many as inputs", std::to_string(drafts.size()));
        }
        for (const auto& input : inputs) {
            check_input(input);
        }
        transition_.prepare(inputs);
        for (size_t block = 0; block < inputs.size(); ++block) {
            transition_.begin(block);
            begin_block(inputs[block]);
            draft_block(inputs[block], drafts[block]);
            end_block();
        }
    }

  protected:
    // p^d of one slot, given the token before it, into `out`.
    virtual void fill_distribution(const BlockInput& input, size_t slot, int32_t previous, SlotTrace* trace,
                                   Distribution& out) = 0;
    virtual void check_logits(const BlockInput& input) const = 0;
    virtual void begin_block(const BlockInput&) {}
    virtual void end_block() {}

    // Row of W2 for a target id; -1 outside the draft vocabulary.
    [[nodiscard]] int64_t row_of(int32_t id) const {
        return target_to_row_.empty() ? id : target_to_row_[static_cast<size_t>(id)];
    }

    [[nodiscard]] float soft_capped(float logit) const {
        const float cap = weights_.logit_softcap;
        return cap > 0.0f ? cap * std::tanh(logit / cap) : logit;
    }

    // B of one draft row.
    [[nodiscard]] float transition_bias(int64_t row) {
        if (weights_.type == MarkovHeadType::none) {
            return 0.0f;
        }
        const std::vector<float>& state = transition_.state();
        if (weights_.w2.dot_row != nullptr) {
            return weights_.w2.dot_row(weights_.w2.row(row), state.data(), weights_.rank);
        }
        weights_.w2.decode(row, w2_row_.data());
        return dot(w2_row_.data(), state.data(), w2_row_.size());
    }

    [[nodiscard]] bool has_bias(int64_t row) const { return weights_.type != MarkovHeadType::none && row >= 0; }

    void begin_trace(SlotTrace* trace) const {
        if (trace != nullptr) {
            *trace = {{}, {}, {}, transition_.embedding(), transition_.state()};
        }
    }
    static void add_trace(SlotTrace* trace, int32_t id, float base, float bias) {
        if (trace != nullptr) {
            trace->ids.push_back(id);
            trace->base_logits.push_back(base);
            trace->transition_bias.push_back(bias);
        }
    }

    HeadWeights weights_;
    DistributionBuilder builder_;

  private:
    void check_input(const BlockInput& input) const {
        if (input.anchor < 0 || input.anchor >= weights_.n_vocab) {
            throw_value("anchor", "be a token below " + std::to_string(weights_.n_vocab), std::to_string(input.anchor));
        }
        if ((input.sampling == nullptr) != (input.counts == nullptr)) {
            throw_value("sampling and counts", "be given together", "one of them");
        }
        check_logits(input);
    }

    void draft_block(const BlockInput& input, BlockDraft& draft) {
        const size_t n_slots = input.hidden.size();
        draft.tokens.resize(n_slots);
        draft.probs.resize(n_slots);
        draft.confidence_logits.resize(weights_.confidence ? n_slots : 0);
        if (draft.trace != nullptr) {
            draft.trace->resize(n_slots);
        }
        CountsGuard counts(input.counts);
        int32_t previous = input.anchor;
        for (size_t slot = 0; slot < n_slots; ++slot) {
            transition_.advance(slot, previous);
            previous = draft_slot(input, slot, previous, draft);
            counts.push(previous);
        }
    }

    int32_t draft_slot(const BlockInput& input, size_t slot, int32_t previous, BlockDraft& draft) {
        SlotTrace* trace = draft.trace != nullptr ? &(*draft.trace)[slot] : nullptr;
        begin_trace(trace);
        fill_distribution(input, slot, previous, trace, draft.probs[slot]);
        if (weights_.confidence) {
            const std::span<const float> hidden(input.hidden[slot], static_cast<size_t>(weights_.hidden_size));
            draft.confidence_logits[slot] = weights_.confidence->logit(hidden, transition_.embedding());
        }
        draft.tokens[slot] = draw(input, slot, draft.probs[slot]);
        return draft.tokens[slot];
    }

    static int32_t draw(const BlockInput& input, size_t slot, const Distribution& probs) {
        return probs.size() == 1 ? probs.ids.front()
                                 : sample(probs, input.random.draft_sample(input.start, input.start + 1 + slot));
    }

    TransitionModel transition_;
    std::vector<int32_t> target_to_row_; // (n_vocab,) inverse of d2t, or empty
    std::vector<float> w2_row_;          // (r,)
};

class FullSequentialHead final : public SequentialHeadBase {
  public:
    using SequentialHeadBase::SequentialHeadBase;

  protected:
    void check_logits(const BlockInput& input) const override {
        if (input.base_logits.size() != input.hidden.size()) {
            throw_value("base_logits", "have a row per slot", std::to_string(input.base_logits.size()));
        }
    }

    void fill_distribution(const BlockInput& input, size_t slot, int32_t, SlotTrace* trace,
                           Distribution& out) override {
        logits_.assign(static_cast<size_t>(weights_.n_vocab), -kInf);
        for (int32_t id = 0; id < weights_.n_vocab; ++id) {
            const int64_t row = row_of(id);
            if (row >= 0) {
                const float base = soft_capped(input.base_logits[slot][id]);
                const float bias = transition_bias(row);
                logits_[static_cast<size_t>(id)] = base + bias;
                add_trace(trace, id, base, bias);
            }
        }
        if (input.sampling != nullptr) {
            adjust_logits(logits_, *input.sampling, *input.counts);
        }
        builder_.truncated_distribution(logits_, input.truncation, out);
    }

  private:
    std::vector<float> logits_; // (n_vocab,) U + B
};

class CandidateSequentialHead final : public SequentialHeadBase {
  public:
    CandidateSequentialHead(HeadWeights weights, int32_t n_candidates, int32_t n_followers)
        : SequentialHeadBase(std::move(weights)), search_(weights_, n_candidates, n_followers) {}

    [[nodiscard]] int32_t n_searched() const override { return search_.n_searched(); }

  protected:
    void check_logits(const BlockInput& input) const override {
        const size_t n_rows = input.candidates.empty() ? input.base_logits.size() : input.candidates.size();
        if (n_rows != input.hidden.size()) {
            throw_value("base_logits or candidates", "have a row per slot", std::to_string(n_rows));
        }
        for (const auto& slot : input.candidates) {
            const bool is_known = std::all_of(slot.ids.begin(), slot.ids.end(),
                                              [this](int32_t id) { return id >= 0 && id < weights_.n_vocab; });
            if (!is_known || slot.ids.size() != slot.logits.size()) {
                throw_value("candidates", "be known tokens with one logit each",
                            std::to_string(slot.ids.size()) + " tokens");
            }
        }
    }

    void begin_block(const BlockInput& input) override { look_ahead(input, 0); }

    void fill_distribution(const BlockInput& input, size_t slot, int32_t previous, SlotTrace* trace,
                           Distribution& out) override {
        const Candidates& chosen =
            input.candidates.empty() ? search_.select(input, slot, previous) : input.candidates[slot];
        find_rows(chosen);
        look_ahead(input, slot + 1);
        scored_.clear();
        for (size_t i = 0; i < chosen.ids.size(); ++i) {
            prefetch_rows(i);
            score(input, rows_[i], chosen.ids[i], chosen.logits[i], trace);
        }
        builder_.candidate_distribution(scored_, input.truncation, out);
    }

    void end_block() override { search_.end_block(); }

  private:
    // Searches a slot before the one in front of it is drawn, so that its rows of W2 are on their way meanwhile.
    void look_ahead(const BlockInput& input, size_t slot) {
        rows_ahead_.clear();
        if (slot >= input.hidden.size() || !input.candidates.empty()) {
            return;
        }
        for (const Ranked& entry : search_.look_ahead(input, slot)) {
            rows_ahead_.push_back(row_of(entry.id));
        }
    }

    // Into rows_, and begins to find their pages.
    void find_rows(const Candidates& chosen) {
        rows_.clear();
        for (const int32_t id : chosen.ids) {
            rows_.push_back(row_of(id));
            if (has_bias(rows_.back())) {
                weights_.w2.prefetch_page(rows_.back());
            }
        }
    }

    // What is multiplied soon, and a row of the next slot.
    void prefetch_rows(size_t i) const {
        if (i + kAhead < rows_.size() && has_bias(rows_[i + kAhead])) {
            weights_.w2.prefetch(rows_[i + kAhead]);
        }
        if (i < rows_ahead_.size() && has_bias(rows_ahead_[i])) {
            weights_.w2.prefetch_early(rows_ahead_[i]);
        }
    }

    void score(const BlockInput& input, int64_t row, int32_t id, float logit, SlotTrace* trace) {
        if (row < 0) {
            return;
        }
        const float base = soft_capped(logit);
        const float bias = transition_bias(row);
        add_trace(trace, id, base, bias);
        scored_.add(id, input.sampling == nullptr ? base + bias
                                                  : adjust_logit(base + bias, id, *input.sampling, *input.counts));
    }

    CandidateSearch search_;
    std::vector<int64_t> rows_;       // of W2, of a slot's candidates
    std::vector<int64_t> rows_ahead_; // of those of the next slot that are known
    Candidates scored_;               // ids and U + B
};

} // namespace

void validate_weights(const HeadWeights& weights) {
    const int64_t r = weights.rank;
    const int64_t d = weights.hidden_size;
    check_positive("n_vocab", weights.n_vocab);
    check_positive("hidden_size", d);
    if (weights.type != MarkovHeadType::none) {
        check_positive("markov rank", r);
    }
    if (!(weights.logit_softcap >= 0.0f && weights.logit_softcap < kInf)) {
        throw_value("logit_softcap", "be finite and at least 0", std::to_string(weights.logit_softcap));
    }
    check_d2t(weights);
    if (weights.type != MarkovHeadType::none) {
        check_shape("markov_w1", weights.w1, weights.n_vocab, r);
        check_shape("markov_w2", weights.w2,
                    weights.d2t.empty() ? weights.n_vocab : static_cast<int64_t>(weights.d2t.size()), r);
    }
    if (weights.confidence && !weights.confidence->fits(d, r)) {
        throw_value("confidence head", "fit hidden_size and rank", "another size");
    }
    if (weights.type == MarkovHeadType::gated) {
        check_shape("markov_gate", weights.gate, r, d + r);
        check_bias("markov_gate bias", weights.gate_bias, r);
    }
    if (weights.type == MarkovHeadType::rnn) {
        check_shape("markov_joint", weights.joint, 3 * r, 2 * r + d);
        check_bias("markov_joint bias", weights.joint_bias, 3 * r);
    }
}

std::unique_ptr<SequentialHead> make_full_head(HeadWeights weights) {
    validate_weights(weights);
    return std::make_unique<FullSequentialHead>(std::move(weights));
}

std::unique_ptr<SequentialHead> make_candidate_head(HeadWeights weights, int32_t n_candidates, int32_t n_followers) {
    validate_weights(weights);
    if (n_candidates <= 0) {
        throw_value("n_candidates", "be positive", std::to_string(n_candidates));
    }
    return std::make_unique<CandidateSequentialHead>(std::move(weights), n_candidates, n_followers);
}

} // namespace dspark
