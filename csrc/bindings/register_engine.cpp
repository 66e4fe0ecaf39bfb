// The engine over real models, and over a scripted drafter for the tests.
#include "bindings.h"

#include "engine.h"
#include "errors.h"
#include "llama_drafter.h"
#include "llama_target.h"
#include "scripted_drafter.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace py = pybind11;
using namespace dspark;

namespace {

struct LLMOptions {
    int32_t n_ctx = 0;
    int32_t n_parallel = 1;
    int32_t n_batch = 512;
    int32_t n_threads = 0;
    int32_t n_threads_batch = 0;
    std::string kv_type = "f16";
    std::string head = "candidates";
    int32_t n_candidates = kDefaultCandidates;
    int32_t draft_length = -1;
    int32_t draft_window = 4096;
    int32_t max_queue = 512;
    // Empty: on, but for an f32 cache on the CPU. Measured there, a token's logits alone and in a batch of 8: equal to
    // the bit with flash attention and f16, off by up to 4e-2 with f32; without it equal with f32, off by 7e-3 with f16.
    std::optional<bool> flash_attention;
};

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
    require(options.n_candidates >= 1, "n_candidates must be at least 1, got " + std::to_string(options.n_candidates));
    require(options.draft_length >= -1,
            "draft_length must be -1 (full), 0 (off) or more, got " + std::to_string(options.draft_length));
    require(options.draft_window >= 1, "draft_window must be at least 1, got " + std::to_string(options.draft_window));
    require(static_cast<int64_t>(options.n_ctx) * options.n_parallel <= (int64_t{1} << 30),
            "n_ctx * n_parallel must be at most 2^30 cells, got " +
                std::to_string(static_cast<int64_t>(options.n_ctx) * options.n_parallel));
    require(!is_quantized(options.kv_type) || options.flash_attention.value_or(true),
            "kv_type must be f32, f16 or bf16 without flash_attention, got " + options.kv_type);
}

void validate_pair(const Model& target, const Model* drafter) {
    require(!target.is_drafter(), "target must be a target model, got the drafter " + target.path());
    require(drafter == nullptr || drafter->is_drafter(),
            "drafter must be a drafter model, got the target " + (drafter == nullptr ? std::string() : drafter->path()));
}

int32_t default_threads() { return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency())); }

// What Python holds: the engine, and the real context handles its figures come from.
struct BoundEngine {
    std::unique_ptr<Engine> engine;
    std::shared_ptr<Model> target_model;
    std::shared_ptr<Model> drafter_model; // after target_model: freed first
    size_t target_context_bytes = 0;
    size_t draft_context_bytes = 0;

    ~BoundEngine() { engine.reset(); }
};

ContextOptions target_context(const LLMOptions& options, int32_t block) {
    ContextOptions context;
    context.n_cells = options.n_ctx * options.n_parallel;
    context.n_batch = std::max(options.n_batch, options.n_parallel * (1 + block));
    context.n_ubatch = context.n_batch;
    context.n_sequences = options.n_parallel;
    context.n_outputs = options.n_parallel * (1 + block);
    context.n_threads = options.n_threads;
    context.n_threads_batch = options.n_threads_batch;
    context.kv_type = options.kv_type;
    context.flash_attention_off = !*options.flash_attention;
    return context;
}

bool has_gpu() {
    const auto devices = build_info().devices;
    return std::any_of(devices.begin(), devices.end(), [](const DeviceInfo& device) { return device.kind == "gpu"; });
}

void fill_defaults(LLMOptions& options, const Model& target) {
    validate(options);
    if (!options.flash_attention) {
        options.flash_attention = has_gpu() || options.kv_type != "f32";
    }
    if (options.n_ctx == 0) {
        options.n_ctx = std::max(2, std::min(4096, target.n_ctx_train()));
    }
    if (options.n_threads == 0) {
        options.n_threads = default_threads();
    }
    if (options.n_threads_batch == 0) {
        options.n_threads_batch = options.n_threads;
    }
}

