// Requests on toy models: limits, cancelling, no state left behind, every failure survived.
#include "engine_bench.h"
#include "errors.h"

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

using namespace dspark;

namespace {

using toy::Bench;
using toy::greedy;
using toy::make_bench;
using toy::plain_texts;
using toy::ragged_prompts;
using toy::run;
using toy::workers;

void test_limits() {
    EngineOptions options;
    options.n_ctx = 16;
    Bench bench = make_bench(std::make_unique<toy::Drafter>(7), 7, options);
    const uint64_t full = bench.engine->submit({1, 2, 3}, greedy(100));
    auto answers = run(bench);
    CHECK(answers[full].reason == FinishReason::context_full);
    CHECK(answers[full].tokens.size() == 13);
    for (int32_t n = 1; n <= 12; ++n) {
        const uint64_t id = bench.engine->submit({1, 2, 3}, greedy(n));
        answers = run(bench);
        CHECK(answers[id].reason == FinishReason::length);
        CHECK(answers[id].tokens.size() == static_cast<size_t>(n));
    }
    CHECK_THROWS(bench.engine->submit(std::vector<int32_t>(16, 1), greedy(24)), ContextFullError);
    CHECK_THROWS(bench.engine->submit({}, greedy(24)), std::invalid_argument);
    CHECK_THROWS(bench.engine->submit({8}, greedy(24)), std::invalid_argument);
    CHECK_THROWS(bench.engine->submit({-1}, greedy(24)), std::invalid_argument);
    CHECK_THROWS(bench.engine->submit({1}, greedy(0)), std::invalid_argument);
}

void test_draft_limit_of_one_request() {
    EngineOptions options;
    options.n_parallel = 2;
    Bench bench = make_bench(std::make_unique<toy::Drafter>(7), 7, options);
    RequestOptions off = greedy(24);
    off.draft_limit = 0;
    RequestOptions two = greedy(24);
    two.draft_limit = 2;
    const uint64_t a = bench.engine->submit({1}, off);
    const uint64_t b = bench.engine->submit({1}, two);
    bench.plain = {a};
    auto answers = run(bench);
    CHECK(answers[a].stats.n_drafted == 0);
    CHECK(answers[b].stats.n_scheduled > 0);
    CHECK(answers[b].stats.scheduled_per_position[2] == 0);
    CHECK(answers[a].tokens == answers[b].tokens);
}

void test_cancel_everywhere() {
    EngineOptions options;
    options.n_batch = 2;
    options.prefix_reuse = false; // an ended request then leaves nothing
    Bench bench = make_bench(std::make_unique<toy::Drafter>(1), 1, options);
    const uint64_t running = bench.engine->submit(std::vector<int32_t>(9, 1), greedy(24));
    const uint64_t queued = bench.engine->submit({1}, greedy(24));
    (void)bench.engine->step(); // prefill, not finished
    CHECK(bench.engine->cancel(running));
    CHECK(bench.engine->cancel(queued));
    const auto events = bench.engine->step();
    CHECK(events.size() == 2);
    for (const Event& event : events) {
        CHECK(event.finish_reason == FinishReason::cancelled);
    }
    CHECK(!bench.engine->has_work());
    CHECK(!bench.engine->cancel(running));
    CHECK(bench.target->last_position(0) == -1);
    const uint64_t decoding = bench.engine->submit({1}, greedy(100));
    (void)bench.engine->step();
    (void)bench.engine->step();
    CHECK(bench.engine->cancel(decoding));
    CHECK(bench.engine->step().at(0).finish_reason == FinishReason::cancelled);
}

void test_failed_pass_ends_its_requests_only() {
    EngineOptions options;
    options.n_parallel = 2;
    Bench bench = make_bench(std::make_unique<toy::Drafter>(3), 3, options);
    const uint64_t a = bench.engine->submit({1}, greedy(24));
    const uint64_t b = bench.engine->submit({2}, greedy(24));
    const uint64_t waiting = bench.engine->submit({3}, greedy(24));
    (void)bench.engine->step();
    bench.target->fail_next = true;
    auto answers = run(bench);
    CHECK(answers[a].reason == FinishReason::error);
    CHECK(answers[b].error.find("made to fail") != std::string::npos);
    CHECK(answers[waiting].reason == FinishReason::length);
    Bench alone = make_bench(nullptr, 0);
    const uint64_t id = alone.engine->submit({3}, greedy(24));
    CHECK(run(alone)[id].tokens == answers[waiting].tokens);
}

void test_bad_logits_end_one_request_only() {
    EngineOptions options;
    options.n_parallel = 2;
    Bench bench = make_bench(nullptr, 0, options);
    bench.target->poisoned_token = 6;
    RequestOptions clean = greedy(24);
    clean.sampling.logit_bias = {{6, -1e9F}};
    const uint64_t bad = bench.engine->submit({6}, greedy(24));
    const uint64_t good = bench.engine->submit({1}, clean);
    auto answers = run(bench);
    CHECK(answers[bad].reason == FinishReason::error);
    CHECK(!answers[bad].error.empty());
    CHECK(answers[good].reason == FinishReason::length);
    CHECK(answers[good].tokens.size() == 24);
}

void test_bounded_queue_and_close() {
    EngineOptions options;
    options.max_queue = 2;
    Bench bench = make_bench(nullptr, 0, options);
    (void)bench.engine->submit({1}, greedy(24));
    (void)bench.engine->submit({1}, greedy(24));
    CHECK_THROWS(bench.engine->submit({1}, greedy(24)), QueueFullError);
    bench.engine->close();
    bench.engine->close();
    CHECK_THROWS(bench.engine->submit({1}, greedy(24)), EngineClosedError);
    CHECK_THROWS((void)bench.engine->step(), EngineClosedError);
    CHECK(!bench.engine->has_work());
}

void test_short_requests_in_changing_slots() {
    const auto plain = plain_texts(greedy(5));
    EngineOptions options;
    options.n_parallel = 3;
    Bench bench = make_bench(std::make_unique<toy::Drafter>(7), 5, options);
    std::map<uint64_t, size_t> ids;
    for (int i = 0; i < 200; ++i) {
        ids[bench.engine->submit(ragged_prompts()[static_cast<size_t>(i) % 6], greedy(5))] = static_cast<size_t>(i) % 6;
    }
    for (const auto& [id, answer] : run(bench)) {
        CHECK(answer.tokens == plain[ids[id]]);
    }
}

// Submitting and cancelling from other threads while one steps; run under the thread sanitizer too.
void test_submit_from_other_threads() {
    EngineOptions options;
    options.n_parallel = 4;
    options.max_queue = 1000;
    Bench bench = make_bench(std::make_unique<toy::Drafter>(3), 3, options);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < 50; ++i) {
                const uint64_t id = bench.engine->submit({1, 2}, greedy(6));
                if (i % 5 == 0) {
                    (void)bench.engine->cancel(id);
                }
            }
        });
    }
    size_t n_finished = 0;
    while (n_finished < 200) {
        for (const Event& event : bench.engine->step()) {
            n_finished += event.finish_reason == FinishReason::none ? 0 : 1;
        }
        (void)bench.engine->stats();
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    CHECK(!bench.engine->has_work());
}

// Where rounds are decided: with threads that share it, too.
void test_failures() {
    test_failed_pass_ends_its_requests_only();
    test_bad_logits_end_one_request_only();
}

} // namespace

int main() {
    test_failures();
    workers = std::make_shared<WorkerPool>(3);
    test_failures();
    workers.reset();
    test_limits();
    test_draft_limit_of_one_request();
    test_cancel_everywhere();
    test_bounded_queue_and_close();
    test_short_requests_in_changing_slots();
    test_submit_from_other_threads();
    return check_summary();
}
