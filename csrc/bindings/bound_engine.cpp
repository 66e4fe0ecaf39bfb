#include "bound_engine.h"

#include "llama_drafter.h"
#include "llama_target.h"
#include "scripted_drafter.h"

#include <algorithm>

namespace dspark {

namespace {

void require(bool holds, const std::string& message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

bool is_quantized(const std::string& kv_type) { return kv_type == "q8_0" || kv_type == "q4_0"; }

void validate(const LLMOptions& options) {
    require(options.n_ctx == 0 || (options.n_ctx >= 2 && options.n_ctx <= (1 << 24)),
            "n_ctx must be 0 or in 2 .. 16777216, got " + std::to_string(options.n_ctx));
    require(options.n_parallel >= 1 && options.n_parallel <= 256,
            "n_parallel must be in 1 .. 256, got " + std::to_string(options.n_parallel));
    require(options.n_batch >= 1 && options.n_batch <= 16384,
            "n_batch must be in 1 .. 16384, got " + std::to_string(options.n_batch));
    require(options.n_threads >= 0 && options.n_threads <= 512,
            "n_threads must be in 0 .. 512, got " + std::to_string(options.n_threads));
    require(options.n_threads_batch >= 0 && options.n_threads_batch <= 512,
            "n_threads_batch must be in 0 .. 512, got " + std::to_string(options.n_threads_batch));
    require(options.n_workers >= -1 && options.n_workers <= 512,
            "n_workers must be in -1 .. 512, got " + std::to_string(options.n_workers));
    require(options.n_candidates >= 1, "n_candidates must be at least 1, got " + std::to_string(options.n_candidates));
    (void)parse_policy(options.policy);
    require(options.objective == "throughput" || options.objective == "latency",
            "objective must be throughput or latency, got " + options.objective);
    require(options.draft_window >= 1, "draft_window must be at least 1, got " + std::to_string(options.draft_window));
    require(static_cast<int64_t>(options.n_ctx) * options.n_parallel <= (int64_t{1} << 30),
            "n_ctx * n_parallel must be at most 2^30 cells, got " +
                std::to_string(static_cast<int64_t>(options.n_ctx) * options.n_parallel));
    require(!is_quantized(options.kv_type) || options.flash_attention.value_or(true),
            "kv_type must be f32, f16 or bf16 without flash_attention, got " + options.kv_type);
}

// llama.cpp records and clears a cache cell by cell until the system kills the process: what cannot fit is refused.
void validate_memory(const LLMOptions& options, const Model& target, int32_t block) {
    constexpr double kGiB = 1 << 30;
    constexpr double kCellBytes = 64; // llama.cpp's own record of a cell
    const double value_bytes = options.kv_type == "f32" ? 4 : is_quantized(options.kv_type) ? 0.5 : 2;
    const double n_cells = static_cast<double>(options.n_ctx) * options.n_parallel;
    const double states = 4.0 * options.n_parallel * (1 + block) * static_cast<double>(target.state_values());
    const double needed =
        states + n_cells * (kCellBytes + value_bytes * static_cast<double>(target.kv_values_per_token()));
    double installed = 0;
    for (const DeviceInfo& device : build_info().devices) {
        installed += static_cast<double>(device.memory_total_bytes);
    }
    require(needed <= installed, "n_ctx * n_parallel must leave the KV cache within the memory of all devices, " +
                                     std::to_string(installed / kGiB) + " GiB, got " + std::to_string(needed / kGiB) +
                                     " GiB");
}

void validate_pair(const Model& target, const Model* drafter) {
    require(!target.is_drafter(), "target must be a target model, got the drafter " + target.path());
    require(drafter == nullptr || drafter->is_drafter(), "drafter must be a drafter model, got the target " +
                                                             (drafter == nullptr ? std::string() : drafter->path()));
}

// Rounds and plain steps; longer passes take so long that building their graphs is nothing beside them.
constexpr int32_t kKeptRows = 32;

ContextOptions target_context(const LLMOptions& options, const Model& target, int32_t block) {
    ContextOptions context;
    context.n_cells = options.n_ctx * options.n_parallel;
    context.n_batch = std::max(options.n_batch, options.n_parallel * (1 + block));
    if (target.has_state()) {
        context.n_rollback = block;
        // The states behind the newest are those of one pass: it must hold a round and more.
        context.n_batch = std::max(context.n_batch, block + 2);
    }
    context.n_ubatch = context.n_batch;
    context.n_sequences = options.n_parallel;
    context.n_outputs = options.n_parallel * (1 + block);
    context.n_threads = options.n_threads;
    context.n_threads_batch = options.n_threads_batch;
    context.kv_type = options.kv_type;
    context.flash_attention_off = !*options.flash_attention;
    context.n_kept_rows = kKeptRows;
    return context;
}

bool has_gpu() {
    const auto devices = build_info().devices;
    return std::any_of(devices.begin(), devices.end(), [](const DeviceInfo& device) { return device.kind == "gpu"; });
}

void fill_defaults(LLMOptions& options, const Model& target, int32_t block) {
    validate(options);
    if (!options.flash_attention) {
        options.flash_attention = has_gpu() || options.kv_type != "f32";
    }
    if (options.n_ctx == 0) {
        options.n_ctx = std::max(2, std::min(4096, target.n_ctx_train()));
    }
    validate_memory(options, target, block);
    if (options.n_threads == 0) {
        options.n_threads = n_math_threads();
    }
    if (options.n_threads_batch == 0) {
        options.n_threads_batch = options.n_threads;
    }
}

EngineOptions engine_options(const LLMOptions& options) {
    EngineOptions engine;
    engine.n_ctx = options.n_ctx;
    engine.n_parallel = options.n_parallel;
    engine.n_batch = options.n_batch;
    engine.max_queue = options.max_queue;
    engine.prefill_chunk = options.prefill_chunk;
    engine.prefix_reuse = options.prefix_reuse;
    engine.synthetic = options.synthetic;
    return engine;
}

// While a GPU computes the passes, the processor has nothing to do but to read what comes out of them.
std::shared_ptr<WorkerPool> make_workers(const LLMOptions& options, const Model& target) {
    constexpr int32_t kMostThreads = 16;
    const int32_t idle = target.output_device().empty() ? 1 : std::min(options.n_threads, kMostThreads);
    const int32_t n_workers = options.n_workers < 0 ? idle : options.n_workers;
    return n_workers < 2 ? nullptr : std::make_shared<WorkerPool>(n_workers);
}

std::unique_ptr<Scheduler> make_scheduler(const LLMOptions& options, const Model& target, int32_t block) {
    SchedulerOptions scheduler;
    scheduler.policy = parse_policy(options.policy);
    scheduler.objective = options.objective == "latency" ? Objective::latency : Objective::throughput;
    scheduler.block_size = block;
    scheduler.equal_lengths = target.has_state();
    scheduler.calibration = options.calibration;
    return std::make_unique<Scheduler>(std::move(scheduler));
}

} // namespace

std::unique_ptr<BoundEngine> make_engine(std::shared_ptr<Model> target, std::shared_ptr<Model> drafter,
                                         LLMOptions options) {
    validate_pair(*target, drafter.get());
    const int32_t block = drafter ? drafter->drafter_info().block_size : 0;
    fill_defaults(options, *target, block);
    auto bound = std::make_unique<BoundEngine>();
    bound->target_model = target;
    bound->drafter_model = drafter;
    auto real_target = std::make_unique<LlamaTarget>(target, target_context(options, *target, block));
    std::unique_ptr<LlamaDrafter> real_drafter;
    const std::shared_ptr<WorkerPool> workers = make_workers(options, *target);
    if (drafter) {
        DrafterOptions draft;
        draft.n_parallel = options.n_parallel;
        draft.n_ctx = options.n_ctx;
        draft.window = options.draft_window;
        draft.n_threads = options.n_threads;
        draft.n_threads_batch = options.n_threads_batch;
        draft.head = options.head;
        draft.n_candidates = options.n_candidates;
        draft.kv_type = options.kv_type == "f32" ? "f32" : "f16";
        draft.flash_attention_off = !*options.flash_attention;
        draft.workers = workers;
        real_drafter = std::make_unique<LlamaDrafter>(drafter, *real_target, draft);
        bound->draft_context_bytes = real_drafter->context().memory_bytes();
        bound->draft_kept_bytes = real_drafter->context().kept_bytes();
    }
    bound->options = options;
    bound->target_context_bytes = real_target->context().memory_bytes();
    bound->target_kept_bytes = real_target->context().kept_bytes();
    bound->engine = std::make_unique<Engine>(std::move(real_target), std::move(real_drafter),
                                             make_scheduler(options, *target, block), engine_options(options), workers);
    return bound;
}

std::unique_ptr<BoundEngine> make_scripted_engine(std::shared_ptr<Model> target,
                                                  std::vector<std::vector<int32_t>> scripts, const std::string& mode,
                                                  int32_t block_size, LLMOptions options) {
    fill_defaults(options, *target, block_size);
    auto bound = std::make_unique<BoundEngine>();
    bound->target_model = target;
    auto drafter =
        std::make_unique<ScriptedDrafter>(std::move(scripts), parse_script_mode(mode), block_size, target->n_vocab());
    auto real_target = std::make_unique<LlamaTarget>(target, target_context(options, *target, block_size));
    bound->engine = std::make_unique<Engine>(std::move(real_target), std::move(drafter),
                                             make_scheduler(options, *target, block_size), engine_options(options));
    return bound;
}

} // namespace dspark
