// The engine as Python holds it, made of real models (or a scripted drafter, for the tests).
#pragma once

#include "engine.h"
#include "llama_api.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace dspark {

struct LLMOptions {
    int32_t n_ctx = 0;
    int32_t n_parallel = 1;
    int32_t n_batch = 512;
    int32_t n_threads = 0;
    int32_t n_threads_batch = 0;
    std::string kv_type = "f16";
    std::string head = "candidates";
    int32_t n_candidates = kDefaultCandidates;
    std::string policy = "full"; // see parse_policy
    std::string objective = "throughput";
    std::vector<CalibrationEntry> calibration;
    int32_t draft_window = 4096;
    int32_t max_queue = 512;
    int32_t prefill_chunk = 64;
    bool prefix_reuse = true;
    // Empty: on, but for an f32 cache on the CPU. Measured there, a token's logits alone and in a batch of 8: equal to
    // the bit with flash attention and f16, off by up to 4e-2 with f32; without it equal with f32, off by 7e-3 with
    // f16.
    std::optional<bool> flash_attention;
    // Threads that share the reading of logits, the caller among them. -1: n_threads, 16 at most, where a GPU computes
    // the passes; else none.
    int32_t n_workers = -1;
    SyntheticOptions synthetic; // for timing alone
};

// What Python holds: the engine, and the real context handles its figures come from.
struct BoundEngine {
    std::unique_ptr<Engine> engine;
    std::shared_ptr<Model> target_model;
    std::shared_ptr<Model> drafter_model; // after target_model: freed first
    size_t target_context_bytes = 0;
    size_t draft_context_bytes = 0;
    std::shared_ptr<const std::atomic<size_t>> target_kept_bytes; // of their kept graphs
    std::shared_ptr<const std::atomic<size_t>> draft_kept_bytes;
    LLMOptions options; // with every default filled in

    ~BoundEngine() { engine.reset(); }
};

// Throw std::invalid_argument naming the option; what the models object to as ModelLoadError or ModelMismatchError.
[[nodiscard]] std::unique_ptr<BoundEngine> make_engine(std::shared_ptr<Model> target, std::shared_ptr<Model> drafter,
                                                       LLMOptions options);
[[nodiscard]] std::unique_ptr<BoundEngine> make_scripted_engine(std::shared_ptr<Model> target,
                                                                std::vector<std::vector<int32_t>> scripts,
                                                                const std::string& mode, int32_t block_size,
                                                                LLMOptions options);

} // namespace dspark
