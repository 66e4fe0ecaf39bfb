// The scheduler and its parts for the tests, as `_core._scheduling`: policies on lists, the cost table, the survival
// estimator, and the scheduler as a whole with its times given by the caller. Not part of the public interface.
#include "bindings.h"
#include "cost_dicts.h"
#include "head_arrays.h"
#include "rule_names.h"
#include "scheduler.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

namespace py = pybind11;

namespace dspark {
namespace {

py::tuple parsed_policy(const std::string& text) {
    static constexpr const char* kNames[] = {"off", "fixed", "threshold", "algorithm1", "adaptive"};
    const Policy policy = parse_policy(text);
    return py::make_tuple(kNames[static_cast<size_t>(policy.kind)], policy.length, policy.threshold);
}

// ---- policies on lists ----

// Blocks and what their spans point into.
struct Blocks {
    explicit Blocks(const std::vector<py::dict>& dicts) : rates(dicts.size() * 2) {
        for (size_t i = 0; i < dicts.size(); ++i) {
            rates[2 * i] = dicts[i]["confidence"].cast<std::vector<double>>();
            rates[2 * i + 1] = rates[2 * i];
            read(dicts[i], "expected", rates[2 * i + 1]);
            DraftedBlock block{static_cast<int32_t>(rates[2 * i].size()), rates[2 * i], rates[2 * i + 1]};
            read(dicts[i], "most", block.most);
            read(dicts[i], "is_free", block.is_free);
            read(dicts[i], "weight", block.weight);
            read(dicts[i], "entry_ms", block.entry_ms);
            blocks.push_back(block);
        }
    }
    void require_costs(const std::vector<double>& cost_ms) const {
        size_t n_rows = 0;
        for (size_t i = 0; i < blocks.size(); ++i) {
            n_rows += static_cast<size_t>(blocks[i].most);
            if (static_cast<size_t>(blocks[i].most) > std::min(rates[2 * i].size(), rates[2 * i + 1].size())) {
                throw std::invalid_argument("most must be at most the number of rates");
            }
        }
        if (cost_ms.size() <= n_rows) {
            throw std::invalid_argument("cost_ms must hold a time for every number of rows");
        }
    }

