// Embeddings of texts: the states after a target's last layer, pooled over the text. Owns a context of its own, so that
// it never waits for the engine. Threads: one call at a time; a second one waits.
#pragma once

#include "llama_api.h"

#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

namespace dspark {

class Embedder {
  public:
    // n_ctx: most tokens of a text; 0: what the model was trained with, at most 8192.
    Embedder(std::shared_ptr<Model> model, int32_t n_ctx, int32_t n_threads);

    // The pooled state (n_embd,), not normalised. Throws std::invalid_argument, ContextFullError, DecodeError.
    [[nodiscard]] std::vector<float> embed(std::span<const int32_t> tokens);
    [[nodiscard]] int32_t n_ctx() const { return n_ctx_; }
    [[nodiscard]] const std::string& pooling() const { return pooling_; } // mean | cls | last

  private:
    void check(std::span<const int32_t> tokens) const;
    void add(std::vector<double>& pooled, int32_t row, size_t position, size_t n_tokens);

    int32_t n_ctx_;
    std::string pooling_;
    Context context_;
    std::mutex mutex_;
};

} // namespace dspark
