#include "worker_pool.h"

#include <algorithm>
#include <utility>

namespace dspark {

WorkerPool::WorkerPool(int32_t n_threads) {
    for (int32_t worker = 1; worker < n_threads; ++worker) {
        threads_.emplace_back([this, worker] { help(static_cast<size_t>(worker)); });
    }
}

WorkerPool::~WorkerPool() {
    is_ending_ = true;
    wake_.release(static_cast<std::ptrdiff_t>(threads_.size()));
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

// Wakes no more threads than there are tasks for: each takes some microseconds.
void WorkerPool::run(size_t n_tasks, const Task& task) {
    if (n_tasks == 0) {
        return;
    }
    const size_t n_helpers = std::min(n_tasks - 1, threads_.size());
    task_ = &task;
    n_tasks_ = n_tasks;
    next_ = 0;
    n_helping_ = n_helpers;
    wake_.release(static_cast<std::ptrdiff_t>(n_helpers));
    work(0);
    for (size_t n = n_helping_; n != 0; n = n_helping_) {
        n_helping_.wait(n);
    }
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) {
        std::rethrow_exception(error);
    }
}

void WorkerPool::help(size_t worker) {
    while (true) {
        wake_.acquire();
        if (is_ending_) {
            return;
        }
        work(worker);
        if (--n_helping_ == 0) {
            n_helping_.notify_one();
        }
    }
}

void WorkerPool::work(size_t worker) noexcept {
    for (size_t task = next_++; task < n_tasks_; task = next_++) {
        try {
            (*task_)(task, worker);
        } catch (...) {
            next_ = n_tasks_;
            const std::lock_guard lock(error_mutex_);
            error_ = error_ ? error_ : std::current_exception();
        }
    }
}

} // namespace dspark
