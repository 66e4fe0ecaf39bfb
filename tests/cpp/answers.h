// What an engine's tests gather from its steps, and the options that they share.
#pragma once

#include "engine.h"

#include <map>
#include <string>
#include <vector>

namespace toy {

using Tokens = std::vector<int32_t>;

struct Answer {
    Tokens tokens;
    dspark::FinishReason reason = dspark::FinishReason::none;
    std::string error;
    dspark::RequestStats stats;
};

using Answers = std::map<uint64_t, Answer>; // by request

// Takes one step and adds its events to the answers.
inline void step(dspark::Engine& engine, Answers& answers) {
    for (const dspark::Event& event : engine.step()) {
        Answer& answer = answers[event.request_id];
        answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
        answer.reason = event.finish_reason;
        answer.error = event.error;
        answer.stats = event.stats;
    }
}

inline dspark::RequestOptions greedy(int32_t max_tokens) {
    dspark::RequestOptions options;
    options.sampling.temperature = 0;
    options.max_tokens = max_tokens;
    options.ignore_eos = true;
    return options;
}

} // namespace toy
