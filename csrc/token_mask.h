// What a request's text must obey beyond its sampler: a grammar, say. The engine asks which tokens may come next and
// tells which ones came. Must not know: logits, drafts, where the rules come from. Threads: the engine's alone.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace dspark {

class TokenMask {
  public:
    virtual ~TokenMask() = default;

    // An independent mask in the same state; a request takes its own.
    [[nodiscard]] virtual std::unique_ptr<TokenMask> clone() const = 0;
    // is_allowed[i] = 1 where ids[i] may come next, else 0. Both (n,).
    virtual void check(std::span<const int32_t> ids, std::span<uint8_t> is_allowed) const = 0;

    // Goes on by a token that check() allows, while drafts are verified; pop() takes the last one back.
    virtual void push(int32_t token) = 0;
    virtual void pop() = 0;
    // Goes on for good; only with nothing pushed.
    virtual void commit(int32_t token) = 0;
};

} // namespace dspark