EngineOptions engine_options(const LLMOptions& options) {
    return {options.n_ctx, options.n_parallel, options.n_batch, options.max_queue};
}

std::unique_ptr<Scheduler> make_scheduler(const LLMOptions& options, int32_t block) {
    return std::make_unique<FixedScheduler>(options.draft_length < 0 ? block : options.draft_length);
}

std::unique_ptr<BoundEngine> make_engine(std::shared_ptr<Model> target, std::shared_ptr<Model> drafter,
                                         LLMOptions options) {
    validate_pair(*target, drafter.get());
    fill_defaults(options, *target);
    auto bound = std::make_unique<BoundEngine>();
    bound->target_model = target;
    bound->drafter_model = drafter;
    const int32_t block = drafter ? drafter->drafter_info().block_size : 0;
    auto real_target = std::make_unique<LlamaTarget>(target, target_context(options, block));
    std::unique_ptr<LlamaDrafter> real_drafter;
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
        real_drafter = std::make_unique<LlamaDrafter>(drafter, *real_target, draft);
        bound->draft_context_bytes = real_drafter->context().memory_bytes();
    }
    bound->target_context_bytes = real_target->context().memory_bytes();
    bound->engine = std::make_unique<Engine>(std::move(real_target), std::move(real_drafter),
                                             make_scheduler(options, block), engine_options(options));
    return bound;
}

std::unique_ptr<BoundEngine> make_scripted_engine(std::shared_ptr<Model> target,
                                                  std::vector<std::vector<int32_t>> scripts, const std::string& mode,
                                                  int32_t block_size, LLMOptions options) {
    fill_defaults(options, *target);
    auto bound = std::make_unique<BoundEngine>();
    bound->target_model = target;
    auto drafter = std::make_unique<ScriptedDrafter>(std::move(scripts), parse_script_mode(mode), block_size,
                                                     target->n_vocab());
    auto real_target = std::make_unique<LlamaTarget>(target, target_context(options, block_size));
    bound->engine = std::make_unique<Engine>(std::move(real_target), std::move(drafter),
                                             make_scheduler(options, block_size), engine_options(options));
    return bound;
}

std::optional<Verification> parse_rule(const std::string& name) {
    if (name == "auto") {
        return std::nullopt;
    }
    if (name == "exact") {
        return Verification::exact;
    }
    if (name == "rejection") {
        return Verification::rejection;
    }
    if (name == "block") {
        return Verification::block;
    }
    throw std::invalid_argument("verification must be auto, exact, rejection or block, got " + name);
}

RequestOptions make_request_options(int32_t max_tokens, float temperature, int32_t top_k, float top_p, float min_p,
                                    float repetition_penalty, float presence_penalty, float frequency_penalty,
                                    const std::map<int32_t, float>& logit_bias, uint64_t seed, bool ignore_eos,
                                    int32_t n_logprobs, const std::string& verification, int32_t draft_limit) {
    RequestOptions options;
    options.max_tokens = max_tokens;
    options.sampling.temperature = temperature;
    options.sampling.top_k = top_k;
    options.sampling.top_p = top_p;
    options.sampling.min_p = min_p;
    options.sampling.repetition_penalty = repetition_penalty;
    options.sampling.presence_penalty = presence_penalty;
    options.sampling.frequency_penalty = frequency_penalty;
    options.sampling.logit_bias.assign(logit_bias.begin(), logit_bias.end());
    options.sampling.seed = seed;
    options.ignore_eos = ignore_eos;
    options.n_logprobs = n_logprobs;
    options.verification = parse_rule(verification);
    options.draft_limit = draft_limit;
    options.validate();
    return options;
}

uint64_t submit_request(BoundEngine& bound, std::vector<int32_t> prompt, const RequestOptions& options) {
    const py::gil_scoped_release release;
    return bound.engine->submit(std::move(prompt), options);
}

