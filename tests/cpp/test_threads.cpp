// How many threads a pass gets: what is best is found, kept, found anew when it changes, and looking costs little.
#include "check.h"
#include "thread_choice.h"

#include <cmath>
#include <cstdint>

using namespace dspark;

namespace {

// A machine on which a pass of n_rows takes alone_ms or shared_ms, give or take a few percent.
struct Machine {
    double alone_ms;
    double shared_ms;
    uint64_t state = 1;

    double noisy(double ms) {
        state = state * 6364136223846793005U + 1442695040888963407U;
        const double uniform = static_cast<double>(state >> 40) / (1 << 24);
        return ms * (uniform > 0.97 ? 3.0 : 0.97 + 0.06 * uniform); // a neighbour now and then
    }
};

struct Outcome {
    double alone; // share of the passes
    double ms;    // of a pass
};

Outcome run(ThreadChoice& choice, Machine& machine, int32_t n_rows, int32_t n_passes) {
    Outcome outcome{};
    for (int32_t i = 0; i < n_passes; ++i) {
        const bool is_alone = choice.is_alone(n_rows);
        const double ms = is_alone ? machine.alone_ms : machine.shared_ms;
        outcome.alone += is_alone ? 1.0 / n_passes : 0;
        outcome.ms += ms / n_passes;
        choice.observe(n_rows, machine.noisy(ms));
    }
    return outcome;
}

void test_the_faster_way_is_found_and_kept() {
    for (const int32_t n_rows : {1, 2, 8}) {
        for (const double alone_ms : {0.3, 0.5, 0.9}) {
            ThreadChoice choice;
            Machine machine{alone_ms, 0.4};
            (void)run(choice, machine, n_rows, 30);
            const double best_ms = std::min(alone_ms, 0.4);
            CHECK(run(choice, machine, n_rows, 10000).ms < 1.01 * best_ms);
        }
    }
}

void test_a_change_is_noticed() {
    ThreadChoice choice;
    Machine machine{0.4, 0.3};
    CHECK(run(choice, machine, 1, 5000).alone < 0.02);
    machine.shared_ms = 0.55; // whoever is in the way of the others is seen at once
    CHECK(run(choice, machine, 1, 300).alone > 0.9);
    CHECK(run(choice, machine, 1, 5000).alone > 0.96);
    machine.shared_ms = 0.3; // what the others could do by now is seen by trials alone
    (void)run(choice, machine, 1, 300);
    CHECK(run(choice, machine, 1, 3000).alone < 0.02);
}

// The first two passes of threads that slept take twice as long as one alone, and no longer.
void test_threads_that_wake_up_late_are_waited_for() {
    ThreadChoice choice;
    Machine machine{0.2, 0.4};
    CHECK(run(choice, machine, 1, 100).alone > 0.8);
    int32_t n_shared = 0;
    double n_alone = 0;
    for (int32_t i = 0; i < 3000; ++i) {
        const bool is_alone = choice.is_alone(1);
        n_shared = is_alone ? 0 : n_shared + 1;
        n_alone += is_alone ? 1 : 0;
        choice.observe(1, is_alone ? 0.2 : n_shared <= 2 ? 0.4 : 0.15);
    }
    CHECK(n_alone < 300);
}

void test_growing_contexts_are_no_change() {
    ThreadChoice choice;
    double n_alone = 0;
    for (int32_t i = 0; i < 20000; ++i) {
        const double grown = 1 + i % 200 / 200.0; // an answer after the other
        Machine machine{0.5 * grown, 0.4 * grown, static_cast<uint64_t>(i)};
        n_alone += run(choice, machine, 1, 1).alone;
    }
    CHECK(n_alone < 0.02 * 20000);
}

void test_sizes_are_apart() {
    ThreadChoice choice;
    Machine small{0.3, 0.5};
    Machine large{2.0, 1.2};
    for (int32_t i = 0; i < 100; ++i) {
        (void)run(choice, small, 1, 1);
        (void)run(choice, large, 8, 1);
    }
    CHECK(choice.is_alone(1));
    CHECK(!choice.is_alone(8));
    CHECK(!choice.is_alone(64)); // never seen
}

void test_long_passes_are_shared() {
    ThreadChoice choice;
    Machine machine{50, 26};
    CHECK(run(choice, machine, 1, 5000).alone == 0);
    Machine small{0.3, 0.5};
    CHECK(run(choice, small, 9, 5000).alone == 0);
}

} // namespace

int main() {
    test_the_faster_way_is_found_and_kept();
    test_a_change_is_noticed();
    test_threads_that_wake_up_late_are_waited_for();
    test_growing_contexts_are_no_change();
    test_sizes_are_apart();
    test_long_passes_are_shared();
    return check_summary();
}
