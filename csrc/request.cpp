#include "request.h"

#include <stdexcept>

namespace dspark {

namespace {

void require(bool holds, const std::string& message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

} // namespace

const char* finish_reason_name(FinishReason reason) {
    switch (reason) {
    case FinishReason::none:
        return "none";
    case FinishReason::stop:
        return "stop";
    case FinishReason::length:
        return "length";
    case FinishReason::context_full:
        return "context_full";
    case FinishReason::cancelled:
        return "cancelled";
    case FinishReason::error:
        return "error";
    }
    return "none";
}

void RequestOptions::validate() const {
    sampling.validate();
    require(max_tokens >= 1, "max_tokens must be at least 1, got " + std::to_string(max_tokens));
    require(n_logprobs >= -1 && n_logprobs <= 1000,
            "n_logprobs must be between -1 and 1000, got " + std::to_string(n_logprobs));
    require(mask == nullptr || !verification || *verification == Verification::exact,
            "verification must be auto or exact with a grammar");
    require(n_keep >= -1, "n_keep must be -1 or more, got " + std::to_string(n_keep));
    require(draft_limit >= -1, "draft_limit must be -1 or more, got " + std::to_string(draft_limit));
}

Verification RequestOptions::rule() const {
    if (verification) {
        return *verification;
    }
    return sampling.is_greedy() || mask != nullptr ? Verification::exact : Verification::block;
}

Request::Request(uint64_t request_id, std::vector<int32_t> prompt, RequestOptions request_options)
    : id(request_id), options(std::move(request_options)), tokens(std::move(prompt)),
      n_prompt(static_cast<int32_t>(tokens.size())), counts(options.sampling.penalty_window),
      random(options.sampling.seed), mask(options.mask ? options.mask->clone() : nullptr) {
    stats.n_prompt = n_prompt;
    for (const int32_t token : tokens) {
        counts.push_prompt(token);
    }
}

// One token at least is forgotten, and the newest stays: it is the anchor.
int32_t Request::n_kept(int32_t n_ctx) const {
    return std::min({options.n_keep < 0 ? n_prompt : options.n_keep, n_prompt, n_ctx - 2});
}

void Request::discard(int32_t begin, int32_t n) {
    tokens.erase(tokens.begin() + begin, tokens.begin() + begin + n);
    n_cached -= n;
    n_unshifted = std::min(n_unshifted, begin);
    stats.n_discarded += n;
    random.skip(static_cast<uint64_t>(n));
}

} // namespace dspark
