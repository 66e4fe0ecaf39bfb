// The sequential head as one ggml graph on the drafter's own device, batched over requests: the third form behind
// SequentialHead. Owns: the layout of a batch, the candidate restriction, the draft distribution; block_graph.h has the
// device. Must not know: ggml, KV caches, verification. Threads: one head per thread.
#pragma once

#include "sequential_head.h"

#include <cstdint>
#include <memory>
#include <string>

namespace dspark {

struct GraphHeadOptions {
    std::string device;                        // DeviceInfo::name, e.g. CUDA0; empty: the CPU
    int32_t n_threads = 1;                     // of the CPU backend; more rarely pay for a graph this small
    int32_t n_candidates = kDefaultCandidates; // 0, or the draft vocabulary's size and more: all of it competes
    int32_t max_requests = 1;                  // larger batches run as several graphs
};

// Draws by inverse transform with the uniforms that the other heads use, so it drafts what they draft, ties in rounding
// aside. Three deviations, all of them lossless because p^d is what the token was drawn from:
// - of Truncation only the temperature applies: no top_k, top_p, min_p;
// - bias and penalties (BlockInput::sampling) are ignored: only acceptance can suffer;
// - the device draws from its float softmax, p^d comes from the logits it returned: they differ by rounding (1e-6).
// BlockInput::candidates may hold at most n_candidates per slot, and none when the whole vocabulary competes. A trace
// has no `state`. Confidence logits come from the host: all they need, h and the token before, lies there anyway. A
// head of type `none` has no chain to compute and is one of the other two.
//
// Throws std::invalid_argument for weights, devices or options that do not fit, ModelLoadError when the device cannot
// hold the weights; draft_blocks() also throws DecodeError when the device fails. `weights` must outlive the head.
[[nodiscard]] std::unique_ptr<SequentialHead> make_graph_head(HeadWeights weights, const GraphHeadOptions& options);

} // namespace dspark
