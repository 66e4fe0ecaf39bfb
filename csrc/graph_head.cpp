// Implements graph_head.h on the host: lays a batch out in columns, lets block_graph.h draw it on the device, and reads
// p^d out of the logits that come back.
#include "graph_head.h"

#include "block_graph.h"
#include "vector_loops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

namespace dspark {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
// Stands for 1/T at T = 0: a power of two, so that scaling is exact, and large enough for the softmax of any two
// different logits to be 0 and 1. With u = 0 the draw then takes the lowest id among equal maxima, as the other heads
// do, and greedy and sampled requests share the graph.
constexpr float kGreedyScale = 0x1p60f;
constexpr float kLargestUniform = 1.0f - 0x1p-23f; // what is drawn stays below the rounded sum of the probabilities

[[noreturn]] void throw_value(const std::string& name, const std::string& rule, const std::string& value) {
    throw std::invalid_argument(name + " must " + rule + ", got " + value);
}

class GraphSequentialHead final : public SequentialHead {
  public:
    GraphSequentialHead(HeadWeights weights, const GraphHeadOptions& options)
        : weights_(std::move(weights)), max_requests_(static_cast<size_t>(options.max_requests)),
          graphs_(weights_, options), width_(graphs_.width()), is_full_(graphs_.is_full()) {
        if (!weights_.d2t.empty()) {
            target_to_row_.assign(static_cast<size_t>(weights_.n_vocab), -1);
        }
        for (size_t row = 0; row < weights_.d2t.size(); ++row) {
            target_to_row_[static_cast<size_t>(weights_.d2t[row])] = static_cast<int32_t>(row);
        }
        embedding_.resize(static_cast<size_t>(weights_.rank));
    }

    void draft_blocks(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) override {
        if (inputs.size() != drafts.size()) {
            throw_value("drafts", "be as many as inputs", std::to_string(drafts.size()));
        }
        for (const BlockInput& input : inputs) {
            check_input(input);
        }
        for (size_t begin = 0; begin < inputs.size(); begin += max_requests_) {
            const size_t n = std::min(max_requests_, inputs.size() - begin);
            draft_batch(inputs.subspan(begin, n), drafts.subspan(begin, n));
        }
    }

  private:
    void check_input(const BlockInput& input) const {
        if (input.anchor < 0 || input.anchor >= weights_.n_vocab) {
            throw_value("anchor", "be a token below " + std::to_string(weights_.n_vocab), std::to_string(input.anchor));
        }
        const bool is_selected = !input.candidates.empty() && !is_full_;
        const size_t n_rows = is_selected ? input.candidates.size() : input.base_logits.size();
        if (n_rows != input.hidden.size()) {
            throw_value("base_logits or candidates", "have a row per slot", std::to_string(n_rows));
        }
        for (size_t slot = 0; is_selected && slot < n_rows; ++slot) {
            check_candidates(input.candidates[slot]);
        }
    }

    void check_candidates(const Candidates& slot) const {
        const bool is_known = std::all_of(slot.ids.begin(), slot.ids.end(),
                                          [this](int32_t id) { return id >= 0 && id < weights_.n_vocab; });
        if (!is_known || slot.ids.size() != slot.logits.size() || slot.ids.size() > width_) {
            throw_value("candidates", "hold at most " + std::to_string(width_) + " known tokens, each with a logit",
                        std::to_string(slot.ids.size()));
        }
    }

    void draft_batch(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) {
        stage(inputs);
        if (columns_.n_slots > 0) {
            graphs_.compute(columns_, tokens_, logits_);
        }
        for (size_t i = 0; i < inputs.size(); ++i) {
            read_draft(i, inputs[i], drafts[i]);
        }
    }

    // Few shapes, so that few graphs are built. Requests and slots beyond those of the inputs compute on token 0 and
    // nobody looks at them.
    void stage(std::span<const BlockInput> inputs) {
        columns_.n_requests = std::min(std::bit_ceil(inputs.size()), max_requests_);
        columns_.n_slots = 0;
        for (const BlockInput& input : inputs) {
            columns_.n_slots = std::max(columns_.n_slots, input.hidden.size());
        }
        const size_t n_columns = columns_.n_columns();
        columns_.anchors.assign(columns_.n_requests, 0);
        columns_.scales.assign(columns_.n_requests, 1.0f);
        columns_.uniforms.assign(n_columns, 0.0f);
        columns_.base.assign(n_columns * width_, 0.0f);
        columns_.ids.assign(is_full_ ? 0 : n_columns * width_, 0);
        columns_.rows.assign(weights_.d2t.empty() ? 0 : columns_.ids.size(), 0);
        columns_.hidden.assign(graphs_.reads_hidden() ? n_columns * n_hidden() : 0, 0.0f);
        n_entries_.assign(n_columns, 0);
        for (size_t i = 0; i < inputs.size(); ++i) {
            stage_input(i, inputs[i]);
        }
    }

