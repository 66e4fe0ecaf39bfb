// The largest of a row of logits, exactly, in one pass over it: maxima of groups bound what can be among them, and few
// groups are looked at again. Owns: the search and its buffers. Must not know: what is done with what it finds.
// Threads: one TopSearch per thread; top_rows() shares rows among threads that call it with their own `part`.
#pragma once

#include "vector_loops.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

struct Ranked {
    float weight; // a logit, or exp of one
    int32_t id;
};
// The larger first, of equal ones the lower id.
[[nodiscard]] inline bool ranks_before(const Ranked& a, const Ranked& b) {
    return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

class TopSearch {
  public:
    // Looks at a row, which the calls that follow are about and which must live until then. False: it holds NaN or
    // +inf, or nothing finite.
    [[nodiscard]] bool scan(std::span<const float> row);
    [[nodiscard]] float largest() const { return largest_; }
    // One for each kMaxGroup neighbours.
    [[nodiscard]] std::span<const float> group_maxima() const { return maxima_; }

    // All values >= threshold above -inf, by ascending id.
    std::span<const Ranked> at_least(float threshold);
    // The k largest above -inf, of equal ones those with the lowest ids, by ascending id; fewer if fewer exist.
    std::span<const Ranked> top(int32_t k);

  private:
    void find_bounds(size_t k);

    std::span<const float> row_;
    float largest_ = 0.0f;
    std::vector<float> maxima_;
    std::vector<float> bounds_; // of which the k-th largest is looked for
    std::vector<int32_t> keys_; // scratch of kth_largest
    std::vector<Ranked> found_;
};

// Of `entries`, by ascending id, the k that TopSearch::top() would leave, in place and in order.
void keep_top(std::vector<Ranked>& entries, size_t k, std::vector<float>& weights, std::vector<int32_t>& keys);

// Rows of logits, and where what TopSearch::top() gives for each is left: k + 1 entries a row, of which the first one's
// id says how many follow; -1: scan() refuses the row.
struct TopRows {
    const float* rows = nullptr;
    int64_t row_stride = 0;
    int64_t n_rows = 0;
    int64_t n_values = 0;
    int32_t k = 0;
    const int64_t* names = nullptr; // ascending ids of a row's values; null: their places
    Ranked* out = nullptr;
};
// Rows part, part + n_parts, ...: the same results for any n_parts. Never throws.
void top_rows(const TopRows& rows, int part, int n_parts);

} // namespace dspark