std::vector<Event> run_step(BoundEngine& bound) {
    const py::gil_scoped_release release;
    return bound.engine->step();
}

void close_engine(BoundEngine& bound) {
    const py::gil_scoped_release release;
    bound.engine->close();
}

py::dict memory(const BoundEngine& bound) {
    py::dict bytes;
    bytes["target_weights"] = bound.target_model->size_bytes();
    bytes["drafter_weights"] = bound.drafter_model ? bound.drafter_model->size_bytes() : 0;
    bytes["target_context"] = bound.target_context_bytes;
    bytes["draft_context"] = bound.draft_context_bytes;
    return bytes;
}

void register_options(py::module_& module) {
    py::class_<RequestOptions>(module, "RequestOptions", py::is_final())
        .def(py::init(&make_request_options), py::kw_only(), py::arg("max_tokens") = 128,
             py::arg("temperature") = 1.0F, py::arg("top_k") = 0, py::arg("top_p") = 1.0F, py::arg("min_p") = 0.0F,
             py::arg("repetition_penalty") = 1.0F, py::arg("presence_penalty") = 0.0F,
             py::arg("frequency_penalty") = 0.0F, py::arg("logit_bias") = std::map<int32_t, float>{},
             py::arg("seed") = 0, py::arg("ignore_eos") = false, py::arg("n_logprobs") = -1,
             py::arg("verification") = "auto", py::arg("draft_limit") = -1);
}

void register_results(py::module_& module) {
    py::class_<TopLogprobs>(module, "TokenLogprobs")
        .def_readonly("logprob", &TopLogprobs::chosen)
        .def_readonly("top", &TopLogprobs::best);
    py::class_<RequestStats>(module, "RequestStats")
        .def_readonly("n_prompt", &RequestStats::n_prompt)
        .def_readonly("n_rounds", &RequestStats::n_rounds)
        .def_readonly("n_drafted", &RequestStats::n_drafted)
        .def_readonly("n_scheduled", &RequestStats::n_scheduled)
        .def_readonly("n_accepted", &RequestStats::n_accepted)
        .def_readonly("n_committed", &RequestStats::n_committed)
        .def_readonly("scheduled_per_position", &RequestStats::scheduled_per_position)
        .def_readonly("accepted_per_position", &RequestStats::accepted_per_position)
        .def_readonly("queue_ms", &RequestStats::queue_ms)
        .def_readonly("prefill_ms", &RequestStats::prefill_ms)
        .def_readonly("draft_ms", &RequestStats::draft_ms)
        .def_readonly("verify_ms", &RequestStats::verify_ms)
        .def_readonly("host_ms", &RequestStats::host_ms);
    py::class_<Event>(module, "Event")
        .def_readonly("request_id", &Event::request_id)
        .def_readonly("tokens", &Event::tokens)
        .def_readonly("drafted", &Event::drafted)
        .def_readonly("logprobs", &Event::logprobs)
        .def_property_readonly("finish_reason",
                               [](const Event& event) -> std::optional<std::string> {
                                   if (event.finish_reason == FinishReason::none) {
                                       return std::nullopt;
                                   }
                                   return finish_reason_name(event.finish_reason);
                               })
        .def_readonly("error", &Event::error)
        .def_property_readonly("stats", [](const Event& event) -> std::optional<RequestStats> {
            return event.finish_reason == FinishReason::none ? std::nullopt : std::optional(event.stats);
        });
    py::class_<EngineStats>(module, "EngineStats")
        .def_readonly("n_steps", &EngineStats::n_steps)
        .def_readonly("n_prefill_tokens", &EngineStats::n_prefill_tokens)
        .def_readonly("n_drafted", &EngineStats::n_drafted)
        .def_readonly("n_scheduled", &EngineStats::n_scheduled)
        .def_readonly("n_accepted", &EngineStats::n_accepted)
        .def_readonly("n_committed", &EngineStats::n_committed)
        .def_readonly("draft_ms", &EngineStats::draft_ms)
        .def_readonly("verify_ms", &EngineStats::verify_ms)
        .def_readonly("inject_ms", &EngineStats::inject_ms)
        .def_readonly("host_ms", &EngineStats::host_ms);
}

} // namespace

