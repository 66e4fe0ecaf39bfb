// The random numbers of one request: a counter-based stream keyed by the request's seed alone.
// Owns: Philox4x32-10 and the key layout. Knows no model, no batch, no neighbour.
// Threads: immutable but for skip(); free to share.
//
// Why the keys look the way they do. Every uniform must decide something at most once, given what
// led to the present state; otherwise later tokens are correlated with earlier decisions and the
// output is no longer distributed as the target's.
//
// - target_sample and residual are keyed by the position alone. A position is settled for good by
//   exactly one draw: an accepted draft, one residual draw, or one target (or bonus) draw. So neither is ever
//   read twice for different decisions. Under `exact` only target_sample is read, hence the text is a
//   function of (seed, prompt, model): speculation, draft length and batching cannot change it.
// - draft_sample and accept_test are keyed by (round, position). A position may be drafted, thrown away and
//   drafted again. `block` looks at all drafted tokens before it chooses how many to keep, and a scheduler that
//   learns from earlier rounds may have looked at their confidences: given that they were thrown away, their
//   uniforms are no longer uniform, so the next round must not see them. (Plain sequential rejection with
//   a fixed draft length would be safe with the position alone, since it stops before it looks at the later ones.)
//   The round is named by its anchor position `start`: each round commits at least one token, so `start` is
//   strictly increasing, no counter has to be carried, and a request that is preempted and resumed repeats itself.
#pragma once

#include <array>
#include <cstdint>

namespace dspark {

class RandomStream {
  public:
    explicit RandomStream(uint64_t seed) : seed_(seed) {}

    // All of these are in [0, 1). `position` is the absolute position of the token being decided,
    // `start` the absolute position of the round's anchor (position = start + 1 + slot).
    [[nodiscard]] double target_sample(uint64_t position) const { return uniform(Purpose::target_sample, position, 0); }
    [[nodiscard]] double residual(uint64_t position) const { return uniform(Purpose::residual, position, 0); }
    [[nodiscard]] double draft_sample(uint64_t start, uint64_t position) const {
        return uniform(Purpose::draft_sample, position, position - start);
    }
    [[nodiscard]] double accept_test(uint64_t start, uint64_t position) const {
        return uniform(Purpose::accept_test, position, position - start);
    }

    [[nodiscard]] uint64_t seed() const { return seed_; }
    // A context shift moves the text n positions to the front: what was drawn at a position is not drawn there again.
    void skip(uint64_t n) { n_skipped_ += n; }

    using Block = std::array<uint32_t, 4>;
    // Philox4x32 with 10 rounds (Salmon et al., SC'11): a bijection of the counter, so distinct counters
    // under one key never share a block.
    [[nodiscard]] static Block philox(Block counter, uint64_t key) {
        auto key_lo = static_cast<uint32_t>(key);
        auto key_hi = static_cast<uint32_t>(key >> 32);
        for (int round = 0; round < 10; ++round) {
            const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
            const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
            counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key_lo, static_cast<uint32_t>(b),
                       static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key_hi, static_cast<uint32_t>(a)};
            key_lo += 0x9E3779B9u;
            key_hi += 0xBB67AE85u;
        }
        return counter;
    }

  private:
    enum class Purpose : uint32_t { target_sample = 0, draft_sample = 1, accept_test = 2, residual = 3 };

    [[nodiscard]] double uniform(Purpose purpose, uint64_t position, uint64_t round_offset) const {
        const uint64_t place = position + n_skipped_;
        const Block block = philox({static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32),
                                    static_cast<uint32_t>(round_offset), static_cast<uint32_t>(purpose)},
                                   seed_);
        const uint64_t bits = (uint64_t{block[1]} << 32) | block[0];
        return static_cast<double>(bits >> 11) * 0x1.0p-53;
    }

    uint64_t seed_;
    uint64_t n_skipped_ = 0;
};

} // namespace dspark
