// The engine, its options and its events.
#include "bindings.h"
#include "bound_engine.h"
#include "cost_dicts.h"
#include "rule_names.h"

#include <pybind11/stl.h>

#include <map>

namespace py = pybind11;
using namespace dspark;

namespace {

std::optional<Verification> parse_verification(const std::string& name) {
    const auto rule = find_rule(name);
    if (!rule && name != "auto") {
        throw std::invalid_argument("verification must be auto, exact, rejection or block, got " + name);
    }
    return rule;
}

RequestOptions make_request_options(int32_t max_tokens, float temperature, int32_t top_k, float top_p, float min_p,
                                    float repetition_penalty, float presence_penalty, float frequency_penalty,
                                    int32_t penalty_window, const std::map<int32_t, float>& logit_bias, uint64_t seed,
                                    bool ignore_eos, bool context_shift, int32_t n_keep, int32_t n_logprobs,
                                    const std::string& verification, const std::optional<std::string>& policy,
                                    int32_t draft_limit, bool trace, std::shared_ptr<TokenMask> grammar) {
    RequestOptions options;
    options.max_tokens = max_tokens;
    options.sampling.temperature = temperature;
    options.sampling.top_k = top_k;
    options.sampling.top_p = top_p;
    options.sampling.min_p = min_p;
    options.sampling.repetition_penalty = repetition_penalty;
    options.sampling.presence_penalty = presence_penalty;
    options.sampling.frequency_penalty = frequency_penalty;
    options.sampling.penalty_window = penalty_window;
    options.sampling.logit_bias.assign(logit_bias.begin(), logit_bias.end());
    options.sampling.seed = seed;
    options.ignore_eos = ignore_eos;
    options.context_shift = context_shift;
    options.n_keep = n_keep;
    options.n_logprobs = n_logprobs;
    options.verification = parse_verification(verification);
    if (policy) {
        options.policy = parse_policy(*policy);
    }
    options.draft_limit = draft_limit;
    options.mask = std::move(grammar);
    options.trace = trace;
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

std::vector<Event> run_turn(BoundEngine& bound, double budget_ms) {
    const py::gil_scoped_release release;
    return bound.engine->turn(budget_ms);
}

void close_engine(BoundEngine& bound) {
    const py::gil_scoped_release release;
    bound.engine->close();
}

py::dict memory(const BoundEngine& bound) {
    py::dict bytes;
    bytes["target_weights"] = bound.target_model->size_bytes();
    bytes["drafter_weights"] = bound.drafter_model ? bound.drafter_model->size_bytes() : 0;
    const auto kept = [](const auto& n_bytes) { return n_bytes ? n_bytes->load() : 0; };
    bytes["target_context"] = bound.target_context_bytes + kept(bound.target_kept_bytes);
    bytes["draft_context"] = bound.draft_context_bytes + kept(bound.draft_kept_bytes);
    return bytes;
}

// (rule, temperature, sts, acceptance, offsets, maps); the last four may be empty.
using CalibrationTuple =
    std::tuple<std::string, double, std::vector<double>, std::vector<double>, std::vector<double>, std::vector<double>>;

std::vector<CalibrationEntry> make_calibration(const std::vector<CalibrationTuple>& tuples) {
    std::vector<CalibrationEntry> entries;
    for (const auto& [name, temperature, sts, acceptance, offsets, maps] : tuples) {
        const std::optional<Verification> rule = find_rule(name);
        if (!rule) {
            throw std::invalid_argument("calibration rule must be exact, rejection or block, got " + name);
        }
        entries.push_back({*rule, temperature, sts, acceptance, offsets, maps});
    }
    return entries;
}

py::dict measure_engine_costs(BoundEngine& bound, double budget_ms, bool look) {
    CostCurves curves;
    {
        const py::gil_scoped_release release;
        curves = look ? bound.engine->look_at_costs(budget_ms) : bound.engine->measure_costs(budget_ms);
    }
    return curves_to_dict(curves);
}

py::dict read_costs(const BoundEngine& bound) {
    CostCurves curves;
    {
        const py::gil_scoped_release release; // may wait for a step
        curves = bound.engine->costs();
    }
    return curves_to_dict(curves);
}

void set_engine_costs(BoundEngine& bound, const py::dict& dict) {
    const CostCurves curves = curves_from_dict(dict);
    const py::gil_scoped_release release;
    bound.engine->set_costs(curves);
}

double read_speedup(const BoundEngine& bound) {
    const py::gil_scoped_release release;
    return bound.engine->speedup();
}

// What the engine really runs with, for reports and for the key of measured costs.
py::dict settings(const BoundEngine& bound) {
    const LLMOptions& options = bound.options;
    py::dict dict;
    dict["n_ctx"] = options.n_ctx;
    dict["n_parallel"] = options.n_parallel;
    dict["n_batch"] = options.n_batch;
    dict["n_threads"] = options.n_threads;
    dict["n_threads_batch"] = options.n_threads_batch;
    dict["kv_type"] = options.kv_type;
    dict["head"] = options.head;
    dict["n_candidates"] = options.n_candidates;
    dict["draft_window"] = options.draft_window;
    dict["flash_attention"] = options.flash_attention.value_or(false);
    return dict;
}

void register_options(py::module_& module) {
    py::class_<RequestOptions>(module, "RequestOptions", py::is_final())
        .def(py::init(&make_request_options), py::kw_only(), py::arg("max_tokens") = 128, py::arg("temperature") = 1.0F,
             py::arg("top_k") = 0, py::arg("top_p") = 1.0F, py::arg("min_p") = 0.0F,
             py::arg("repetition_penalty") = 1.0F, py::arg("presence_penalty") = 0.0F,
             py::arg("frequency_penalty") = 0.0F, py::arg("penalty_window") = -1,
             py::arg("logit_bias") = std::map<int32_t, float>{}, py::arg("seed") = 0, py::arg("ignore_eos") = false,
             py::arg("context_shift") = false, py::arg("n_keep") = 0, py::arg("n_logprobs") = -1,
             py::arg("verification") = "auto", py::arg("policy") = py::none(), py::arg("draft_limit") = -1,
             py::arg("trace") = false, py::arg("grammar") = nullptr)
        .def_readonly("draft_limit", &RequestOptions::draft_limit);
}

// Of the request up to now: tokens of its rounds, their milliseconds, and those of plain decoding.
std::tuple<int32_t, double, double> progress_of(const Event& event) {
    const RequestStats& stats = event.stats;
    return {stats.n_committed, stats.rounds_ms(), stats.plain_ms};
}

void register_results(py::module_& module) {
    py::class_<TopLogprobs>(module, "TokenLogprobs")
        .def_readonly("logprob", &TopLogprobs::chosen)
        .def_readonly("top", &TopLogprobs::best);
    py::class_<RequestStats>(module, "RequestStats")
        .def_readonly("n_prompt", &RequestStats::n_prompt)
        .def_readonly("n_reused", &RequestStats::n_reused)
        .def_readonly("n_discarded", &RequestStats::n_discarded)
        .def_readonly("n_rounds", &RequestStats::n_rounds)
        .def_readonly("n_drafted", &RequestStats::n_drafted)
        .def_readonly("n_scheduled", &RequestStats::n_scheduled)
        .def_readonly("n_accepted", &RequestStats::n_accepted)
        .def_readonly("n_committed", &RequestStats::n_committed)
        .def_readonly("n_parked", &RequestStats::n_parked)
        .def_readonly("n_probes", &RequestStats::n_probes)
        .def_readonly("park_tokens", &RequestStats::park_tokens)
        .def_readonly("park_extra_ms", &RequestStats::park_extra_ms)
        .def_readonly("park_plain_ms", &RequestStats::park_plain_ms)
        .def_readonly("scheduled_per_position", &RequestStats::scheduled_per_position)
        .def_readonly("accepted_per_position", &RequestStats::accepted_per_position)
        .def_readonly("queue_ms", &RequestStats::queue_ms)
        .def_readonly("prefill_ms", &RequestStats::prefill_ms)
        .def_readonly("draft_ms", &RequestStats::draft_ms)
        .def_readonly("verify_ms", &RequestStats::verify_ms)
        .def_readonly("host_ms", &RequestStats::host_ms)
        .def_readonly("plain_ms", &RequestStats::plain_ms);
    py::class_<RoundRecord>(module, "RoundRecord")
        .def_readonly("n_drafted", &RoundRecord::n_drafted)
        .def_readonly("prefix_len", &RoundRecord::prefix_len)
        .def_readonly("n_accepted", &RoundRecord::n_accepted)
        .def_readonly("confidence_logits", &RoundRecord::confidence_logits)
        .def_readonly("draft_ms", &RoundRecord::draft_ms)
        .def_readonly("verify_ms", &RoundRecord::verify_ms);
    py::class_<Event>(module, "Event")
        .def_readonly("request_id", &Event::request_id)
        .def_readonly("tokens", &Event::tokens)
        .def_readonly("drafted", &Event::drafted)
        .def_readonly("logprobs", &Event::logprobs)
        .def_readonly("rounds", &Event::rounds)
        .def_property_readonly("finish_reason",
                               [](const Event& event) -> std::optional<std::string> {
                                   if (event.finish_reason == FinishReason::none) {
                                       return std::nullopt;
                                   }
                                   return finish_reason_name(event.finish_reason);
                               })
        .def_readonly("error", &Event::error)
        .def_property_readonly("progress", &progress_of)
        .def_property_readonly("stats", [](const Event& event) -> std::optional<RequestStats> {
            return event.finish_reason == FinishReason::none ? std::nullopt : std::optional(event.stats);
        });
    py::class_<EngineStats>(module, "EngineStats")
        .def_readonly("n_steps", &EngineStats::n_steps)
        .def_readonly("n_prefill_steps", &EngineStats::n_prefill_steps)
        .def_readonly("n_prefill_tokens", &EngineStats::n_prefill_tokens)
        .def_readonly("n_reused", &EngineStats::n_reused)
        .def_readonly("n_drafted", &EngineStats::n_drafted)
        .def_readonly("n_scheduled", &EngineStats::n_scheduled)
        .def_readonly("n_accepted", &EngineStats::n_accepted)
        .def_readonly("n_committed", &EngineStats::n_committed)
        .def_readonly("n_parked", &EngineStats::n_parked)
        .def_readonly("n_probes", &EngineStats::n_probes)
        .def_readonly("prefill_ms", &EngineStats::prefill_ms)
        .def_readonly("draft_ms", &EngineStats::draft_ms)
        .def_readonly("verify_ms", &EngineStats::verify_ms)
        .def_readonly("head_ms", &EngineStats::head_ms)
        .def_readonly("inject_ms", &EngineStats::inject_ms)
        .def_readonly("sample_ms", &EngineStats::sample_ms)
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
                         const std::string& policy, const std::string& objective,
                         const std::vector<CalibrationTuple>& calibration, int32_t draft_window, int32_t max_queue,
                         int32_t prefill_chunk, bool prefix_reuse, std::optional<bool> flash_attention,
                         int32_t n_workers, const std::optional<SyntheticOptions>& synthetic_acceptance) {
                 LLMOptions options;
                 options.n_ctx = n_ctx;
                 options.n_parallel = n_parallel;
                 options.n_batch = n_batch;
                 options.n_threads = n_threads;
                 options.n_threads_batch = n_threads_batch;
                 options.kv_type = kv_type;
                 options.head = head;
                 options.n_candidates = n_candidates;
                 options.policy = policy;
                 options.objective = objective;
                 options.calibration = make_calibration(calibration);
                 options.draft_window = draft_window;
                 options.max_queue = max_queue;
                 options.prefill_chunk = prefill_chunk;
                 options.prefix_reuse = prefix_reuse;
                 options.flash_attention = flash_attention;
                 options.n_workers = n_workers;
                 options.synthetic = synthetic_acceptance.value_or(SyntheticOptions{});
                 const py::gil_scoped_release release;
                 return make_engine(std::move(target), std::move(drafter), options);
             }),
             py::arg("target").none(false), py::arg("drafter") = nullptr, py::kw_only(), py::arg("n_ctx") = 0,
             py::arg("n_parallel") = 1, py::arg("n_batch") = 512, py::arg("n_threads") = 0,
             py::arg("n_threads_batch") = 0, py::arg("kv_type") = "f16", py::arg("head") = "candidates",
             py::arg("n_candidates") = kDefaultCandidates, py::arg("policy") = "full",
             py::arg("objective") = "throughput", py::arg("calibration") = std::vector<CalibrationTuple>{},
             py::arg("draft_window") = 4096, py::arg("max_queue") = 512, py::arg("prefill_chunk") = 64,
             py::arg("prefix_reuse") = true, py::arg("flash_attention") = py::none(), py::arg("n_workers") = -1,
             py::arg("synthetic_acceptance") = py::none())
        .def("submit", &submit_request, py::arg("prompt"), py::arg("options").none(false))
        .def("step", &run_step)
        .def("turn", &run_turn, py::arg("budget_ms"))
        .def(
            "cancel", [](BoundEngine& bound, uint64_t id) { return bound.engine->cancel(id); }, py::arg("request_id"))
        .def("close", &close_engine)
        .def("measure_costs", &measure_engine_costs, py::kw_only(), py::arg("budget_ms") = 3000.0,
             py::arg("look") = false)
        .def("set_costs", &set_engine_costs, py::arg("curves"))
        .def_property_readonly("costs", &read_costs)
        .def_property_readonly("settings", &settings)
        .def_property_readonly("speedup", &read_speedup)
        .def_property_readonly("has_work", [](const BoundEngine& bound) { return bound.engine->has_work(); })
        .def_property_readonly("n_ctx", [](const BoundEngine& bound) { return bound.engine->options().n_ctx; })
        .def_property_readonly("can_shift", [](const BoundEngine& bound) { return bound.engine->can_shift(); })
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
