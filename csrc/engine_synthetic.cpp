// The engine with accept events that are drawn, not found (synthetic_acceptance.h): every pass, every distribution and
// every sample is computed as ever, so that time is real; only how many drafts stand is not.
#include "engine.h"

namespace dspark {

void Engine::set_synthetic_confidences() {
    for (size_t i = 0; i < tasks_.size(); ++i) {
        drafts_[i].confidence_logits.resize(drafts_[i].tokens.size());
        synthetic_->confidence_logits(tasks_[i].random.seed(), static_cast<uint64_t>(tasks_[i].start),
                                      drafts_[i].confidence_logits);
    }
}

} // namespace dspark