void register_engine(py::module_& module) {
    register_options(module);
    register_results(module);
    py::class_<BoundEngine>(module, "Engine", py::is_final())
        .def(py::init([](std::shared_ptr<Model> target, std::shared_ptr<Model> drafter, int32_t n_ctx,
                         int32_t n_parallel, int32_t n_batch, int32_t n_threads, int32_t n_threads_batch,
                         const std::string& kv_type, const std::string& head, int32_t n_candidates,
                         int32_t draft_length, int32_t draft_window, int32_t max_queue,
                         std::optional<bool> flash_attention) {
                 const LLMOptions options{n_ctx,   n_parallel, n_batch,      n_threads,    n_threads_batch, kv_type,
                                          head,    n_candidates, draft_length, draft_window, max_queue,
                                          flash_attention};
                 const py::gil_scoped_release release;
                 return make_engine(std::move(target), std::move(drafter), options);
             }),
             py::arg("target").none(false), py::arg("drafter") = nullptr, py::kw_only(), py::arg("n_ctx") = 0,
             py::arg("n_parallel") = 1, py::arg("n_batch") = 512, py::arg("n_threads") = 0,
             py::arg("n_threads_batch") = 0, py::arg("kv_type") = "f16", py::arg("head") = "candidates",
             py::arg("n_candidates") = kDefaultCandidates, py::arg("draft_length") = -1,
             py::arg("draft_window") = 4096, py::arg("max_queue") = 512, py::arg("flash_attention") = py::none())
        .def("submit", &submit_request, py::arg("prompt"), py::arg("options").none(false))
        .def("step", &run_step)
        .def("cancel", [](BoundEngine& bound, uint64_t id) { return bound.engine->cancel(id); }, py::arg("request_id"))
        .def("close", &close_engine)
        .def_property_readonly("has_work", [](const BoundEngine& bound) { return bound.engine->has_work(); })
        .def_property_readonly("n_ctx", [](const BoundEngine& bound) { return bound.engine->options().n_ctx; })
        .def_property_readonly("n_running", [](const BoundEngine& bound) { return bound.engine->n_running(); })
        .def_property_readonly("n_queued", [](const BoundEngine& bound) { return bound.engine->n_queued(); })
        .def_property_readonly("closed", [](const BoundEngine& bound) { return bound.engine->is_closed(); })
        .def_property_readonly("stats", [](const BoundEngine& bound) { return bound.engine->stats(); })
        .def_property_readonly("memory_bytes", &memory)
        .def("cache_positions", [](const BoundEngine& bound) {
            std::vector<std::tuple<uint64_t, int32_t, int32_t>> positions;
            for (const CachePosition& position : bound.engine->cache_positions()) {
                positions.emplace_back(position.request_id, position.target, position.draft);
            }
            return positions;
        });
    py::module_ testing = module.def_submodule("_testing", "Only for the test suite.");
    testing.def(
        "scripted_engine",
        [](std::shared_ptr<Model> target, std::vector<std::vector<int32_t>> scripts, const std::string& mode,
           int32_t block_size, int32_t n_ctx, int32_t n_parallel, const std::string& kv_type, int32_t draft_length) {
            LLMOptions options;
            options.n_ctx = n_ctx;
            options.n_parallel = n_parallel;
            options.kv_type = kv_type;
            options.draft_length = draft_length;
            return make_scripted_engine(std::move(target), std::move(scripts), mode, block_size, options);
        },
        py::arg("target").none(false), py::arg("scripts"), py::arg("mode"), py::kw_only(), py::arg("block_size") = 7,
        py::arg("n_ctx") = 0, py::arg("n_parallel") = 1, py::arg("kv_type") = "f16", py::arg("draft_length") = -1);
}