    void stage_input(size_t request, const BlockInput& input) {
        const bool is_greedy = input.truncation.is_greedy();
        columns_.anchors[request] = input.anchor;
        columns_.scales[request] = is_greedy ? kGreedyScale : 1.0f / input.truncation.temperature;
        for (size_t slot = 0; slot < input.hidden.size(); ++slot) {
            const size_t column = columns_.column(request, slot);
            if (is_full_) {
                stage_vocabulary(column, input.base_logits[slot]);
            } else {
                stage_candidates(column, candidates_of(input, slot));
            }
            check_logits(std::span(columns_.base).subspan(column * width_, n_entries_[column]));
            if (!is_greedy) {
                const double uniform = input.random.draft_sample(input.start, input.start + 1 + slot);
                columns_.uniforms[column] = std::min(static_cast<float>(uniform), kLargestUniform);
            }
            if (graphs_.reads_hidden()) {
                std::copy_n(input.hidden[slot], n_hidden(), columns_.hidden.data() + column * n_hidden());
            }
        }
    }

    void stage_vocabulary(size_t column, const float* logits) {
        const std::span<const int32_t> vocabulary = graphs_.vocabulary();
        float* base = columns_.base.data() + column * width_;
        n_entries_[column] = vocabulary.size();
        for (size_t i = 0; i < vocabulary.size(); ++i) {
            base[i] = soft_capped(logits[vocabulary[i]]);
        }
        std::fill(base + vocabulary.size(), base + width_, -kInf);
    }

    // In ascending ids, as the draw walks them; the last one, at -inf, fills up what is missing.
    void stage_candidates(size_t column, const Candidates& chosen) {
        order_.clear();
        for (size_t i = 0; i < chosen.ids.size(); ++i) {
            if (row_of(chosen.ids[i]) >= 0) {
                order_.emplace_back(chosen.ids[i], soft_capped(chosen.logits[i]));
            }
        }
        std::sort(order_.begin(), order_.end());
        n_entries_[column] = order_.size();
        for (size_t i = 0; i < width_ && !order_.empty(); ++i) {
            const auto& [id, logit] = order_[std::min(i, order_.size() - 1)];
            const size_t at = column * width_ + i;
            columns_.ids[at] = id;
            columns_.base[at] = i < order_.size() ? logit : -kInf;
            if (!columns_.rows.empty()) {
                columns_.rows[at] = row_of(id);
            }
        }
    }

    // U alone chooses the candidates, as in the candidate head.
    const Candidates& candidates_of(const BlockInput& input, size_t slot) {
        if (!input.candidates.empty()) {
            return input.candidates[slot];
        }
        const std::span logits(input.base_logits[slot], static_cast<size_t>(weights_.n_vocab));
        builder_.select_candidates(logits, static_cast<int32_t>(width_), selected_);
        return selected_;
    }

    static void check_logits(std::span<const float> logits) {
        if (!is_below_infinity(logits.data(), logits.size())) {
            throw std::runtime_error("logits must not hold NaN or +inf, got one");
        }
        if (std::none_of(logits.begin(), logits.end(), [](float logit) { return logit > -kInf; })) {
            throw std::runtime_error("logits must hold a finite value, got none");
        }
    }

    void read_draft(size_t request, const BlockInput& input, BlockDraft& draft) {
        const size_t n_slots = input.hidden.size();
        draft.tokens.resize(n_slots);
        draft.probs.resize(n_slots);
        draft.confidence_logits.resize(weights_.confidence ? n_slots : 0);
        if (draft.trace != nullptr) {
            draft.trace->assign(n_slots, {});
        }
        int32_t previous = input.anchor;
        for (size_t slot = 0; slot < n_slots; ++slot) {
            const size_t column = columns_.column(request, slot);
            draft.tokens[slot] = tokens_[column];
            read_probs(column, input.truncation, draft.probs[slot]);
            if (weights_.confidence) {
                draft.confidence_logits[slot] = confidence_logit(input.hidden[slot], previous);
            }
            if (draft.trace != nullptr) {
                fill_trace(column, previous, (*draft.trace)[slot]);
            }
            previous = draft.tokens[slot];
        }
    }

    float confidence_logit(const float* hidden, int32_t previous) {
        if (weights_.confidence->has_markov_input()) {
            weights_.w1.decode(previous, embedding_.data());
        }
        return weights_.confidence->logit({hidden, n_hidden()}, embedding_);
    }

