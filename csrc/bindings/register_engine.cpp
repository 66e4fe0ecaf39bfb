// The engine, its options and its events.
#include "bindings.h"
#include "bound_engine.h"

#include <pybind11/stl.h>

#include <map>

namespace py = pybind11;
using namespace dspark;

namespace {

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
                                    int32_t n_logprobs, const std::string& verification, int32_t draft_limit,
                                    std::shared_ptr<TokenMask> grammar) {
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
    options.mask = std::move(grammar);
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
        .def(py::init(&make_request_options), py::kw_only(), py::arg("max_tokens") = 128, py::arg("temperature") = 1.0F,
             py::arg("top_k") = 0, py::arg("top_p") = 1.0F, py::arg("min_p") = 0.0F,
             py::arg("repetition_penalty") = 1.0F, py::arg("presence_penalty") = 0.0F,
             py::arg("frequency_penalty") = 0.0F, py::arg("logit_bias") = std::map<int32_t, float>{},
             py::arg("seed") = 0, py::arg("ignore_eos") = false, py::arg("n_logprobs") = -1,
             py::arg("verification") = "auto", py::arg("draft_limit") = -1,
             py::arg("grammar") = nullptr);
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
        .def(
            py::init([](std::shared_ptr<Model> target, std::shared_ptr<Model> drafter, int32_t n_ctx,
                        int32_t n_parallel, int32_t n_batch, int32_t n_threads, int32_t n_threads_batch,
                        const std::string& kv_type, const std::string& head, int32_t n_candidates, int32_t draft_length,
                        int32_t draft_window, int32_t max_queue, std::optional<bool> flash_attention) {
                const LLMOptions options{n_ctx,           n_parallel,   n_batch,   n_threads,
                                         n_threads_batch, kv_type,      head,      n_candidates,
                                         draft_length,    draft_window, max_queue, flash_attention};
                const py::gil_scoped_release release;
                return make_engine(std::move(target), std::move(drafter), options);
            }),
            py::arg("target").none(false), py::arg("drafter") = nullptr, py::kw_only(), py::arg("n_ctx") = 0,
            py::arg("n_parallel") = 1, py::arg("n_batch") = 512, py::arg("n_threads") = 0,
            py::arg("n_threads_batch") = 0, py::arg("kv_type") = "f16", py::arg("head") = "candidates",
            py::arg("n_candidates") = kDefaultCandidates, py::arg("draft_length") = -1, py::arg("draft_window") = 4096,
            py::arg("max_queue") = 512, py::arg("flash_attention") = py::none())
        .def("submit", &submit_request, py::arg("prompt"), py::arg("options").none(false))
        .def("step", &run_step)
        .def(
            "cancel", [](BoundEngine& bound, uint64_t id) { return bound.engine->cancel(id); }, py::arg("request_id"))
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
}
