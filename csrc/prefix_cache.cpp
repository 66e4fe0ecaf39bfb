#include "prefix_cache.h"

#include <algorithm>

namespace dspark {

int32_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b) {
    const size_t n = std::min(a.size(), b.size());
    const auto ends = std::mismatch(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin());
    return static_cast<int32_t>(ends.first - a.begin());
}

PrefixCache::PrefixCache(int32_t n_sequences) : holdings_(static_cast<size_t>(n_sequences)) {
    for (int32_t sequence = n_sequences - 1; sequence >= 0; --sequence) {
        empty_.push_back(sequence);
    }
}

int32_t PrefixCache::take() {
    if (!empty_.empty()) {
        const int32_t sequence = empty_.back();
        empty_.pop_back();
        return sequence;
    }
    const int32_t sequence = oldest();
    if (sequence >= 0) {
        claim(sequence);
    }
    return sequence;
}

void PrefixCache::claim(int32_t sequence) { holdings_[static_cast<size_t>(sequence)].tokens.clear(); }

void PrefixCache::put(int32_t sequence, std::vector<int32_t> tokens) {
    if (tokens.empty()) {
        empty_.push_back(sequence);
    }
    holdings_[static_cast<size_t>(sequence)] = {std::move(tokens), ++clock_};
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

int32_t PrefixCache::oldest() const {
    int32_t found = -1;
    for (const int32_t sequence : idle()) {
        const bool is_older =
            found < 0 || holdings_[static_cast<size_t>(sequence)].used < holdings_[static_cast<size_t>(found)].used;
        found = is_older ? sequence : found;
    }
    return found;
}

} // namespace dspark