    void read_probs(size_t column, const Truncation& truncation, Distribution& out) {
        const std::span logits = std::span<const float>(logits_).subspan(column * width_, n_entries_[column]);
        check_logits(logits); // NaN in h or in the weights shows here
        if (truncation.is_greedy()) {
            out.assign_single(tokens_[column]);
            return;
        }
        Truncation temperature_only;
        temperature_only.temperature = truncation.temperature;
        if (is_full_) {
            builder_.truncated_distribution(over_target_vocabulary(logits), temperature_only, out);
        } else {
            const std::span<const int32_t> ids = ids_of(column);
            selected_.ids.assign(ids.begin(), ids.end());
            selected_.logits.assign(logits.begin(), logits.end());
            builder_.candidate_distribution(selected_, temperature_only, out);
        }
        keep_drawable(tokens_[column], out);
    }

    std::span<const float> over_target_vocabulary(std::span<const float> logits) {
        if (weights_.d2t.empty()) {
            return logits;
        }
        target_logits_.assign(static_cast<size_t>(weights_.n_vocab), -kInf);
        for (size_t i = 0; i < logits.size(); ++i) {
            target_logits_[static_cast<size_t>(graphs_.vocabulary()[i])] = logits[i];
        }
        return target_logits_;
    }

    // Once in ten million draws, rounding on the device may pick a token whose probability is 0 in float; verification
    // divides by it.
    static void keep_drawable(int32_t token, Distribution& probs) {
        const auto at = std::lower_bound(probs.ids.begin(), probs.ids.end(), token);
        const auto prob = probs.probs.begin() + (at - probs.ids.begin());
        constexpr float kLeast = std::numeric_limits<float>::min();
        if (at != probs.ids.end() && *at == token) {
            *prob = std::max(*prob, kLeast);
        } else { // its logit is -inf
            probs.probs.insert(prob, kLeast);
            probs.ids.insert(at, token);
        }
    }

    void fill_trace(size_t column, int32_t previous, SlotTrace& trace) const {
        const std::span<const int32_t> ids = ids_of(column);
        trace.ids.assign(ids.begin(), ids.end());
        for (size_t at = column * width_; at < column * width_ + ids.size(); ++at) {
            trace.base_logits.push_back(columns_.base[at]);
            trace.transition_bias.push_back(logits_[at] - columns_.base[at]);
        }
        trace.embedding.resize(static_cast<size_t>(weights_.rank));
        weights_.w1.decode(previous, trace.embedding.data());
    }

    // Target ids of a column's entries, padding left out.
    [[nodiscard]] std::span<const int32_t> ids_of(size_t column) const {
        return is_full_ ? graphs_.vocabulary() : std::span(columns_.ids).subspan(column * width_, n_entries_[column]);
    }
    [[nodiscard]] int32_t row_of(int32_t id) const {
        return target_to_row_.empty() ? id : target_to_row_[static_cast<size_t>(id)];
    }
    [[nodiscard]] float soft_capped(float logit) const {
        const float cap = weights_.logit_softcap;
        return cap > 0.0f ? cap * std::tanh(logit / cap) : logit;
    }
    [[nodiscard]] size_t n_hidden() const { return static_cast<size_t>(weights_.hidden_size); }

    HeadWeights weights_;
    size_t max_requests_;
    BlockGraphs graphs_;
    size_t width_;
    bool is_full_;
    std::vector<int32_t> target_to_row_; // (n_vocab,) inverse of d2t, or empty
    DistributionBuilder builder_;

    // One batch.
    BlockColumns columns_;
    std::vector<size_t> n_entries_; // (n_columns,) the rest of a column's width is padding
    std::vector<int32_t> tokens_;   // (n_columns,)
    std::vector<float> logits_;     // (n_columns, width) U + B
    Candidates selected_;
    std::vector<std::pair<int32_t, float>> order_; // (id, U)
    std::vector<float> target_logits_;             // (n_vocab,)
    std::vector<float> embedding_;                 // e (r,)
};

} // namespace

std::unique_ptr<SequentialHead> make_graph_head(HeadWeights weights, const GraphHeadOptions& options) {
    validate_weights(weights);
    for (const auto& [name, value, lowest] : {std::tuple{"n_threads", options.n_threads, 1},
                                              {"n_candidates", options.n_candidates, 0},
                                              {"max_requests", options.max_requests, 1}}) {
        if (value < lowest) {
            throw_value(name, "be at least " + std::to_string(lowest), std::to_string(value));
        }
    }
    if (weights.type == MarkovHeadType::none) {
        return options.n_candidates == 0 ? make_full_head(std::move(weights))
                                         : make_candidate_head(std::move(weights), options.n_candidates);
    }
    return std::make_unique<GraphSequentialHead>(std::move(weights), options);
}

} // namespace dspark
