// A turn is many steps: the same text as step by step, one event for each request, and an end when somebody waits.
#include "answers.h"
#include "check.h"
#include "engine.h"
#include "toy_models.h"

#include <memory>

using namespace dspark;

namespace {

constexpr double kLong = 1e9; // ms

std::unique_ptr<Engine> make_engine(int32_t n_parallel) {
    EngineOptions options;
    options.n_parallel = n_parallel;
    return std::make_unique<Engine>(std::make_unique<toy::Target>(), nullptr,
                                    std::make_unique<Scheduler>(SchedulerOptions{}), options);
}

const Event* event_of(const std::vector<Event>& events, uint64_t id) {
    const Event* found = nullptr;
    for (const Event& event : events) {
        if (event.request_id == id) {
            CHECK(found == nullptr); // one event a request
            found = &event;
        }
    }
    return found;
}

void test_a_turn_ends_with_a_first_and_a_last_token() {
    const auto engine = make_engine(2);
    RequestOptions options = toy::greedy(24);
    options.trace = true;
    options.n_logprobs = 1;
    const uint64_t longer = engine->submit({2, 3, 4}, options);
    const uint64_t shorter = engine->submit({5}, toy::greedy(9));
    const auto first = engine->turn(kLong);
    CHECK(event_of(first, longer)->tokens.size() == 1);
    CHECK(event_of(first, shorter)->tokens.size() == 1);

    const auto second = engine->turn(kLong);
    CHECK(event_of(second, shorter)->tokens.size() == 8);
    CHECK(event_of(second, shorter)->finish_reason == FinishReason::length);
    CHECK(event_of(second, longer)->tokens.size() == 8);
    CHECK(event_of(second, longer)->finish_reason == FinishReason::none);

    const auto third = engine->turn(kLong);
    const Event* last = event_of(third, longer);
    CHECK(last->tokens.size() == 15);
    CHECK(last->drafted.size() == 15);
    CHECK(last->logprobs.size() == 15);
    CHECK(last->rounds.size() == 15);
    CHECK(last->finish_reason == FinishReason::length);
    CHECK(last->stats.n_committed == 23);
    CHECK(engine->stats().n_steps == 24);
    CHECK(engine->turn(kLong).empty()); // nothing to do
}

void test_turns_and_steps_give_one_text() {
    toy::Answers stepped;
    toy::Tokens turned;
    const auto one = make_engine(1);
    const uint64_t id = one->submit({2, 3, 4}, toy::greedy(24));
    while (one->has_work()) {
        toy::step(*one, stepped);
    }
    const auto other = make_engine(1);
    (void)other->submit({2, 3, 4}, toy::greedy(24));
    while (other->has_work()) {
        for (const Event& event : other->turn(kLong)) {
            turned.insert(turned.end(), event.tokens.begin(), event.tokens.end());
        }
    }
    CHECK(turned == stepped[id].tokens);
}

void test_a_turn_without_time_is_a_step() {
    const auto engine = make_engine(1);
    (void)engine->submit({1}, toy::greedy(3));
    for (int32_t i = 1; i <= 3; ++i) {
        CHECK(engine->turn(0).at(0).tokens.size() == 1);
        CHECK(engine->stats().n_steps == i);
    }
}

} // namespace

int main() {
    test_a_turn_ends_with_a_first_and_a_last_token();
    test_turns_and_steps_give_one_text();
    test_a_turn_without_time_is_a_step();
    return check_summary();
}
