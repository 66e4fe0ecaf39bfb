// The sequential head's graph form for the tests, as `_core._graph_head`. Not part of the public interface.
#include "bindings.h"
#include "block_graph.h"
#include "graph_head.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dspark {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <class T> py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <class T> void read(const py::dict& from, const char* key, T& into) {
    if (from.contains(key)) {
        into = from[key].cast<T>();
    }
}

MarkovHeadType head_type(const std::string& name) {
    return name == "vanilla" ? MarkovHeadType::vanilla
           : name == "gated" ? MarkovHeadType::gated
           : name == "rnn"   ? MarkovHeadType::rnn
                             : MarkovHeadType::none;
}

// A test's head: owns the weights' bytes, which the head views.
class TestHead {
  public:
    TestHead(const py::dict& weights, const GraphHeadOptions& options)
        : head_(make_graph_head(read_weights(weights), options)) {}

    // Per input: tokens, p^d as (ids, probs) per slot, confidence logits, and U + B as (ids, logits) per slot.
    py::list draft_blocks(const std::vector<py::dict>& from) {
        std::vector<HeldInput> held(from.size());
        std::vector<BlockInput> inputs;
        std::vector<BlockDraft> drafts(from.size());
        std::vector<std::vector<SlotTrace>> traces(from.size());
        for (size_t i = 0; i < from.size(); ++i) {
            hold(from[i], held[i]);
            inputs.push_back(held[i].input);
            drafts[i].trace = &traces[i];
        }
        {
            const py::gil_scoped_release unlocked;
            head_->draft_blocks(inputs, drafts);
        }
        py::list out;
        for (const BlockDraft& draft : drafts) {
            out.append(to_tuple(draft));
        }
        return out;
    }

  private:
    struct HeldInput {
        FloatArray base_logits;
        FloatArray hidden;
        std::vector<const float*> base_rows;
        std::vector<const float*> hidden_rows;
        std::vector<Candidates> candidates;
        BlockInput input;
    };

    // Tables come as (type name, bytes, n_rows, n_cols), the rest as in `_math.draft_blocks`.
    HeadWeights read_weights(const py::dict& from) {
        HeadWeights weights;
        weights.type = head_type(from["type"].cast<std::string>());
        read(from, "n_vocab", weights.n_vocab);
        read(from, "hidden_size", weights.hidden_size);
        read(from, "rank", weights.rank);
        read(from, "gate_bias", weights.gate_bias);
        read(from, "joint_bias", weights.joint_bias);
        read(from, "d2t", weights.d2t);
        read(from, "logit_softcap", weights.logit_softcap);
        weights.w1 = table(from, "w1");
        weights.w2 = table(from, "w2");
        weights.gate = table(from, "gate");
        weights.joint = table(from, "joint");
        if (from.contains("confidence")) {
            weights.confidence.emplace(from["confidence"].cast<std::vector<float>>(),
                                       from["confidence_bias"].cast<float>(), weights.hidden_size, weights.rank);
        }
        return weights;
    }

    RowTable table(const py::dict& from, const char* key) {
        if (!from.contains(key)) {
            return {};
        }
        const auto [type_name, bytes, n_rows, n_cols] =
            from[key].cast<std::tuple<std::string, std::string, int64_t, int64_t>>();
        const std::string& kept = *storage_.emplace_back(std::make_unique<std::string>(bytes));
        return make_row_table(type_name, std::as_bytes(std::span(kept)), n_rows, n_cols);
    }

    static void hold(const py::dict& from, HeldInput& held) {
        hold_rows(from, "hidden", held.hidden, held.hidden_rows);
        hold_rows(from, "base_logits", held.base_logits, held.base_rows);
        if (from.contains("candidates")) {
            for (auto& [ids, logits] :
                 from["candidates"].cast<std::vector<std::pair<std::vector<int32_t>, std::vector<float>>>>()) {
                held.candidates.push_back({ids, logits});
            }
        }
        held.input.base_logits = held.base_rows;
        held.input.hidden = held.hidden_rows;
        held.input.candidates = held.candidates;
        uint64_t seed = 0;
        read(from, "seed", seed);
        held.input.random = RandomStream(seed);
        read(from, "temperature", held.input.truncation.temperature);
        read(from, "anchor", held.input.anchor);
        read(from, "start", held.input.start);
    }

    static void hold_rows(const py::dict& from, const char* key, FloatArray& array, std::vector<const float*>& rows) {
        if (from.contains(key)) {
            array = from[key].cast<FloatArray>();
            for (py::ssize_t row = 0; row < array.shape(0); ++row) {
                rows.push_back(array.data(row, 0));
            }
        }
    }

    static py::tuple to_tuple(const BlockDraft& draft) {
        py::list probs;
        py::list logits;
        for (const Distribution& distribution : draft.probs) {
            probs.append(py::make_tuple(to_array(distribution.ids), to_array(distribution.probs)));
        }
        for (const SlotTrace& slot : *draft.trace) {
            std::vector<float> sums(slot.ids.size());
            for (size_t i = 0; i < sums.size(); ++i) {
                sums[i] = slot.base_logits[i] + slot.transition_bias[i];
            }
            logits.append(py::make_tuple(to_array(slot.ids), to_array(sums)));
        }
        return py::make_tuple(to_array(draft.tokens), probs, to_array(draft.confidence_logits), logits);
    }

    std::vector<std::unique_ptr<std::string>> storage_;
    std::unique_ptr<SequentialHead> head_;
};

} // namespace
} // namespace dspark

void register_graph_head(py::module_& core) {
    auto m = core.def_submodule("_graph_head", "The sequential head as a ggml graph, for tests only.");
    py::class_<dspark::TestHead>(m, "GraphHead", py::is_final())
        .def(py::init([](const py::dict& weights, const std::string& device, int32_t n_threads, int32_t n_candidates,
                         int32_t max_requests) {
                 return std::make_unique<dspark::TestHead>(
                     weights, dspark::GraphHeadOptions{device, n_threads, n_candidates, max_requests});
             }),
             py::arg("weights"), py::kw_only(), py::arg("device") = "", py::arg("n_threads") = 1,
             py::arg("n_candidates") = dspark::kDefaultCandidates, py::arg("max_requests") = 1)
        .def("draft_blocks", &dspark::TestHead::draft_blocks, py::arg("inputs"));
}
