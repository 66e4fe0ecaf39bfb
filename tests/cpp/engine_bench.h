// An engine on toy models with any drafter, its invariants checked after every step.
#pragma once

#include "answers.h"
#include "check.h"
#include "engine.h"
#include "scripted_drafter.h"
#include "toy_models.h"

#include <memory>
#include <set>
#include <vector>

namespace toy {

inline std::shared_ptr<dspark::WorkerPool> workers; // of engines made from now on; null: none

struct Bench {
    std::unique_ptr<dspark::Engine> engine;
    Target* target = nullptr;
    dspark::Drafter* drafter = nullptr;
    bool never_drafts = false;
    std::set<uint64_t> plain; // requests that never draft: the drafter holds nothing of them
};

inline Bench make_bench(std::unique_ptr<dspark::Drafter> drafter, int32_t draft_length,
                        dspark::EngineOptions options = {}, float end_logit = 0.0F) {
    Bench bench;
    auto target = std::make_unique<Target>(end_logit);
    bench.target = target.get();
    bench.drafter = drafter.get();
    bench.never_drafts = draft_length == 0;
    dspark::SchedulerOptions scheduler;
    scheduler.policy = {draft_length > 0 ? dspark::Policy::Kind::fixed : dspark::Policy::Kind::off, draft_length, 0};
    scheduler.block_size = drafter ? drafter->block_size() : 0;
    bench.engine = std::make_unique<dspark::Engine>(std::move(target), std::move(drafter),
                                                    std::make_unique<dspark::Scheduler>(scheduler), options, workers);
    return bench;
}

// Steps to the end; after each step both caches must hold the committed rows and nothing else.
inline Answers run(Bench& bench) {
    Answers answers;
    while (bench.engine->has_work()) {
        step(*bench.engine, answers);
        for (const dspark::CachePosition& position : bench.engine->cache_positions()) {
            const bool is_plain = bench.never_drafts || bench.plain.contains(position.request_id);
            CHECK(position.draft == (bench.drafter == nullptr || is_plain ? -1 : position.target));
        }
    }
    return answers;
}

inline std::vector<std::vector<int32_t>> ragged_prompts() {
    return {{1}, {2, 3, 4}, {5, 5, 5, 5, 5, 5, 5, 5, 5}, {6, 1, 0, 3}, {3, 2}, {0, 0, 1, 2, 4, 6}};
}

inline std::vector<std::vector<int32_t>> plain_texts(const dspark::RequestOptions& options, float end_logit = 0.0F) {
    std::vector<std::vector<int32_t>> texts;
    for (const auto& prompt : ragged_prompts()) {
        Bench bench = make_bench(nullptr, 0, {}, end_logit);
        const uint64_t id = bench.engine->submit(prompt, options);
        texts.push_back(run(bench)[id].tokens);
    }
    return texts;
}

inline std::vector<std::vector<int32_t>> batched_texts(Bench& bench, const dspark::RequestOptions& options) {
    std::vector<uint64_t> ids;
    for (const auto& prompt : ragged_prompts()) {
        ids.push_back(bench.engine->submit(prompt, options));
    }
    auto answers = run(bench);
    std::vector<std::vector<int32_t>> texts;
    for (const uint64_t id : ids) {
        texts.push_back(answers[id].tokens);
    }
    return texts;
}

} // namespace toy
