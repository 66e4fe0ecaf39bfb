#include "prefix_cache.h"

#include <algorithm>

namespace dspark {

int32_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
    const size_t n = std::min(a.size(), b.size());
    const auto ends = std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin());
    return static_cast<int32_t>(ends.first - a.begin());
}

int32_t PrefixCache::take() {
    int32_t found = -1;
    for (int32_t sequence = 0; sequence < static_cast<int32_t>(holdings_.size()); ++sequence) {
        const Holding& holding = holdings_[static_cast<size_t>(sequence)];
        if (holding.is_free && (found < 0 || holding.used < holdings_[static_cast<size_t>(found)].used)) {
            found = sequence;
        }
    }
    if (found >= 0) {
        claim(found);
    }
    return found;
}

void PrefixCache::claim(int32_t sequence) { holdings_[static_cast<size_t>(sequence)] = {{}, 0, false}; }

void PrefixCache::put(int32_t sequence, std::vector<int32_t> tokens) {
    const uint64_t used = tokens.empty() ? 0 : ++clock_;
    holdings_[static_cast<size_t>(sequence)] = {std::move(tokens), used, true};
}

std::vector<int32_t> PrefixCache::idle() const {
    std::vector<int32_t> sequences;
    for (size_t i = 0; i < holdings_.size(); ++i) {
        if (!holdings_[i].tokens.empty()) {
            sequences.push_back(static_cast<int32_t>(i));
        }
    }
    return sequences;
}

} // namespace dspark
