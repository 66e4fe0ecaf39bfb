// Attention alone, layer after layer so that every cache comes from memory: milliseconds per layer, how much of the
// cache is read per second, and against the first library where several are given. Builds that are to be compared are
// called in turns.
//
//   g++ -std=c++20 -O2 -Icsrc tools/bench_attention.cpp -o bench_attention -ldl -pthread
//   bench_attention [--shape 0.6B|8B|demo] [--cells N] [--rows N] [--repeats N] [--threads N] [--huge] LIBRARY...
//
// A LIBRARY is csrc/kernels/attention*.cpp compiled with the flags of cmake/attention.cmake, -shared and -fPIC.
#include "kernels/attention.h"

#include <dlfcn.h>
#include <immintrin.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>
#include <thread>
#include <vector>

using dspark::kernels::Attention;
using Attend = bool (*)(const Attention&);

namespace {

struct Shape {
    const char* name;
    int64_t n_heads, n_kv_heads, head_size;
};
constexpr Shape kShapes[] = {{"0.6B", 16, 8, 128}, {"8B", 32, 8, 128}, {"demo", 4, 2, 64}};

struct Memory {
    explicit Memory(size_t n_bytes, bool is_huge) : size(n_bytes) {
        data = static_cast<uint8_t*>(std::aligned_alloc(1U << 21, (n_bytes + (1U << 21) - 1) >> 21 << 21));
        madvise(data, n_bytes, is_huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        auto* halves = reinterpret_cast<uint16_t*>(data);
        uint32_t state = 1;
        for (size_t i = 0; i < n_bytes / 2; ++i) {
            state = state * 1664525U + 1013904223U;
            halves[i] = static_cast<uint16_t>((state >> 16 & 0x83ffU) | (11 + (state >> 8) % 5) << 10);
        }
    }
    ~Memory() { std::free(data); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    uint8_t* data;
    size_t size;
};

// Threads that wait without sleeping, as ggml's do.
class Barrier {
  public:
    explicit Barrier(int n) : n_(n) {}
    void wait() {
        const int turn = turn_.load();
        if (arrived_.fetch_add(1) == n_ - 1) {
            arrived_.store(0);
            turn_.fetch_add(1);
        } else {
            while (turn_.load(std::memory_order_acquire) == turn) {
                _mm_pause();
            }
        }
    }

  private:
    int n_;
    std::atomic<int> arrived_{0}, turn_{0};
};

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of this thread, which waits for others by spinning: what else runs on its core is left out.
double processor_ms() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
}

struct Case {
    Shape shape;
    int64_t n_cells, n_rows;
};

class Bench {
  public:
    Bench(const Case& c, const Memory& memory, int n_threads) : c_(c), memory_(memory), n_threads_(n_threads) {
        const int64_t width = c.shape.n_kv_heads * c.shape.head_size;
        layer_bytes_ = static_cast<size_t>(c.n_cells * width) * 4;
        n_layers_ = std::clamp<size_t>(memory.size / layer_bytes_, 1, 2048);
        n_turns_ = std::max<size_t>(n_layers_, 2000000 / static_cast<size_t>(c.n_cells * c.n_rows * c.shape.n_heads));
        q_.resize(static_cast<size_t>(c.n_rows * c.shape.n_heads * c.shape.head_size));
        for (size_t i = 0; i < q_.size(); ++i) {
            q_[i] = static_cast<float>(static_cast<int>(i * 2654435761U >> 20 & 255U) - 128) / 256.0F;
        }
        y_.resize(q_.size());
        mask_.assign(static_cast<size_t>(c.n_rows * c.n_cells), 0);
        for (int64_t row = 0; row < c.n_rows; ++row) {
            for (int64_t cell = c.n_cells - c.n_rows + row + 1; cell < c.n_cells; ++cell) {
                mask_[static_cast<size_t>(row * c.n_cells + cell)] = 0xfc00;
            }
        }
    }