    std::vector<std::vector<double>> rates;
    std::vector<DraftedBlock> blocks;
};

std::vector<int32_t> run_algorithm1(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms,
                                    int32_t n_requests) {
    const Blocks blocks(dicts);
    blocks.require_costs(cost_ms);
    std::vector<int32_t> prefix_len(dicts.size());
    algorithm1_prefixes(blocks.blocks, cost_ms, n_requests, prefix_len);
    return prefix_len;
}

py::tuple run_adaptive(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms, double price) {
    const Blocks blocks(dicts);
    blocks.require_costs(cost_ms);
    std::vector<int32_t> prefix_len(dicts.size());
    const double gain = adaptive_prefixes(blocks.blocks, cost_ms, price, prefix_len);
    return py::make_tuple(gain, prefix_len);
}

int32_t run_equal(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms, double price) {
    const Blocks blocks(dicts);
    blocks.require_costs(cost_ms);
    return equal_prefix(blocks.blocks, cost_ms, price);
}

py::dict choice_to_dict(const DraftChoice& choice) {
    py::dict dict;
    dict["is_drafting"] = std::vector<bool>(choice.is_drafting.begin(), choice.is_drafting.end());
    dict["gain_tokens"] = choice.gain_tokens;
    dict["verify_gain_tokens"] = choice.verify_gain_tokens;
    dict["tokens_per_ms"] = choice.tokens_per_ms;
    dict["n_tokens"] = choice.n_tokens;
    dict["extra_ms"] = choice.extra_ms;
    return dict;
}

void require_draft_costs(const Blocks& blocks, const std::vector<double>& cost_ms,
                         const std::vector<double>& draft_ms) {
    blocks.require_costs(cost_ms);
    if (draft_ms.size() <= blocks.blocks.size()) {
        throw std::invalid_argument("draft_ms must hold a time for every number of blocks");
    }
}

py::dict run_choice(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms,
                    const std::vector<double>& draft_ms, double price, double bonus_tokens) {
    const Blocks blocks(dicts);
    require_draft_costs(blocks, cost_ms, draft_ms);
    return choice_to_dict(choose_drafting(blocks.blocks, {cost_ms, draft_ms, bonus_tokens}, price));
}

py::dict run_fastest(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms,
                     const std::vector<double>& draft_ms, int32_t n_requests) {
    const Blocks blocks(dicts);
    require_draft_costs(blocks, cost_ms, draft_ms);
    return choice_to_dict(choose_fastest_drafting(blocks.blocks, {cost_ms, draft_ms, 0}, n_requests));
}

bool run_could_pay(const std::vector<py::dict>& dicts, const std::vector<double>& cost_ms,
                   const std::vector<double>& draft_ms, int32_t n_requests) {
    const Blocks blocks(dicts);
    require_draft_costs(blocks, cost_ms, draft_ms);
    return could_pay(blocks.blocks, {cost_ms, draft_ms, 0}, n_requests);
}

int32_t run_threshold(const py::dict& dict, double threshold) {
    return threshold_prefix(Blocks({dict}).blocks[0], threshold);
}

void register_policies(py::module_& module) {
    module.def("parse_policy", &parsed_policy);
    module.def("threshold_prefix", &run_threshold);
    module.def("algorithm1", &run_algorithm1, py::arg("blocks"), py::arg("cost_ms"), py::arg("n_requests"));
    module.def("adaptive", &run_adaptive, py::arg("blocks"), py::arg("cost_ms"), py::arg("tokens_per_ms"));
    module.def("equal_prefix", &run_equal, py::arg("blocks"), py::arg("cost_ms"), py::arg("tokens_per_ms"));
    module.def("choose_drafting", &run_choice, py::arg("blocks"), py::arg("cost_ms"), py::arg("draft_ms"),
               py::arg("tokens_per_ms"), py::arg("bonus_tokens") = 0.0);
    module.def("could_pay", &run_could_pay, py::arg("blocks"), py::arg("cost_ms"), py::arg("draft_ms"),
               py::arg("n_requests"));
    module.def("choose_fastest_drafting", &run_fastest, py::arg("blocks"), py::arg("cost_ms"), py::arg("draft_ms"),
               py::arg("n_requests"));
}

// ---- costs ----

void register_costs(py::module_& module) {
    module.def("context_bucket", &context_bucket);
    py::class_<Overrun>(module, "Overrun")
        .def(py::init<>())
        .def("learn", &Overrun::learn, py::arg("n_steps"))
        .def("fade", &Overrun::fade)
        .def_property_readonly("n_steps", &Overrun::n_steps);
    py::class_<Trial>(module, "Trial")
        .def(py::init<>())
        .def("goes_on", &Trial::goes_on, py::arg("promised_speedup"), py::arg("step_ms"), py::arg("entry_ms"))
        .def("succeed", &Trial::succeed)
        .def("earn", &Trial::earn, py::arg("parked_ms"))
        .def("gain", &Trial::gain, py::arg("gained_ms"), py::arg("plain_ms"));
    py::class_<OverheadLine>(module, "OverheadLine")
        .def(py::init<>())
        .def("push", &OverheadLine::push, py::arg("n_rows"), py::arg("ms"))
        .def("at", &OverheadLine::at, py::arg("n_rows"));
    py::class_<CostTable>(module, "CostTable")
        .def(py::init([](const std::optional<py::dict>& curves) {
                 return curves ? CostTable(curves_from_dict(*curves)) : CostTable();
             }),
             py::arg("curves") = py::none())
        .def(
            "verify_ms",
            [](const CostTable& table, int32_t n_rows, int32_t n_prefill, int32_t n_cells, bool is_repeat,
               bool is_behind_draft, int32_t n_sequences) {
                return table.verify_ms({n_rows, n_prefill, {n_cells, n_sequences}, is_repeat, is_behind_draft});
            },
            py::arg("n_rows"), py::arg("n_prefill_rows") = 0, py::arg("n_cells") = 0, py::arg("is_repeat") = false,
            py::arg("is_behind_draft") = false, py::arg("n_sequences") = 1)
        .def(
            "draft_ms",
            [](const CostTable& table, int32_t n_blocks, int32_t n_cells) {
                return table.draft_ms(n_blocks, {n_cells});
            },
            py::arg("n_blocks"), py::arg("n_cells") = 0)
        .def(
            "observe_verify",
            [](CostTable& table, int32_t n_rows, double ms, int32_t n_prefill, int32_t n_cells, bool is_repeat,
               int32_t n_sequences) {
                table.observe_verify({n_rows, n_prefill, {n_cells, n_sequences}, is_repeat}, ms);
            },
            py::arg("n_rows"), py::arg("ms"), py::arg("n_prefill_rows") = 0, py::arg("n_cells") = 0,
            py::arg("is_repeat") = false, py::arg("n_sequences") = 1)
        .def(
            "observe_draft",
            [](CostTable& table, int32_t n_blocks, double ms, int32_t n_cells) {
                table.observe_draft(n_blocks, {n_cells}, ms);
            },
            py::arg("n_blocks"), py::arg("ms"), py::arg("n_cells") = 0)
        .def_property_readonly("curves", [](const CostTable& table) { return curves_to_dict(table.curves()); })
        .def("slowdown", &CostTable::slowdown, py::arg("is_of_draft") = true);
}

// ---- survivals ----

using CalibrationTuple =
    std::tuple<std::string, double, std::vector<double>, std::vector<double>, std::vector<double>, std::vector<double>>;
using KeyTuple = std::tuple<uint64_t, std::string, double>; // request, rule, temperature

SurvivalKey key_of(const KeyTuple& tuple) {
    return {std::get<0>(tuple), parse_rule(std::get<1>(tuple)), std::get<2>(tuple)};
}

std::vector<CalibrationEntry> entries_of(const std::vector<CalibrationTuple>& tuples) {
    std::vector<CalibrationEntry> entries;
    for (const auto& [rule, temperature, sts, acceptance, offsets, maps] : tuples) {
        entries.push_back({parse_rule(rule), temperature, sts, acceptance, offsets, maps});
    }
    return entries;
}

struct BoundEstimator {
    BoundEstimator(int32_t n_slots, const std::vector<CalibrationTuple>& calibration)
        : block_size(static_cast<size_t>(n_slots)), estimator(n_slots, entries_of(calibration)) {}

