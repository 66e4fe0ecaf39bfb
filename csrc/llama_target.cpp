#include "llama_target.h"

namespace dspark {

LlamaTarget::LlamaTarget(std::shared_ptr<Model> model, const ContextOptions& options)
    : context_(std::move(model), options) {}

bool LlamaTarget::is_end_of_generation(int32_t token) const { return context_.model().is_end_of_generation(token); }

// Waits for the pass, so that its time is the target's and not that of whoever reads the logits first.
void LlamaTarget::decode(std::span<const BatchRow> rows) {
    context_.decode_tokens(rows);
    context_.synchronize();
}

} // namespace dspark
