// The light sequential head: draws the tokens of a block one after the other, each conditioned on the one before (paper
// eq. 4-6). Owns: the Markov weights' views, the candidate restriction, the draft distribution. Must not know: ggml, KV
// caches, verification. Threads: one head per thread (it holds buffers); the weights it views must outlive it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "confidence_head.h"
#include "random.h"
#include "sampling.h"

namespace dspark {

// A matrix in any storage type, read one row at a time; `decode_row` comes from whoever knows the type.
struct RowTable {
    const std::byte* data = nullptr;
    size_t row_bytes = 0;
    int64_t n_rows = 0;
    int64_t n_cols = 0;
    void (*decode_row)(const void* src, float* dst, int64_t n) = nullptr;
    // Row times vector without a decoded copy, where the type has such a form; the same bits as decode and dot.
    float (*dot_row)(const void* src, const float* x, int64_t n) = nullptr;
    // Rows from `rows` on times vectors, y[v * n_rows + i] = rows[i] . x[v]; far faster for many rows, where the type
    // has such a form, and rounded otherwise. False: not computed.
    bool (*dot_rows)(const RowTable& table, const std::byte* rows, int64_t n_rows, const float* x, int64_t n_vectors,
                     float* y) = nullptr;

    [[nodiscard]] const std::byte* row(int64_t i) const { return data + static_cast<size_t>(i) * row_bytes; }
    void decode(int64_t row, float* dst) const { decode_row(this->row(row), dst, n_cols); }
    // Rows are few and far apart: without this each waits for memory on its own.
    void prefetch(int64_t i) const {
        for (size_t at = 0; at < row_bytes; at += 64) {
            __builtin_prefetch(row(i) + at);
        }
    }
    // Into the L2 cache.
    void prefetch_early(int64_t i) const {
        for (size_t at = 0; at < row_bytes; at += 64) {
            __builtin_prefetch(row(i) + at, 0, 2);
        }
    }
    // Rows lie in pages of their own, and finding a page takes longer than reading a line: all of them at once.
    void prefetch_page(int64_t i) const { __builtin_prefetch(row(i)); }
};

enum class MarkovHeadType { none, vanilla, gated, rnn };

struct HeadWeights {
    MarkovHeadType type = MarkovHeadType::none;
    int64_t n_vocab = 0;           // of the target, and the width of base_logits
    int64_t hidden_size = 0;       // d
    int64_t rank = 0;              // r; 0 without a Markov head
    RowTable w1;                   // (n_vocab, r), read by target id
    RowTable w2;                   // (n_vocab_draft, r), read by draft row
    RowTable gate;                 // gated: (r, d + r), input [h; e]
    std::vector<float> gate_bias;  // (r,), or empty
    RowTable joint;                // rnn: (3r, 2r + d), input [s; e; h], output [g'; c'; o']
    std::vector<float> joint_bias; // (3r,), or empty
    // Draft row -> target id, strictly one to one; empty when both vocabularies are the same. With a map, base_logits
    // are still n_vocab wide and hold -inf where no draft row exists.
    std::vector<int64_t> d2t;
    float logit_softcap = 0.0f; // 0 = off; else U becomes cap * tanh(U / cap) before B is added (Gemma 4)
    std::optional<ConfidenceHead> confidence;
};

// One request's block. Only pointers: nothing is copied, everything must live until draft_blocks() returns.
struct BlockInput {
    // U: n_slots pointers to rows of n_vocab. May be fewer slots than the trained block (a prefix of it).
    std::span<const float* const> base_logits;
    // In place of base_logits where the device already selected: per slot the ids and their U (before soft-cap), any
    // order, ids distinct. Only CandidateSequentialHead takes it.
    std::span<const Candidates> candidates;
    // Beside base_logits, where the pass has searched its rows: per slot the n_searched() largest U, as
    // TopSearch::top() gives them.
    std::span<const std::span<const Ranked>> largest;
    std::span<const float* const> hidden; // h: n_slots pointers to rows of hidden_size
    int32_t anchor = 0;                   // x_0
    uint64_t start = 0;                   // absolute position of the anchor; slot k predicts start + 1 + k
    Truncation truncation;                // temperature 0: greedy, also the best choice under `exact`
    RandomStream random{0};
    // Optional: lets the draft follow the request's logit bias and penalties (acceptance only, never correctness).
    // Drafted tokens are pushed while the block is drafted and popped before return.
    const SamplingOptions* sampling = nullptr;
    TokenCounts* counts = nullptr;
};

// What a slot looked like inside; filled only on request, for tests.
struct SlotTrace {
    std::vector<int32_t> ids;           // candidates, or all tokens of the draft vocabulary
    std::vector<float> base_logits;     // U after the soft-cap
    std::vector<float> transition_bias; // B
    std::vector<float> embedding;       // e (r,)
    std::vector<float> state;           // the vector W2 is applied to (r,)
};

// Buffers keep their capacity from round to round: reuse the object.
struct BlockDraft {
    std::vector<int32_t> tokens;             // (n_slots,)
    std::vector<Distribution> probs;         // (n_slots,) p^d: exactly what tokens[k] was drawn from
    std::vector<float> confidence_logits;    // (n_slots,), empty without a confidence head
    std::vector<SlotTrace>* trace = nullptr; // resized to n_slots when set
};

class SequentialHead {
  public:
    virtual ~SequentialHead() = default;
    // Drafts for several requests at once; inputs and drafts pair up. Throws std::invalid_argument for a token, count
    // or width out of range, std::runtime_error for NaN logits or a slot without a finite logit.
    virtual void draft_blocks(std::span<const BlockInput> inputs, std::span<BlockDraft> drafts) = 0;
    // How many of a row's largest U BlockInput::largest must hold (or all, where there are fewer); 0: not looked at.
    [[nodiscard]] virtual int32_t n_searched() const { return 0; }
};

// Throws std::invalid_argument, naming the tensor, when shapes do not fit together.
void validate_weights(const HeadWeights& weights);

// The reference: B over the whole draft vocabulary. Reads all of W2 once per slot.
[[nodiscard]] std::unique_ptr<SequentialHead> make_full_head(HeadWeights weights);

// The default: only some tokens of each slot compete, and that many rows of W2 are read. They are the n_candidates
// largest U and, for a vanilla head, the n_followers largest B after the token before (four times the candidates while
// those are not known yet). U alone misses tokens that only the Markov bias lifts: on the demo pair (T = 0) 64 of U
// cost 3.8 % of accepted length, 256 cost 0.8 %, 64 of U and 16 of B nothing. Other heads' B depends on the slot: U
// alone.
inline constexpr int32_t kDefaultCandidates = 256; // without followers
inline constexpr int32_t kDefaultFollowers = 16;
[[nodiscard]] std::unique_ptr<SequentialHead>
make_candidate_head(HeadWeights weights, int32_t n_candidates = kDefaultCandidates, int32_t n_followers = 0);

} // namespace dspark
