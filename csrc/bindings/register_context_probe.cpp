// For the test suite: drafts on the real models at chosen points of a text, with the context queue of a chosen size.
#include "bindings.h"
#include "llama_drafter.h"
#include "llama_target.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

namespace py = pybind11;
using namespace dspark;

namespace {

// One text on one sequence. Each step decodes `n_rows` more tokens and hands them to the drafter.
class ContextProbe {
  public:
    ContextProbe(const std::shared_ptr<Model>& target, const std::shared_ptr<Model>& drafter,
                 std::vector<int32_t> tokens, size_t queue_bytes, int32_t window, bool keep_graphs)
        : tokens_(std::move(tokens)), target_(target, target_options()),
          drafter_(drafter, target_, drafter_options(queue_bytes, window, keep_graphs)) {
        drafter_.begin_recording();
    }

    void extend(int32_t n_rows) {
        std::vector<BatchRow> rows;
        std::vector<ContextRow> context;
        for (int32_t i = 0; i < n_rows; ++i) {
            const int32_t position = n_decoded_ + i;
            rows.push_back({tokens_.at(static_cast<size_t>(position)), position, 0, i + 1 == n_rows});
            context.push_back({i, position, 0});
        }
        target_.decode(rows);
        drafter_.inject(context);
        n_decoded_ += n_rows;
    }

    // U of the block after the next token (n_slots, n_vocab).
    py::array_t<float> draft() {
        DraftTask task;
        task.anchor = tokens_.at(static_cast<size_t>(n_decoded_));
        task.start = n_decoded_;
        task.truncation.temperature = 0;
        drafter_.draft({&task, 1}, {&draft_, 1});
        const auto n_slots = static_cast<py::ssize_t>(draft_.tokens.size());
        py::array_t<float> logits({n_slots, static_cast<py::ssize_t>(target_.n_vocab())});
        for (int32_t k = 0; k < n_slots; ++k) {
            const auto row = drafter_.context().logits(k);
            std::copy(row.begin(), row.end(), logits.mutable_data(k, 0));
        }
        return logits;
    }

    [[nodiscard]] std::vector<int32_t> drafted() const { return draft_.tokens; }
    // Ids and U that the pass itself found for a slot of the last draft; none where it did not search.
    [[nodiscard]] std::pair<std::vector<int32_t>, std::vector<float>> largest(int32_t slot) {
        Candidates found;
        found.assign(drafter_.context().largest_logits(slot));
        return {found.ids, found.logits};
    }

    void forget() { drafter_.forget(0); }
    // Takes n tokens out of the text and moves the later ones to the front.
    void shift(int32_t begin, int32_t n) {
        target_.shift(0, begin, n);
        drafter_.shift(0, begin, n);
        tokens_.erase(tokens_.begin() + begin, tokens_.begin() + begin + n);
        n_decoded_ -= n;
    }
    [[nodiscard]] int64_t n_graphs_built() { return drafter_.context().n_graphs_built(); }
    [[nodiscard]] size_t kept_bytes() { return drafter_.context().kept_bytes()->load(); }
    // Last position held, rows that wait, first and last position in the cache.
    [[nodiscard]] std::tuple<int32_t, int32_t, int32_t, int32_t> positions() {
        return {drafter_.last_position(0), drafter_.n_waiting(0), drafter_.context().first_position(0),
                drafter_.context().last_position(0)};
    }

  private:
    [[nodiscard]] ContextOptions target_options() const {
        ContextOptions options;
        options.n_cells = options.n_batch = options.n_ubatch = static_cast<int32_t>(tokens_.size()) + 64;
        options.n_outputs = 1;
        options.n_threads = options.n_threads_batch = 1;
        options.kv_type = "f32";
        options.flash_attention_off = true;
        return options;
    }

    [[nodiscard]] DrafterOptions drafter_options(size_t queue_bytes, int32_t window, bool keep_graphs) const {
        DrafterOptions options;
        options.keep_graphs = keep_graphs;
        options.n_ctx = static_cast<int32_t>(tokens_.size()) + 64;
        options.window = window;
        options.queue_bytes = queue_bytes;
        options.kv_type = "f32";
        options.flash_attention_off = true;
        return options;
    }

    std::vector<int32_t> tokens_;
    LlamaTarget target_;
    LlamaDrafter drafter_;
    int32_t n_decoded_ = 0;
    BlockDraft draft_;
};

} // namespace

void register_context_probe(py::module_& module) {
    py::module_ testing = module.attr("_testing");
    py::class_<ContextProbe>(testing, "ContextProbe")
        .def(py::init<const std::shared_ptr<Model>&, const std::shared_ptr<Model>&, std::vector<int32_t>, size_t,
                      int32_t, bool>(),
             py::arg("target"), py::arg("drafter"), py::arg("tokens"), py::arg("queue_bytes"), py::arg("window") = 4096,
             py::arg("keep_graphs") = true)
        .def("extend", &ContextProbe::extend, py::arg("n_rows"))
        .def("draft", &ContextProbe::draft)
        .def_property_readonly("drafted", &ContextProbe::drafted)
        .def("largest", &ContextProbe::largest, py::arg("slot"))
        .def("forget", &ContextProbe::forget)
        .def("shift", &ContextProbe::shift, py::arg("begin"), py::arg("n"))
        .def_property_readonly("n_graphs_built", &ContextProbe::n_graphs_built)
        .def_property_readonly("kept_bytes", &ContextProbe::kept_bytes)
        .def_property_readonly("positions", &ContextProbe::positions);
}
