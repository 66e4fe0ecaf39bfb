// Softmax attention over a cache of f16 keys and values that many sequences share, on the CPU. Pure: knows neither
// ggml nor Python. Every thread of a pass calls attend() with its own `thread`; no locks, no barriers.
//
// A row of Y has the same bits whatever else is in the batch, in the cache, in whatever cells its sequence lies and
// whatever the number of threads: the largest score does not depend on an order, and the sums after it are taken in
// integers. ggml's own choose between three orders of float sums by the size of the batch and of the cache, so that a
// prompt in chunks or a request beside others gives other logits, and other greedy text where two are near.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dspark::kernels {

struct Attention {
    int64_t n_tokens = 0;
    int64_t n_heads = 0;
    int64_t n_kv_heads = 0; // divides n_heads
    int64_t n_cells = 0;
    int64_t key_size = 0; // of a head; multiples of 8
    int64_t value_size = 0;
    float scale = 1.0F;
    const float* q = nullptr;
    int64_t q_token_stride = 0; // floats
    int64_t q_head_stride = 0;
    const void* k = nullptr;  // f16
    size_t k_cell_stride = 0; // bytes
    size_t k_head_stride = 0;
    const void* v = nullptr; // f16
    size_t v_cell_stride = 0;
    size_t v_head_stride = 0;
    const uint16_t* mask = nullptr; // f16, a row of n_cells per token: added to the scores; -inf hides the cell
    int64_t mask_stride = 0;        // elements
    float* y = nullptr;             // (n_tokens, n_heads, value_size)
    int thread = 0;
    int n_threads = 1;
};

// Computes this thread's share. False (nothing written): not covered on this machine.
[[nodiscard]] bool attend(const Attention& attention);

[[nodiscard]] bool can_attend(); // on this machine

} // namespace dspark::kernels
