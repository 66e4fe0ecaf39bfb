// Context shifts on toy models. The toy target's logits depend on the last two tokens alone, so a text whose context is
// shifted must be the text of a context large enough to need no shift: greedy, and sampled too, since random numbers go
// on counting.
#include "answers.h"
#include "check.h"
#include "engine.h"
#include "feature_queue.h"
#include "toy_models.h"

#include <map>
#include <memory>
#include <stdexcept>

using namespace dspark;

namespace {

using toy::Tokens;

struct Bench {
    std::unique_ptr<Engine> engine;
    toy::Target* target = nullptr;
    toy::Answers answers;
    std::map<uint64_t, int32_t> n_prompt;
    bool has_drafter = false;

    uint64_t submit(const Tokens& prompt, const RequestOptions& options) {
        const uint64_t id = engine->submit(prompt, options);
        n_prompt[id] = static_cast<int32_t>(prompt.size());
        return id;
    }

    // Both caches end right before the anchor, in front of which shifts have taken tokens out.
    void step() {
        toy::step(*engine, answers);
        for (const CachePosition& position : engine->cache_positions()) {
            CHECK(position.target < engine->options().n_ctx - 1);
            CHECK(position.draft == (has_drafter ? position.target : -1));
        }
    }

    void run() {
        while (engine->has_work()) {
            step();
        }
    }
};

Bench make_bench(int32_t n_ctx, bool has_drafter, int32_t n_parallel = 2) {
    EngineOptions options;
    options.n_ctx = n_ctx;
    options.n_parallel = n_parallel;
    SchedulerOptions scheduler;
    scheduler.policy = {Policy::Kind::fixed, 5, 0};
    scheduler.block_size = has_drafter ? 5 : 0;
    auto target = std::make_unique<toy::Target>();
    Bench bench;
    bench.target = target.get();
    bench.has_drafter = has_drafter;
    bench.engine =
        std::make_unique<Engine>(std::move(target), has_drafter ? std::make_unique<toy::Drafter>(5) : nullptr,
                                 std::make_unique<Scheduler>(scheduler), options);
    return bench;
}

RequestOptions shifting(int32_t n_keep, double temperature) {
    RequestOptions options;
    options.sampling.temperature = static_cast<float>(temperature);
    options.sampling.seed = 11;
    options.verification = Verification::exact;
    options.max_tokens = 300;
    options.ignore_eos = true;
    options.context_shift = true;
    options.n_keep = n_keep;
    return options;
}

void test_text_goes_on_as_if_the_context_were_larger() {
    const std::vector<Tokens> prompts = {{1, 2, 3, 4, 5, 6}, {3, 1}};
    for (const bool has_drafter : {false, true}) {
        for (const double temperature : {0.0, 1.0}) {
            for (const int32_t n_keep : {0, 2, -1, 1000}) {
                Bench large = make_bench(512, has_drafter);
                Bench small = make_bench(32, has_drafter);
                for (const Tokens& prompt : prompts) {
                    (void)large.submit(prompt, shifting(n_keep, temperature));
                    (void)small.submit(prompt, shifting(n_keep, temperature));
                }
                large.run();
                small.run();
                for (const auto& [id, answer] : small.answers) {
                    CHECK(answer.reason == FinishReason::length);
                    CHECK(answer.tokens == large.answers[id].tokens);
                    CHECK(answer.stats.n_discarded > 200);
                    CHECK(large.answers[id].stats.n_discarded == 0);
                    CHECK((answer.stats.n_drafted > 0) == has_drafter);
                }
            }
        }
    }
}

void test_kept_tokens_stay() {
    Bench bench = make_bench(16, true, 1);
    const Tokens prompt = {1, 2, 3, 4};
    (void)bench.submit(prompt, shifting(3, 0));
    for (int32_t i = 0; i < 60; ++i) {
        bench.step();
        const Tokens& cells = bench.target->cells(0);
        CHECK((cells.size() >= 3 && Tokens(cells.begin(), cells.begin() + 3) == Tokens{1, 2, 3}));
    }
}

void test_half_of_the_rest_goes() {
    Bench bench = make_bench(16, false, 1);
    (void)bench.submit({1, 2, 3, 4}, shifting(2, 0));
    int32_t before = -1;
    for (int32_t i = 0; i < 40; ++i) {
        bench.step();
        const int32_t now = bench.target->last_position(0);
        CHECK(now == before + 1 || i == 0 || now == before + 1 - 7);
        before = now;
    }
}

// The context can be so full of what must be kept that every token is a shift.
void test_prompt_that_fills_the_context() {
    for (const bool has_drafter : {false, true}) {
        Bench bench = make_bench(8, has_drafter, 1);
        const uint64_t id = bench.submit({1, 2, 3, 4, 5, 6, 1}, shifting(-1, 0));
        bench.run();
        CHECK(bench.answers[id].reason == FinishReason::length);
        CHECK(bench.answers[id].tokens.size() == 300);
    }
}

void test_without_the_option_the_context_is_full() {
    Bench bench = make_bench(32, true);
    RequestOptions options = shifting(0, 0);
    options.context_shift = false;
    const uint64_t id = bench.submit({1, 2, 3}, options);
    bench.run();
    CHECK(bench.answers[id].reason == FinishReason::context_full);
    CHECK(bench.answers[id].tokens.size() == 29);
}

// Rows behind a shift have seen what was forgotten: another request must not take them for a prompt's own.
void test_shifted_rows_are_not_reused() {
    Bench bench = make_bench(32, true, 1);
    const uint64_t first = bench.submit({1, 2, 3, 4}, shifting(2, 0));
    bench.run();
    Tokens again = {1, 2};
    const Tokens& tokens = bench.answers[first].tokens;
    again.insert(again.end(), tokens.end() - 10, tokens.end());
    const uint64_t second = bench.submit(again, shifting(0, 0));
    bench.run();
    CHECK(bench.answers[second].stats.n_reused == 2);
}

void test_cancel_after_a_shift() {
    Bench bench = make_bench(32, true, 1);
    const uint64_t first = bench.submit({1, 2, 3, 4}, shifting(0, 0));
    while (bench.answers[first].tokens.size() < 100) {
        bench.step();
    }
    CHECK(bench.engine->cancel(first));
    bench.run();
    CHECK(bench.answers[first].reason == FinishReason::cancelled);
    const uint64_t second = bench.submit({1, 2, 3, 4}, shifting(0, 0));
    Bench fresh = make_bench(32, true, 1);
    (void)fresh.submit({1, 2, 3, 4}, shifting(0, 0));
    bench.run();
    fresh.run();
    CHECK(bench.answers[second].tokens == fresh.answers[1].tokens);
}

// A shift that fails ends its own request alone.
void test_failed_shift_is_one_requests_error() {
    Bench bench = make_bench(32, true);
    const uint64_t first = bench.submit({1, 2, 3, 4, 5, 6, 1, 2}, shifting(0, 0));
    const uint64_t second = bench.submit({1, 2}, shifting(0, 0));
    bench.target->fail_next_shift = true;
    bench.run();
    CHECK(bench.answers[first].reason == FinishReason::error);
    CHECK(bench.answers[first].error == "cannot shift cells: made to fail");
    CHECK(bench.answers[second].reason == FinishReason::length);
    CHECK(bench.answers[second].tokens.size() == 300);
}

void test_refused_where_cells_cannot_move() {
    auto target = std::make_unique<toy::Target>();
    target->can_shift_cells = false;
    EngineOptions options;
    options.n_ctx = 32;
    Engine engine(std::move(target), nullptr, std::make_unique<Scheduler>(SchedulerOptions{}), options);
    CHECK(!engine.can_shift());
    CHECK_THROWS(engine.submit({1, 2}, shifting(0, 0)), std::invalid_argument);
    RequestOptions bad = shifting(-2, 0);
    CHECK_THROWS(bad.validate(), std::invalid_argument);
}

void test_waiting_features_move() {
    FeatureQueue queue(1, 1, 8);
    for (int32_t position = 5; position < 9; ++position) {
        queue.push(0, position)[0] = static_cast<float>(position);
    }
    queue.shift(0, 4);
    CHECK(queue.first_position(0) == 1);
    CHECK(queue.last_position(0) == 4);
    CHECK(queue.features(0, 3)[0] == 8.0F);
    queue.push(0, 5)[0] = 9.0F;
    CHECK(queue.n_rows(0) == 5);
}

} // namespace

int main() {
    test_text_goes_on_as_if_the_context_were_larger();
    test_kept_tokens_stay();
    test_half_of_the_rest_goes();
    test_prompt_that_fills_the_context();
    test_without_the_option_the_context_is_full();
    test_shifted_rows_are_not_reused();
    test_cancel_after_a_shift();
    test_failed_shift_is_one_requests_error();
    test_refused_where_cells_cannot_move();
    test_waiting_features_move();
    return check_summary();
}
