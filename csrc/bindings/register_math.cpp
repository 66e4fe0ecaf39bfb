// The pure mathematics for the tests, as `_core._math`. Not part of the public interface: plain functions on arrays and
// dicts, no classes, so that it cannot clash with what the other bindings register.
#include "acceptance.h"
#include "bindings.h"
#include "confidence_head.h"
#include "head_arrays.h"
#include "random.h"
#include "rule_names.h"
#include "sampling.h"
#include "sequential_head.h"
#include "verification_simulation.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dspark {
namespace {

using IdArray = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

template <class T, int Flags> std::span<const T> as_span(const py::array_t<T, Flags>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

SamplingOptions sampling_options(const py::dict& from) {
    SamplingOptions options;
    read(from, "temperature", options.temperature);
    read(from, "top_p", options.top_p);
    read(from, "min_p", options.min_p);
    read(from, "top_k", options.top_k);
    read(from, "repetition_penalty", options.repetition_penalty);
    read(from, "presence_penalty", options.presence_penalty);
    read(from, "frequency_penalty", options.frequency_penalty);
    read(from, "penalty_window", options.penalty_window);
    read(from, "logit_bias", options.logit_bias);
    read(from, "seed", options.seed);
    options.validate();
    return options;
}

TokenCounts token_counts(const std::vector<int32_t>& prompt, const std::vector<int32_t>& output, int32_t window = -1) {
    TokenCounts counts(window);
    for (const int32_t id : prompt) {
        counts.push_prompt(id);
    }
    for (const int32_t id : output) {
        counts.push_output(id);
    }
    return counts;
}

// A row of probabilities over the vocabulary; zeros are left out.
Distribution sparse(std::span<const float> dense) {
    Distribution out;
    for (size_t id = 0; id < dense.size(); ++id) {
        if (dense[id] > 0.0f) {
            out.ids.push_back(static_cast<int32_t>(id));
            out.probs.push_back(dense[id]);
        }
    }
    return out;
}

std::vector<Distribution> sparse_rows(const FloatArray& dense) {
    std::vector<Distribution> rows;
    const auto width = static_cast<size_t>(dense.shape(1));
    for (size_t i = 0; i < static_cast<size_t>(dense.shape(0)); ++i) {
        rows.push_back(sparse(as_span(dense).subspan(i * width, width)));
    }
    return rows;
}

void register_random(py::module_& m) {
    m.def("philox",
          [](const RandomStream::Block& counter, uint64_t key) { return RandomStream::philox(counter, key); });
    m.def("uniform", [](uint64_t seed, const std::string& purpose, uint64_t position, uint64_t start) {
        const RandomStream random(seed);
        return purpose == "target_sample"  ? random.target_sample(position)
               : purpose == "residual"     ? random.residual(position)
               : purpose == "draft_sample" ? random.draft_sample(start, position)
                                           : random.accept_test(start, position);
    });
}

void register_sampling(py::module_& m) {
    m.def("target_distribution", [](const FloatArray& logits, const py::dict& options,
                                    const std::vector<int32_t>& prompt, const std::vector<int32_t>& output) {
        Distribution out;
        const SamplingOptions read = sampling_options(options);
        DistributionBuilder().target_distribution(as_span(logits), read,
                                                  token_counts(prompt, output, read.penalty_window), out);
        return to_tuple(out);
    });
    m.def("argmax_token", [](const FloatArray& logits, const py::dict& options, const std::vector<int32_t>& prompt,
                             const std::vector<int32_t>& output) {
        const SamplingOptions read = sampling_options(options);
        return DistributionBuilder().argmax_token(as_span(logits), read,
                                                  token_counts(prompt, output, read.penalty_window));
    });
    m.def("candidate_distribution", [](std::vector<int32_t> ids, std::vector<float> logits, const py::dict& options) {
        Distribution out;
        DistributionBuilder().candidate_distribution({std::move(ids), std::move(logits)},
                                                     sampling_options(options).truncation(), out);
        return to_tuple(out);
    });
    m.def("select_top_k", [](const FloatArray& logits, int32_t k) {
        Candidates out;
        DistributionBuilder().select_top_k(as_span(logits), k, out);
        return py::make_tuple(to_array(out.ids), to_array(out.logits));
    });
    m.def("sample", [](std::vector<int32_t> ids, std::vector<float> probs, const std::vector<double>& uniforms) {
        const Distribution distribution{std::move(ids), std::move(probs)};
        std::vector<int32_t> tokens;
        for (const double u : uniforms) {
            tokens.push_back(sample(distribution, u));
        }
        return to_array(tokens);
    });
    m.def("top_logprobs", [](const FloatArray& logits, int32_t chosen, int32_t n_best) {
        auto out = top_logprobs(as_span(logits), chosen, n_best);
        return py::make_tuple(out.chosen, std::move(out.best));
    });
}

// `pushes_and_pops`: positive = push_output, negative = pop_output of -(id + 1).
std::vector<std::array<int32_t, 3>> replay_counts(const std::vector<int32_t>& prompt,
                                                  const std::vector<int32_t>& pushes_and_pops, int32_t window) {
    TokenCounts counts = token_counts(prompt, {}, window);
    for (const int32_t id : pushes_and_pops) {
        id >= 0 ? counts.push_output(id) : counts.pop_output(-id - 1);
    }
    std::vector<std::array<int32_t, 3>> out;
    for (const auto& entry : counts.entries()) {
        out.push_back({entry.id, entry.n_prompt, entry.n_output});
    }
    return out;
}

// Target and draft probabilities are dense rows; also returns which target rows were asked for, in order.
py::tuple verify_once(const std::string& rule, const std::vector<int32_t>& draft_tokens, const FloatArray& draft_probs,
                      const FloatArray& target_probs, uint64_t start, uint64_t seed) {
    const auto draft = sparse_rows(draft_probs);
    const auto target = sparse_rows(target_probs);
    std::vector<int32_t> rows_read;
    const auto verdict = verify(parse_rule(rule), {draft_tokens, draft, start, RandomStream(seed)},
                                [&](int32_t row) -> const Distribution& {
                                    rows_read.push_back(row);
                                    return target.at(static_cast<size_t>(row));
                                });
    return py::make_tuple(verdict.n_accepted, verdict.next_token, rows_read);
}

SimulationOptions simulation_options(const py::dict& from) {
    SimulationOptions options;
    std::string rule = "exact";
    std::string draft_length = "fixed";
    read(from, "rule", rule);
    read(from, "draft_length", draft_length);
    read(from, "block_size", options.block_size);
    read(from, "n_tokens", options.n_tokens);
    read(from, "anchor", options.anchor);
    options.rule = parse_rule(rule);
    options.draft_length = draft_length == "fixed" ? DraftLength::fixed : DraftLength::from_last_round;
    options.sampling = sampling_options(from);
    return options;
}

void register_acceptance(py::module_& m) {
    m.def("replay_counts", &replay_counts, py::arg("prompt"), py::arg("pushes_and_pops"), py::arg("window") = -1);
    m.def("verify", &verify_once);
    m.def("simulate", [](const FloatArray& target_logits, const FloatArray& draft_logits, const py::dict& options,
                         int64_t n_trials) {
        Simulation simulation(as_span(target_logits), as_span(draft_logits),
                              static_cast<size_t>(target_logits.shape(0)), simulation_options(options));
        SimulationResult result;
        {
            const py::gil_scoped_release unlocked;
            result = simulation.run(n_trials);
        }
        return py::make_tuple(to_array(result.sequence_counts), to_array(result.first_round_accepted));
    });
    m.def("generate", [](const FloatArray& target_logits, const FloatArray& draft_logits, const py::dict& options) {
        const auto simulated = simulation_options(options);
        Simulation simulation(as_span(target_logits), as_span(draft_logits),
                              static_cast<size_t>(target_logits.shape(0)), simulated);
        std::vector<int32_t> tokens = simulation.generate(simulated.sampling.seed);
        tokens.resize(static_cast<size_t>(simulated.n_tokens) + 1);
        return to_array(tokens);
    });
}

void decode_f32(const void* src, float* dst, int64_t n) {
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
}

RowTable row_table(const py::dict& weights, const char* key) {
    if (!weights.contains(key)) {
        return {};
    }
    const auto array = weights[key].cast<FloatArray>();
    if (array.ptr() != py::object(weights[key]).ptr()) {
        throw std::invalid_argument(std::string(key) + " must be a contiguous float32 array, got another kind");
    }
    return {reinterpret_cast<const std::byte*>(array.data()), static_cast<size_t>(array.shape(1)) * sizeof(float),
            array.shape(0), array.shape(1), &decode_f32};
}

HeadWeights head_weights(const py::dict& from) {
    return read_head_weights(from, [&](const char* key) { return row_table(from, key); });
}

void hold_input(const py::dict& from, HeldInput& held) {
    hold_block(from, held);
    held.sampling = sampling_options(from);
    held.input.truncation = held.sampling.truncation();
    held.input.random = RandomStream(held.sampling.seed);
    if (from.contains("output")) { // the tokens generated so far: the draft follows the penalties
        held.counts = token_counts({}, from["output"].cast<std::vector<int32_t>>());
        held.input.sampling = &held.sampling;
        held.input.counts = &held.counts;
    }
}

py::dict draft_to_dict(const BlockDraft& draft, const std::vector<SlotTrace>& trace) {
    py::list probs;
    py::list slots;
    for (const auto& distribution : draft.probs) {
        probs.append(to_tuple(distribution));
    }
    for (const auto& slot : trace) {
        slots.append(py::dict(py::arg("ids") = to_array(slot.ids), py::arg("base_logits") = to_array(slot.base_logits),
                              py::arg("transition_bias") = to_array(slot.transition_bias),
                              py::arg("embedding") = to_array(slot.embedding),
                              py::arg("state") = to_array(slot.state)));
    }
    return py::dict(py::arg("tokens") = to_array(draft.tokens), py::arg("probs") = probs, py::arg("trace") = slots,
                    py::arg("confidence_logits") = to_array(draft.confidence_logits));
}

// `n_candidates` = 0: the full head.
py::list draft_blocks(const py::dict& weights, int32_t n_candidates, const std::vector<py::dict>& inputs,
                      int32_t n_followers) {
    const auto head = n_candidates == 0 ? make_full_head(head_weights(weights))
                                        : make_candidate_head(head_weights(weights), n_candidates, n_followers);
    std::vector<HeldInput> held(inputs.size());
    std::vector<BlockInput> block_inputs;
    std::vector<BlockDraft> drafts(inputs.size());
    std::vector<std::vector<SlotTrace>> traces(inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
        hold_input(inputs[i], held[i]);
        block_inputs.push_back(held[i].input);
        drafts[i].trace = &traces[i];
    }
    head->draft_blocks(block_inputs, drafts);
    py::list out;
    for (size_t i = 0; i < inputs.size(); ++i) {
        out.append(draft_to_dict(drafts[i], traces[i]));
    }
    return out;
}

} // namespace
} // namespace dspark

void register_math(py::module_& module) {
    auto m = module.def_submodule("_math", "Pure mathematics, for tests only.");
    dspark::register_random(m);
    dspark::register_sampling(m);
    dspark::register_acceptance(m);
    m.def("draft_blocks", &dspark::draft_blocks, py::arg("weights"), py::arg("n_candidates"), py::arg("inputs"),
          py::arg("n_followers") = 0);
}
