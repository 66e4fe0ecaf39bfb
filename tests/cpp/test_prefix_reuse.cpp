// Prefix reuse on toy models: what stands in the caches is what the text says, whoever left it there.
#include "answers.h"
#include "check.h"
#include "engine.h"
#include "feature_queue.h"
#include "toy_models.h"

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>

using namespace dspark;

namespace {

using toy::Answer;
using toy::greedy;
using toy::Tokens;

struct Bench {
    std::unique_ptr<Engine> engine;
    toy::Target* target = nullptr;
    toy::Drafter* drafter = nullptr;
    toy::Answers answers;

    void step() { toy::step(*engine, answers); }

    Answer ask(const Tokens& prompt, const RequestOptions& options) {
        const uint64_t id = engine->submit(prompt, options);
        while (engine->has_work()) {
            step();
        }
        return answers[id];
    }
};

Bench make_bench(int32_t n_parallel, bool prefix_reuse = true) {
    EngineOptions options;
    options.n_ctx = 128;
    options.n_parallel = n_parallel;
    options.max_queue = 10000;
    options.prefill_chunk = 5;
    options.prefix_reuse = prefix_reuse;
    SchedulerOptions scheduler;
    scheduler.policy = {Policy::Kind::fixed, 3, 0};
    scheduler.block_size = 5;
    auto target = std::make_unique<toy::Target>();
    auto drafter = std::make_unique<toy::Drafter>(5);
    Bench bench;
    bench.target = target.get();
    bench.drafter = drafter.get();
    bench.engine = std::make_unique<Engine>(std::move(target), std::move(drafter),
                                            std::make_unique<Scheduler>(scheduler), options);
    return bench;
}

Tokens joined(Tokens a, const Tokens& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

void test_next_turn_computes_only_what_is_new() {
    Bench bench = make_bench(1);
    Tokens text = {1, 2, 3, 4, 5, 6};
    int32_t n_held = 0;
    for (int32_t turn = 0; turn < 4; ++turn) {
        const Answer answer = bench.ask(text, greedy(6));
        CHECK(answer.stats.n_reused == n_held);
        CHECK(answer.tokens == make_bench(1, false).ask(text, greedy(6)).tokens);
        text = joined(text, answer.tokens);
        n_held = static_cast<int32_t>(text.size()) - 1; // all but the newest token
        CHECK(bench.target->last_position(0) == n_held - 1);
        CHECK(bench.drafter->last_position(0) == n_held - 1);
        CHECK((bench.target->cells(0) == Tokens(text.begin(), text.end() - 1)));
        text = joined(text, {0, 3});
    }
    CHECK(bench.engine->stats().n_reused == 11 + 19 + 27);
}

void test_last_prompt_token_is_computed_anew() {
    Bench bench = make_bench(1);
    const Tokens prompt = {1, 2, 3, 4};
    const Answer first = bench.ask(prompt, greedy(6));
    const Answer again = bench.ask(prompt, greedy(6));
    CHECK(again.stats.n_reused == 3);
    CHECK(again.tokens == first.tokens);
    CHECK(bench.ask({1}, greedy(2)).stats.n_reused == 0);
}

// Two prompts share a beginning: the second gets a copy, and the first one's cells stay whole for its next turn.
void test_shared_beginning_is_copied() {
    Bench bench = make_bench(2);
    const Tokens system = {1, 2, 3, 4, 5, 6, 1, 2};
    const Tokens first = joined(joined(system, {0}), bench.ask(joined(system, {0}), greedy(4)).tokens);
    CHECK(bench.ask(joined(system, {6}), greedy(4)).stats.n_reused == 8);
    CHECK(bench.ask(joined(first, {2}), greedy(4)).stats.n_reused == static_cast<int32_t>(first.size()) - 1);
}

void test_running_request_shares_too() {
    Bench bench = make_bench(2);
    const Tokens system = {1, 2, 3, 4, 5, 6, 1, 2};
    (void)bench.engine->submit(joined(system, {0}), greedy(60));
    bench.step();
    bench.step();
    const Answer second = bench.ask(joined(system, {6, 6}), greedy(9));
    CHECK(second.stats.n_reused == 8);
    CHECK(second.tokens == make_bench(1, false).ask(joined(system, {6, 6}), greedy(9)).tokens);
}

// The drafter holds nothing of a request that does not draft: one that does starts over, others need no drafter.
void test_reuse_reaches_as_far_as_the_drafter() {
    Bench bench = make_bench(1);
    RequestOptions off = greedy(4);
    off.draft_limit = 0;
    const Tokens prompt = {1, 2, 3, 4, 5, 6};
    (void)bench.ask(prompt, off);
    CHECK(bench.ask(prompt, off).stats.n_reused == 5);
    CHECK(bench.ask(prompt, greedy(4)).stats.n_reused == 0);
    CHECK(bench.ask(prompt, off).stats.n_reused == 5);
    CHECK(bench.drafter->last_position(0) == -1);
}

void test_nothing_stays_after_an_error() {
    Bench bench = make_bench(2);
    const Tokens prompt = {1, 2, 3, 4, 5, 6};
    (void)bench.ask(prompt, greedy(4));
    bench.target->fail_next = true;
    CHECK(bench.ask({5, 5}, greedy(4)).reason == FinishReason::error);
    for (const int32_t sequence : {0, 1}) {
        CHECK(bench.target->last_position(sequence) == -1);
        CHECK(bench.drafter->last_position(sequence) == -1);
    }
    CHECK(bench.ask(prompt, greedy(4)).stats.n_reused == 0);
}

void test_switched_off() {
    Bench bench = make_bench(1, false);
    const Tokens prompt = {1, 2, 3, 4, 5, 6};
    (void)bench.ask(prompt, greedy(4));
    CHECK(bench.target->last_position(0) == -1);
    CHECK(bench.ask(prompt, greedy(4)).stats.n_reused == 0);
}

// Thousands of short requests that begin alike, some cancelled at any moment, some not drafting, some failing: each
// has the text it has alone.
void test_no_state_leaks() {
    std::mt19937 random(7);
    Bench bench = make_bench(3);
    std::map<uint64_t, std::pair<Tokens, int32_t>> asked;
    std::vector<uint64_t> cancelled;
    for (int32_t i = 0; i < 3000; ++i) {
        Tokens prompt(1 + random() % 12);
        for (size_t k = 0; k < prompt.size(); ++k) {
            prompt[k] = static_cast<int32_t>(random() % 4 == 0 ? random() % 7 : k % 5);
        }
        RequestOptions options = greedy(1 + static_cast<int32_t>(random() % 8));
        options.draft_limit = random() % 5 == 0 ? 0 : -1;
        const uint64_t id = bench.engine->submit(prompt, options);
        asked[id] = {prompt, options.max_tokens};
        bench.target->fail_next = random() % 100 == 0;
        if (random() % 2 == 0) {
            bench.step();
        }
        if (random() % 6 == 0) {
            (void)bench.engine->cancel(id - random() % std::min<uint64_t>(id, 6));
        }
    }
    while (bench.engine->has_work()) {
        bench.step();
    }
    std::map<std::pair<Tokens, int32_t>, Tokens> alone;
    int32_t n_complete = 0;
    for (const auto& [id, answer] : bench.answers) {
        Tokens& text = alone[asked[id]];
        if (text.empty()) {
            text = make_bench(1, false).ask(asked[id].first, greedy(asked[id].second)).tokens;
        }
        const bool is_prefix =
            answer.tokens.size() <= text.size() && std::equal(answer.tokens.begin(), answer.tokens.end(), text.begin());
        CHECK(answer.reason == FinishReason::length ? answer.tokens == text : is_prefix);
        n_complete += answer.reason == FinishReason::length ? 1 : 0;
    }
    CHECK(n_complete > 1500);
    CHECK(bench.engine->stats().n_reused > 3000);
}

void test_waiting_rows_are_copied() {
    FeatureQueue queue(2, 2, 8);
    for (int32_t position = 3; position < 7; ++position) {
        std::ranges::fill(queue.push(0, position), static_cast<float>(position));
    }
    queue.copy(0, 1, 6);
    CHECK(queue.first_position(1) == 3);
    CHECK(queue.last_position(1) == 5);
    CHECK(queue.features(1, 2)[1] == 5.0F);
    queue.copy(0, 1, 3); // nothing that early
    CHECK(queue.n_rows(1) == 3);
    CHECK(queue.n_rows(0) == 4);
}

// Against rows in a plain list, over many blocks of the queue.
void test_waiting_rows_are_those_pushed() {
    constexpr int32_t kWindow = 70;
    FeatureQueue queue(3, 2, kWindow);
    std::array<std::deque<int32_t>, 2> expected; // positions, which are also the values
    std::mt19937 random(7);
    for (int32_t change = 0; change < 20000; ++change) {
        const auto sequence = static_cast<int32_t>(random() % 2);
        std::deque<int32_t>& rows = expected[static_cast<size_t>(sequence)];
        const auto kind = random() % 100;
        if (kind < 95) {
            const int32_t position = rows.empty() ? change : rows.back() + (kind == 0 ? 2 : 1); // 2: a gap
            if (kind == 0) {
                rows.clear();
            }
            std::ranges::fill(queue.push(sequence, position), static_cast<float>(position));
            rows.push_back(position);
            if (rows.size() > kWindow) {
                rows.pop_front();
            }
        } else if (kind < 98) {
            const auto n = static_cast<int32_t>(random() % 40);
            queue.drop_oldest(sequence, n);
            rows.erase(rows.begin(), rows.begin() + std::min<std::ptrdiff_t>(n, std::ssize(rows)));
        } else if (!rows.empty()) {
            const int32_t begin = rows.back() - static_cast<int32_t>(random() % 40);
            queue.remove(sequence, begin);
            std::erase_if(rows, [&](int32_t position) { return position >= begin; });
        }
        CHECK(queue.n_rows(sequence) == std::ssize(rows));
        for (size_t row = 0; row < rows.size(); ++row) {
            const std::span<const float> features = queue.features(sequence, static_cast<int32_t>(row));
            CHECK(features[0] == static_cast<float>(rows[row]) && features[2] == features[0]);
        }
    }
}

} // namespace

int main() {
    test_next_turn_computes_only_what_is_new();
    test_last_prompt_token_is_computed_anew();
    test_shared_beginning_is_copied();
    test_running_request_shares_too();
    test_reuse_reaches_as_far_as_the_drafter();
    test_nothing_stays_after_an_error();
    test_switched_off();
    test_no_state_leaks();
    test_waiting_rows_are_copied();
    test_waiting_rows_are_those_pushed();
    return check_summary();
}
