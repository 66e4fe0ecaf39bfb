// The real target: a llama.cpp context with a unified KV cache, its layers tapped for a drafter. Engine thread only.
#pragma once

#include "llama_api.h"
#include "target.h"

#include <memory>

namespace dspark {

class LlamaTarget final : public Target {
  public:
    LlamaTarget(std::shared_ptr<Model> model, const ContextOptions& options);

    [[nodiscard]] int32_t n_vocab() const override { return context_.model().n_vocab(); }
    [[nodiscard]] bool is_end_of_generation(int32_t token) const override;
    void decode(std::span<const BatchRow> rows) override;
    [[nodiscard]] std::span<const float> logits(int32_t row) override { return context_.logits(row); }
    void remove(int32_t sequence, int32_t begin) override { context_.remove(sequence, begin, -1); }
    [[nodiscard]] int32_t max_rollback() const override { return context_.max_rollback(); }
    [[nodiscard]] int32_t last_position(int32_t sequence) const override { return context_.last_position(sequence); }

    [[nodiscard]] bool can_share() const override { return context_.can_share(); }
    void copy(int32_t from, int32_t to, int32_t begin, int32_t end) override { context_.copy(from, to, begin, end); }
    [[nodiscard]] bool can_shift() const override { return context_.can_shift(); }
    void shift(int32_t sequence, int32_t begin, int32_t n) override { context_.shift(sequence, begin, n); }

    [[nodiscard]] Context& context() { return context_; }

  private:
    Context context_;
};

} // namespace dspark