    // Milliseconds per layer.
    double time(Attend attend) {
        Barrier barrier(n_threads_);
        double ms = 0.0;
        std::vector<std::thread> threads;
        for (int i = 0; i < n_threads_; ++i) {
            threads.emplace_back([&, i] {
                for (size_t layer = 0; layer < std::min<size_t>(n_layers_, 2); ++layer) {
                    attend(describe(layer, i)); // scratch memory, clocks
                }
                barrier.wait();
                const double begin = processor_ms();
                for (size_t turn = 0; turn < n_turns_; ++turn) {
                    attend(describe(turn % n_layers_, i));
                    barrier.wait();
                }
                if (i == 0) {
                    ms = (processor_ms() - begin) / static_cast<double>(n_turns_);
                }
            });
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
        return ms;
    }

    [[nodiscard]] size_t layer_bytes() const { return layer_bytes_; }
    [[nodiscard]] const std::vector<float>& y() const { return y_; }

  private:
    [[nodiscard]] Attention describe(size_t layer, int thread) {
        Attention a;
        const Shape& s = c_.shape;
        a.n_tokens = c_.n_rows;
        a.n_heads = s.n_heads;
        a.n_kv_heads = s.n_kv_heads;
        a.n_cells = c_.n_cells;
        a.key_size = a.value_size = s.head_size;
        a.scale = 0.0884F;
        a.q = q_.data();
        a.q_token_stride = s.n_heads * s.head_size;
        a.q_head_stride = s.head_size;
        a.k = memory_.data + layer * layer_bytes_;
        a.v = memory_.data + layer * layer_bytes_ + layer_bytes_ / 2;
        a.k_head_stride = a.v_head_stride = static_cast<size_t>(s.head_size) * 2;
        a.k_cell_stride = a.v_cell_stride = a.k_head_stride * static_cast<size_t>(s.n_kv_heads);
        a.mask = mask_.data();
        a.mask_stride = c_.n_cells;
        a.y = y_.data();
        a.thread = thread;
        a.n_threads = n_threads_;
        return a;
    }

    Case c_;
    const Memory& memory_;
    int n_threads_;
    size_t layer_bytes_ = 0, n_layers_ = 0, n_turns_ = 0;
    std::vector<float> q_, y_;
    std::vector<uint16_t> mask_;
};

// What the threads can read, with prefetches.
double read_gb_per_s(const Memory& memory, int n_threads) {
    const double begin = now_ms();
    std::vector<std::thread> threads;
    std::atomic<uint64_t> sink{0};
    for (int i = 0; i < n_threads; ++i) {
        threads.emplace_back([&, i] {
            const size_t part = memory.size / static_cast<size_t>(n_threads) / 64 * 64;
            const auto* p = reinterpret_cast<const uint64_t*>(memory.data + static_cast<size_t>(i) * part);
            uint64_t sum[8] = {};
            for (size_t at = 0; at < part / 8; at += 8) {
                _mm_prefetch(p + at + 512, _MM_HINT_T1);
                for (size_t j = 0; j < 8; ++j) {
                    sum[j] += p[at + j];
                }
            }
            for (const uint64_t s : sum) {
                sink += s;
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    return static_cast<double>(memory.size) / (now_ms() - begin) / 1e6;
}

double median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
}

void compare(const Case& c, const Memory& memory, int n_threads, int n_repeats, const std::vector<Attend>& libraries) {
    Bench bench(c, memory, n_threads);
    std::vector<std::vector<double>> ms(libraries.size());
    std::vector<float> first;
    const char* equal = "";
    for (int repeat = 0; repeat < n_repeats; ++repeat) {
        for (size_t i = 0; i < libraries.size(); ++i) {
            ms[i].push_back(bench.time(libraries[i]));
            if (first.empty()) {
                first = bench.y();
            } else if (i > 0) {
                equal = std::memcmp(first.data(), bench.y().data(), first.size() * 4) == 0 ? " same bits" : " differ";
            }
        }
    }
    std::printf("%-5s %6ld cells %3ld rows", c.shape.name, c.n_cells, c.n_rows);
    for (size_t i = 0; i < libraries.size(); ++i) {
        const double time = median(ms[i]);
        std::printf("  %8.4f ms %5.1f GB/s", time, static_cast<double>(bench.layer_bytes()) / time / 1e6);
        if (i > 0) {
            std::printf(" x%.2f", median(ms[0]) / time);
        }
    }
    std::printf("%s\n", equal);
    std::fflush(stdout);
}

} // namespace

int main(int argc, char** argv) {
    std::string shape;
    std::vector<int64_t> cells, rows;
    int n_repeats = 5, n_threads = 2;
    size_t n_mb = 160;
    bool is_huge = false;
    std::vector<Attend> libraries;
    for (int i = 1; i < argc; ++i) {
        const std::string argument = argv[i];
        const auto value = [&] { return std::string(argv[++i]); };
        if (argument == "--shape") {
            shape = value();
        } else if (argument == "--cells") {
            cells.push_back(std::stol(value()));
        } else if (argument == "--rows") {
            rows.push_back(std::stol(value()));
        } else if (argument == "--repeats") {
            n_repeats = std::stoi(value());
        } else if (argument == "--threads") {
            n_threads = std::stoi(value());
        } else if (argument == "--mb") {
            n_mb = std::stoul(value());
        } else if (argument == "--huge") {
            is_huge = true;
        } else {
            void* library = dlopen(argument.c_str(), RTLD_NOW | RTLD_LOCAL);
            void* attend = library == nullptr ? nullptr : dlsym(library, "_ZN6dspark7kernels6attendERKNS0_9AttentionE");
            if (attend == nullptr) {
                std::fprintf(stderr, "cannot load %s: %s\n", argument.c_str(), dlerror());
                return 1;
            }
            libraries.push_back(reinterpret_cast<Attend>(attend));
        }
    }
    if (cells.empty()) {
        cells = {256, 1024, 4096, 16384};
    }
    if (rows.empty()) {
        rows = {1, 2, 4, 8};
    }
    const int64_t most_cells = *std::ranges::max_element(cells);
    const Memory memory(std::max(n_mb << 20, static_cast<size_t>(most_cells) * 4096), is_huge);
    (void)read_gb_per_s(memory, n_threads);
    std::printf("reading: %.1f GB/s\n", read_gb_per_s(memory, n_threads));
    for (const Shape& s : kShapes) {
        for (const int64_t n_cells : cells) {
            for (const int64_t n_rows : rows) {
                if (shape.empty() || shape == s.name) {
                    compare({s, n_cells, n_rows}, memory, n_threads, n_repeats, libraries);
                }
            }
        }
    }
    return 0;
}