    std::vector<double> expect(const KeyTuple& key) {
        std::vector<double> rates(block_size);
        estimator.expect(key_of(key), rates);
        return rates;
    }
    std::vector<double> read_confidence(const KeyTuple& key, const std::vector<float>& logits) {
        std::vector<double> rates(block_size);
        estimator.read_confidence(key_of(key), logits, rates);
        return rates;
    }

    size_t block_size;
    SurvivalEstimator estimator;
};

void register_survival(py::module_& module) {
    py::class_<BoundEstimator>(module, "SurvivalEstimator")
        .def(py::init<int32_t, const std::vector<CalibrationTuple>&>(), py::arg("block_size"),
             py::arg("calibration") = std::vector<CalibrationTuple>())
        .def("expect", &BoundEstimator::expect)
        .def("read_confidence", &BoundEstimator::read_confidence)
        .def("observe",
             [](BoundEstimator& bound, const KeyTuple& key, const std::vector<float>& logits, int32_t prefix_len,
                int32_t n_accepted) { bound.estimator.observe(key_of(key), logits, prefix_len, n_accepted); })
        .def("fade", [](BoundEstimator& bound, uint64_t request) { bound.estimator.fade(request); })
        .def("forget", [](BoundEstimator& bound, uint64_t request) { bound.estimator.forget(request); })
        .def_property_readonly("n_requests", [](const BoundEstimator& bound) { return bound.estimator.n_requests(); });
}

// ---- the scheduler ----

// A scheduler and the proposals of the step under way.
class BoundScheduler {
  public:
    explicit BoundScheduler(SchedulerOptions options) : scheduler_(std::move(options)) {}

    std::vector<std::string> select(const std::vector<py::dict>& requests, int32_t n_prefill_rows, int32_t n_cells) {
        static constexpr const char* kNames[] = {"none", "draft", "probe", "timed", "parked"};
        proposals_.clear();
        for (const py::dict& request : requests) {
            proposals_.push_back(read_proposal(request));
        }
        load_ = {n_prefill_rows, {n_cells, std::max(1, static_cast<int32_t>(requests.size()))}};
        scheduler_.select(proposals_, load_);
        std::vector<std::string> decisions;
        for (const Proposal& proposal : proposals_) {
            decisions.emplace_back(kNames[static_cast<size_t>(proposal.decision)]);
        }
        return decisions;
    }

    // logits[i]: of request i; empty where it did not draft or has no confidence head.
    std::vector<int32_t> schedule(std::vector<std::vector<float>> logits) {
        logits_ = std::move(logits);
        logits_.resize(proposals_.size());
        for (size_t i = 0; i < proposals_.size(); ++i) {
            proposals_[i].confidence_logits = logits_[i];
        }
        std::vector<int32_t> prefix_len(proposals_.size());
        scheduler_.schedule(proposals_, load_, prefix_len);
        return prefix_len;
    }

