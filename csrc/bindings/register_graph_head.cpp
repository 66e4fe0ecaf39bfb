// The sequential head's graph form for the tests, as `_core._graph_head`. Not part of the public interface.
#include "bindings.h"
#include "block_graph.h"
#include "graph_head.h"
#include "head_arrays.h"

#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace dspark {
namespace {

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
            out.append(draft_to_tuple(draft));
        }
        return out;
    }

  private:
    // Tables come as (type name, bytes, n_rows, n_cols), the rest as in `_math.draft_blocks`.
    HeadWeights read_weights(const py::dict& from) {
        return read_head_weights(from, [&](const char* key) { return table(from, key); });
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
        hold_block(from, held);
        uint64_t seed = 0;
        read(from, "seed", seed);
        held.input.random = RandomStream(seed);
        read(from, "temperature", held.input.truncation.temperature);
    }

    static py::tuple draft_to_tuple(const BlockDraft& draft) {
        py::list probs;
        py::list logits;
        for (const Distribution& distribution : draft.probs) {
            probs.append(to_tuple(distribution));
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
