// What the two halves of attention agree on: attention.cpp says which rows are computed together and over which cells,
// a file per instruction set computes them.
#pragma once

#include "kernels/attention.h"

#include <vector>

namespace dspark::kernels {

inline constexpr int64_t kRunRows = 16;     // of one key head: tokens times heads
inline constexpr int64_t kShareRows = 64;   // of all key heads that are computed together
inline constexpr int64_t kCellBlock = 8;    // cells whose scores are computed together
inline constexpr int64_t kValueBlock = 16;  // cells whose weighted values are summed up as floats; a multiple of those
inline constexpr uint16_t kHidden = 0xfc00; // -inf, as f16

// Neighbouring tokens that see nearly the same cells. A cell that one of them does not see is computed for it with the
// weight 0, which changes no bit.
struct AttentionRun {
    int64_t first_token = 0;
    int64_t n_tokens = 0;
    size_t n_cells = 0;         // that some token sees
    std::vector<int32_t> cells; // these, ascending; then the last one again up to a whole kValueBlock
};

// Heads [first, first + n) of a run: some of one key head, or all of several neighbouring ones.
struct AttentionHeads {
    int64_t first = 0;
    int64_t n = 0;
};

// What a key head's largest value was when the sequence that begins in this cell was last computed.
struct KnownLargest {
    const uint16_t* value = nullptr; // of that cell
    float largest = 0.0F;
};

inline constexpr size_t kKnown = 1U << 12U; // layers times key heads times sequences, or some of them

[[nodiscard]] inline size_t known_index(const uint16_t* value) {
    return static_cast<size_t>(reinterpret_cast<uintptr_t>(value) * 0x9e3779b97f4a7c15U >> 52U);
}

struct AttentionScratch {
    std::vector<float> scores;   // (rows, score_stride), then the weights
    std::vector<float> queries;  // (rows, key_size), in the order in which they are read
    std::vector<int32_t> sums;   // (rows, value_size)
    std::vector<float> largest;  // (key heads, cells): the largest magnitude of the values
    std::vector<uint16_t> zeros; // (value_size)
    std::vector<KnownLargest> known = std::vector<KnownLargest>(kKnown);
};

// An odd number of cache lines, or the rows' scores for one cell would meet in one set of the cache.
[[nodiscard]] constexpr int64_t score_stride(size_t n_cells) {
    return static_cast<int64_t>((n_cells / 16 | 1U) + 2) * 16;
}

using AttendRun = void (*)(const Attention&, const AttentionRun&, AttentionHeads, AttentionScratch&);

// nullptr: the processor lacks it. Each exists in builds for its architecture only.
[[nodiscard]] AttendRun find_attend_avx2();
[[nodiscard]] AttendRun find_attend_avx512();
[[nodiscard]] AttendRun find_attend_neon();

[[nodiscard]] std::vector<AttendRun> available_attends(); // on this processor, the best first

// What attend() does with the best one.
[[nodiscard]] bool attend_with(AttendRun attend_run, const Attention& attention);

} // namespace dspark::kernels
