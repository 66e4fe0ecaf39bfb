// Which sequence holds which tokens. Sequences of finished requests stay idle, with their cells in both caches, until a
// later prompt begins alike or the room is needed. Pure: whoever calls moves the cells. Threads: the engine's alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

[[nodiscard]] int32_t common_prefix(std::span<const int32_t> a, std::span<const int32_t> b);

class PrefixCache {
  public:
    explicit PrefixCache(int32_t n_sequences) : holdings_(static_cast<size_t>(n_sequences)) {}

    // A sequence without tokens, else the idle one used longest ago; -1: none. It is the caller's then, and may still
    // have cells.
    [[nodiscard]] int32_t take();
    // Gives the idle sequence itself to the caller, tokens and all.
    void claim(int32_t sequence);
    // Gives a sequence back, holding `tokens` in its cells; empty: nothing that anyone could use.
    void put(int32_t sequence, std::vector<int32_t> tokens);
    void touch(int32_t sequence) { holdings_[static_cast<size_t>(sequence)].used = ++clock_; }

    [[nodiscard]] std::vector<int32_t> idle() const; // free ones that hold tokens
    [[nodiscard]] std::span<const int32_t> tokens(int32_t sequence) const {
        return holdings_[static_cast<size_t>(sequence)].tokens;
    }

  private:
    struct Holding {
        std::vector<int32_t> tokens; // of a free one
        uint64_t used = 0;           // 0: holds nothing
        bool is_free = true;
    };

    std::vector<Holding> holdings_;
    uint64_t clock_ = 0;
};

} // namespace dspark