    void observe_round(size_t i, int32_t prefix_len, int32_t n_accepted) {
        scheduler_.observe_round(proposals_.at(i), prefix_len, n_accepted);
    }
    void observe_step(int32_t n_drafting, int32_t n_drafted_rows, int32_t n_committed, double draft_ms,
                      double inject_ms, double verify_ms, double total_ms) {
        scheduler_.observe_step(load_, {static_cast<int32_t>(proposals_.size()), n_drafting, n_drafted_rows},
                                n_committed, {draft_ms, inject_ms, verify_ms, total_ms});
    }
    void finish(uint64_t request_id, int32_t n_generated) { scheduler_.finish(request_id, n_generated); }
    [[nodiscard]] double speedup() const { return scheduler_.speedup(); }
    [[nodiscard]] py::dict costs() const { return curves_to_dict(scheduler_.costs().curves()); }
    [[nodiscard]] std::tuple<double, double, double> outlook() const {
        const Scheduler::Outlook& outlook = scheduler_.outlook();
        return {outlook.n_tokens, outlook.extra_ms, outlook.plain_ms};
    }

  private:
    [[nodiscard]] Proposal read_proposal(const py::dict& request) const {
        Proposal proposal;
        proposal.policy = scheduler_.options().policy;
        proposal.most = scheduler_.options().block_size;
        std::string rule = "exact";
        std::string policy;
        read(request, "id", proposal.key.request_id);
        read(request, "rule", rule);
        read(request, "temperature", proposal.key.temperature);
        read(request, "most", proposal.most);
        read(request, "n_waiting", proposal.n_waiting);
        read(request, "n_written", proposal.n_written);
        read(request, "n_left", proposal.n_left);
        read(request, "policy", policy);
        proposal.key.rule = parse_rule(rule);
        proposal.is_free = proposal.key.rule == Verification::exact;
        if (!policy.empty()) {
            proposal.policy = parse_policy(policy);
        }
        return proposal;
    }

    Scheduler scheduler_;
    std::vector<Proposal> proposals_;
    std::vector<std::vector<float>> logits_;
    StepLoad load_;
};

std::unique_ptr<BoundScheduler> make_scheduler(const std::string& policy, const std::string& objective,
                                               bool equal_lengths, int32_t block_size,
                                               const std::optional<py::dict>& costs,
                                               const std::vector<CalibrationTuple>& calibration) {
    SchedulerOptions options;
    options.policy = parse_policy(policy);
    options.objective = objective == "latency" ? Objective::latency : Objective::throughput;
    options.equal_lengths = equal_lengths;
    options.block_size = block_size;
    if (costs) {
        options.costs = curves_from_dict(*costs);
    }
    options.calibration = entries_of(calibration);
    return std::make_unique<BoundScheduler>(std::move(options));
}

void register_whole(py::module_& module) {
    py::class_<BoundScheduler>(module, "Scheduler")
        .def(py::init(&make_scheduler), py::kw_only(), py::arg("policy") = "adaptive",
             py::arg("objective") = "throughput", py::arg("equal_lengths") = false, py::arg("block_size") = 7,
             py::arg("costs") = py::none(), py::arg("calibration") = std::vector<CalibrationTuple>())
        .def("select", &BoundScheduler::select, py::arg("requests"), py::arg("n_prefill_rows") = 0,
             py::arg("n_cells") = 0)
        .def("schedule", &BoundScheduler::schedule, py::arg("logits"))
        .def("observe_round", &BoundScheduler::observe_round)
        .def("observe_step", &BoundScheduler::observe_step, py::kw_only(), py::arg("n_drafting"),
             py::arg("n_drafted_rows"), py::arg("n_committed"), py::arg("draft_ms"), py::arg("inject_ms") = 0.0,
             py::arg("verify_ms"), py::arg("total_ms"))
        .def("finish", &BoundScheduler::finish)
        .def_property_readonly("speedup", &BoundScheduler::speedup)
        .def_property_readonly("costs", &BoundScheduler::costs)
        .def_property_readonly("outlook", &BoundScheduler::outlook);
}

} // namespace
} // namespace dspark

void register_scheduler(py::module_& module) {
    py::module_ scheduling = module.def_submodule("_scheduling", "Only for the test suite.");
    dspark::register_policies(scheduling);
    dspark::register_costs(scheduling);
    dspark::register_survival(scheduling);
    dspark::register_whole(scheduling);
}
