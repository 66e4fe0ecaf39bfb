// A probability distribution on tokens, and drawing from it.
// Must not know: logits, sampling options, drafts. Threads: plain values.
#pragma once

#include "vector_loops.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

namespace dspark {

// A normalized distribution on few or all tokens. `ids` ascend strictly, which makes the order deterministic, look-up a
// binary search, and the residual of two distributions one linear merge.
struct Distribution {
    std::vector<int32_t> ids;
    std::vector<float> probs;

    // 0 when absent.
    [[nodiscard]] float prob(int32_t id) const {
        // Ascending ids: ids[id] == id exactly when all smaller ids are present too, as without truncation.
        if (id >= 0 && static_cast<size_t>(id) < ids.size() && ids[static_cast<size_t>(id)] == id) {
            return probs[static_cast<size_t>(id)];
        }
        const auto it = std::lower_bound(ids.begin(), ids.end(), id);
        return it != ids.end() && *it == id ? probs[static_cast<size_t>(it - ids.begin())] : 0.0f;
    }
    [[nodiscard]] size_t size() const { return ids.size(); }
    void assign_single(int32_t id) { // all mass on one token
        ids.assign(1, id);
        probs.assign(1, 1.0f);
    }
};

// Inverse transform over the ascending ids; u in [0, 1). Never returns a token of probability 0.
[[nodiscard]] inline int32_t sample(const Distribution& distribution, double u) {
    const std::span<const float> probs = distribution.probs;
    double cumulative = 0.0;
    for (size_t begin = 0; begin < probs.size(); begin += kSumBlock) {
        const size_t n = std::min(kSumBlock, probs.size() - begin);
        const double block = sum_block(probs.data() + begin, n);
        double walked = cumulative;
        for (size_t i = begin; cumulative + block > u && i < begin + n; ++i) {
            walked += static_cast<double>(probs[i]);
            if (walked > u && probs[i] > 0.0f) {
                return distribution.ids[i];
            }
        }
        cumulative += block;
    }
    // Rounding left u above the sum: it belongs to the last token that can be drawn at all.
    const auto last = std::find_if(probs.rbegin(), probs.rend(), [](float p) { return p > 0.0f; });
    if (last == probs.rend()) {
        throw std::runtime_error("cannot sample a distribution: no token has a positive probability");
    }
    return distribution.ids[static_cast<size_t>(probs.rend() - last) - 1];
}

} // namespace dspark
