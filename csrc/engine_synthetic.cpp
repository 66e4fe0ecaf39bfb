// The engine with accept events that are drawn, not found (synthetic_acceptance.h): every pass, every distribution and
// every sample is computed as ever, so that time is real; only how many drafts stand is not.
#include "engine.h"

#include <algorithm>

namespace dspark {

void Engine::set_synthetic_confidences() {
    for (size_t i = 0; i < tasks_.size(); ++i) {
        drafts_[i].confidence_logits.resize(drafts_[i].tokens.size());
        synthetic_->confidence_logits(tasks_[i].random.seed(), static_cast<uint64_t>(tasks_[i].start),
                                      drafts_[i].confidence_logits);
    }
}

VerifyResult Engine::decide_synthetically(const Lane& lane) {
    const Request& request = *lane.request;
    const auto start = static_cast<uint64_t>(request.anchor_position());
    VerifyResult result;
    result.n_accepted = synthetic_->n_accepted(request.random.seed(), start, lane.prefix_len);
    const bool is_greedy = request.options.sampling.is_greedy();
    // Block verification looks at every row before it decides, the other rules stop behind the first rejection.
    const bool reads_all = request.options.rule() == Verification::block;
    const int32_t last_row = reads_all ? lane.prefix_len : result.n_accepted;
    row_distributions_.resize(std::max(row_distributions_.size(), static_cast<size_t>(lane.prefix_len) + 1));
    n_pushed_ = 0;
    for (int32_t row = 0; row <= last_row; ++row) {
        push_drafted(lane, row);
        const int32_t token =
            is_greedy
                ? builder_.argmax_token(target_->logits(lane.first_row + row), request.options.sampling, request.counts)
                : sample(target_row(lane, row), request.random.target_sample(start + 1 + static_cast<uint64_t>(row)));
        result.next_token = row == result.n_accepted ? token : result.next_token;
    }
    push_drafted(lane, 0);
    return result;
}

} // namespace dspark
