#include "round_decider.h"

#include <algorithm>

namespace dspark {

bool RoundDecider::needs_argmax_only(const Request& request) {
    const SamplingOptions& sampling = request.options.sampling;
    return !request.mask && request.options.rule() == Verification::exact && sampling.is_greedy() &&
           !sampling.changes_logits();
}

int32_t RoundDecider::argmax(std::span<const float> logits) { return builder_.argmax_token(logits, {}, TokenCounts()); }

VerifyResult RoundDecider::decide(const DecidedRows& rows, const SyntheticAcceptance* synthetic) {
    rows_ = rows;
    n_pushed_ = 0;
    distributions_.resize(std::max(distributions_.size(), rows.logits.size()));
    const Request& request = *rows.request;
    VerifyResult result;
    if (synthetic != nullptr) {
        result = decide_synthetically(*synthetic);
    } else if (request.mask) {
        result = verify_exact(rows.drafted, [this](int32_t row) { return masked_token(row); });
    } else if (request.options.rule() == Verification::exact && request.options.sampling.is_greedy()) {
        result = verify_exact(rows.drafted, [this](int32_t row) { return likeliest_token(row); });
    } else {
        VerifyInput input;
        input.draft_tokens = rows.drafted;
        input.draft_probs = rows.draft_probs;
        input.start = static_cast<uint64_t>(request.anchor_position());
        input.random = request.random;
        result = verify(request.options.rule(), input,
                        [this](int32_t row) -> const Distribution& { return distribution(row); });
    }
    push_drafted(0);
    return result;
}

VerifyResult RoundDecider::decide_synthetically(const SyntheticAcceptance& synthetic) {
    const Request& request = *rows_.request;
    const auto start = static_cast<uint64_t>(request.anchor_position());
    const auto prefix_len = static_cast<int32_t>(rows_.drafted.size());
    VerifyResult result;
    result.n_accepted = synthetic.n_accepted(request.random.seed(), start, prefix_len);
    // Block verification looks at every row before it decides, the other rules stop behind the first rejection.
    const bool reads_all = request.options.rule() == Verification::block;
    const int32_t last_row = reads_all ? prefix_len : result.n_accepted;
    for (int32_t row = 0; row <= last_row; ++row) {
        const int32_t token =
            request.options.sampling.is_greedy()
                ? likeliest_token(row)
                : sample(distribution(row), request.random.target_sample(start + 1 + static_cast<uint64_t>(row)));
        result.next_token = row == result.n_accepted ? token : result.next_token;
    }
    return result;
}

int32_t RoundDecider::likeliest_token(int32_t row) {
    const auto index = static_cast<size_t>(row);
    if (index < rows_.likeliest.size() && rows_.likeliest[index] >= 0) {
        return rows_.likeliest[index];
    }
    push_drafted(row);
    return builder_.argmax_token(logits(row), rows_.request->options.sampling, rows_.request->counts);
}

int32_t RoundDecider::masked_token(int32_t row) {
    push_drafted(row);
    const Request& request = *rows_.request;
    const auto position = static_cast<uint64_t>(request.anchor_position() + 1 + row);
    return masked_sampler_.draw({logits(row), &request.options.sampling, &request.counts, request.mask.get(),
                                 request.random.target_sample(position), request.random.residual(position)},
                                builder_);
}

const Distribution& RoundDecider::distribution(int32_t row) {
    push_drafted(row);
    Distribution& distribution = distributions_[static_cast<size_t>(row)];
    builder_.target_distribution(logits(row), rows_.request->options.sampling, rows_.request->counts, distribution);
    return distribution;
}

// Penalties and mask at row j see the j drafted tokens before it: makes exactly n of them part of both.
void RoundDecider::push_drafted(int32_t n) {
    TokenCounts& counts = rows_.request->counts;
    TokenMask* mask = rows_.request->mask.get();
    for (; n_pushed_ < n; ++n_pushed_) {
        const int32_t token = rows_.drafted[static_cast<size_t>(n_pushed_)];
        counts.push_output(token);
        if (mask != nullptr) {
            mask->push(token);
        }
    }
    for (; n_pushed_ > n; --n_pushed_) {
        counts.pop_output(rows_.drafted[static_cast<size_t>(n_pushed_ - 1)]);
        if (mask != nullptr) {
            mask->pop();
        }
    }
}

} // namespace dspark
