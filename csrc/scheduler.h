// How many drafted tokens of each request are verified this step. Owns: the policies. Must not know: models, caches,
// time. Threads: the engine's alone.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace dspark {

// One request that could speculate in this step.
struct Proposal {
    uint64_t request_id = 0;
    int32_t most = 0;                         // longest prefix its limits allow: block, max_tokens, context, option
    std::span<const float> confidence_logits; // (n_slots), empty before drafting or without a confidence head
};

class Scheduler {
  public:
    virtual ~Scheduler() = default;
    // False: no request will ever draft, so nothing has to be kept for it.
    [[nodiscard]] virtual bool can_draft() const { return true; }
    // Before drafting: which requests are worth a draft at all; fills is_drafting with 0 or 1.
    virtual void select(std::span<const Proposal> proposals, std::span<int8_t> is_drafting) = 0;
    // After drafting: prefix_len[i] in 0 .. proposals[i].most for the requests that drafted.
    virtual void schedule(std::span<const Proposal> proposals, std::span<int32_t> prefix_len) = 0;
};

// Verifies the first `length` drafted tokens of every request; 0: never drafts. It looks at no drafted token and at no
// confidence, so it is lossless under every verification rule.
class FixedScheduler final : public Scheduler {
  public:
    explicit FixedScheduler(int32_t length);
    [[nodiscard]] bool can_draft() const override { return length_ > 0; }
    void select(std::span<const Proposal> proposals, std::span<int8_t> is_drafting) override;
    void schedule(std::span<const Proposal> proposals, std::span<int32_t> prefix_len) override;

  private:
    int32_t length_;
};

} // namespace dspark
