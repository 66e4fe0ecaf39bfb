// A few threads that sleep until there is work to share: reading V-wide rows while a GPU computes the passes. Owns:
// the threads. Must not know: what the work is. Threads: run() is called by one thread at a time.
//
// On a CPU alone there is none: ggml's threads would wait for these and these for them.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <semaphore>
#include <thread>
#include <vector>

namespace dspark {

class WorkerPool {
  public:
    using Task = std::function<void(size_t task, size_t worker)>;

    explicit WorkerPool(int32_t n_threads); // the caller of run() among them
    ~WorkerPool();
    WorkerPool(const WorkerPool&) = delete;
    WorkerPool& operator=(const WorkerPool&) = delete;

    // Calls task(0 .. n_tasks - 1, worker), each once, in any order; worker < n_workers() says which thread it is.
    // Returns when all are done; throws the first exception, after which tasks not begun are left out.
    void run(size_t n_tasks, const Task& task);
    [[nodiscard]] size_t n_workers() const { return threads_.size() + 1; }

  private:
    void help(size_t worker);
    void work(size_t worker) noexcept;

    std::vector<std::thread> threads_;
    std::counting_semaphore<> wake_{0};
    std::atomic<bool> is_ending_{false};

    // Of the call of run() in progress.
    const Task* task_ = nullptr;
    size_t n_tasks_ = 0;
    std::atomic<size_t> next_{0};
    std::atomic<size_t> n_helping_{0};
    std::mutex error_mutex_;
    std::exception_ptr error_;
};

} // namespace dspark
