// The device's side of graph_head.h: Markov weights in device memory and one ggml graph per batch shape, which draws
// whole blocks. Owns: devices, weights, graphs. Must not know: requests, sampling options, distributions. Threads: one
// per thread. No type of ggml shows here.
#pragma once

#include "sequential_head.h"

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace dspark {

struct GraphHeadOptions;

// One batch as the host lays it out. A column is one slot of one request; columns lie slot by slot, so that the
// requests of a slot are neighbours. Entries of a column ascend in their target ids; unused ones hold U = -inf.
struct BlockColumns {
    size_t n_requests = 0;
    size_t n_slots = 0;
    std::vector<int32_t> anchors; // (n_requests,)
    std::vector<float> scales;    // (n_requests,) 1/T
    std::vector<float> uniforms;  // (n_columns,)
    std::vector<float> base;      // (n_columns, width) U after the soft-cap
    std::vector<int32_t> ids;     // (n_columns, width) target ids; empty when the whole vocabulary competes
    std::vector<int32_t> rows;    // ... and their rows of W2; read with a d2t only
    std::vector<float> hidden;    // (n_columns, hidden_size), for gated and rnn

    [[nodiscard]] size_t n_columns() const { return n_requests * n_slots; }
    [[nodiscard]] size_t column(size_t request, size_t slot) const { return slot * n_requests + request; }
};

// `width` entries compete per slot: candidates that the host chose, or the whole draft vocabulary in ascending target
// ids, padded.
class BlockGraphs {
  public:
    // Throws std::invalid_argument for an unknown device, ModelLoadError when it cannot hold the weights.
    BlockGraphs(const HeadWeights& weights, const GraphHeadOptions& options);
    ~BlockGraphs();
    BlockGraphs(const BlockGraphs&) = delete;
    BlockGraphs& operator=(const BlockGraphs&) = delete;

    // `tokens`: (n_columns,), `logits`: (n_columns, width) U + B. Throws DecodeError when the device fails.
    void compute(const BlockColumns& columns, std::vector<int32_t>& tokens, std::vector<float>& logits);

    [[nodiscard]] size_t width() const;
    [[nodiscard]] bool is_full() const;      // the whole draft vocabulary competes
    [[nodiscard]] bool reads_hidden() const; // gated and rnn
    // Target ids of the whole draft vocabulary in ascending order.
    [[nodiscard]] std::span<const int32_t> vocabulary() const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

// A table stored in one of ggml's types ("f32", "f16", "q8_0", ...), which the device then keeps where it can.
// Throws std::invalid_argument for an unknown type or a size that does not fit.
[[nodiscard]] RowTable make_row_table(const std::string& type_name, std::span<const std::byte> data, int64_t n_rows,
                                      int64_t n_cols);

} // namespace dspark
