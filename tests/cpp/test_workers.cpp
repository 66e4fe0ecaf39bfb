// Shared work: every task once, whatever the number of threads; the first error comes out and nothing hangs.
#include "check.h"
#include "worker_pool.h"

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

using namespace dspark;

namespace {

void test_every_task_runs_once() {
    for (const int32_t n_threads : {1, 2, 5}) {
        WorkerPool pool(n_threads);
        CHECK(pool.n_workers() == static_cast<size_t>(n_threads));
        for (size_t n_tasks = 0; n_tasks < 200; ++n_tasks) {
            std::vector<std::atomic<int>> n_runs(n_tasks);
            std::vector<std::atomic<int>> n_inside(pool.n_workers());
            std::atomic<bool> is_alone = true;
            pool.run(n_tasks, [&](size_t task, size_t worker) {
                is_alone = is_alone && n_inside.at(worker)++ == 0; // a worker's buffers are its own
                ++n_runs[task];
                --n_inside[worker];
            });
            CHECK(is_alone);
            for (const auto& n : n_runs) {
                CHECK(n == 1);
            }
        }
    }
}

void test_first_error_comes_out() {
    WorkerPool pool(3);
    for (int i = 0; i < 100; ++i) {
        std::string error;
        try {
            pool.run(20, [](size_t task, size_t) {
                if (task % 3 == 1) {
                    throw std::runtime_error("task failed");
                }
            });
        } catch (const std::runtime_error& caught) {
            error = caught.what();
        }
        CHECK(error == "task failed");
        std::atomic<int> n_runs = 0;
        pool.run(7, [&](size_t, size_t) { ++n_runs; });
        CHECK(n_runs == 7);
    }
}

} // namespace

int main() {
    test_every_task_runs_once();
    test_first_error_comes_out();
    return check_summary();
}
