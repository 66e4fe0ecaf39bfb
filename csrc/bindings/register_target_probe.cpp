// For the test suite: rows through the real target, in batches and places of the test's choosing, and all their logits.
#include "bindings.h"
#include "kernels/grouped_nodes.h"
#include "kernels/kernels.h"
#include "llama_target.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

namespace py = pybind11;
using namespace dspark;

namespace {

class TargetProbe {
  public:
    TargetProbe(const std::shared_ptr<Model>& model, int32_t n_cells, int32_t n_sequences, int32_t n_threads,
                const std::string& kv_type, int32_t n_kept_rows)
        : target_(model, options(n_cells, n_sequences, n_threads, kv_type, n_kept_rows)) {}

    // One pass: rows (token, position, sequence) -> logits (n_rows, n_vocab).
    py::array_t<float> decode(const std::vector<std::tuple<int32_t, int32_t, int32_t>>& rows) {
        std::vector<BatchRow> batch;
        for (const auto& [token, position, sequence] : rows) {
            batch.push_back({token, position, sequence, true});
        }
        target_.decode(batch);
        py::array_t<float> logits({static_cast<py::ssize_t>(rows.size()), static_cast<py::ssize_t>(target_.n_vocab())});
        for (size_t i = 0; i < rows.size(); ++i) {
            const auto row = target_.logits(static_cast<int32_t>(i));
            std::ranges::copy(row, logits.mutable_data(static_cast<py::ssize_t>(i), 0));
        }
        return logits;
    }

    void remove(int32_t sequence, int32_t begin) { target_.remove(sequence, begin); }
    void tap_layer(int32_t layer) { target_.context().tap_layer(layer); }
    // (n_rows, n_embd) of the last pass.
    py::array_t<float> layer_input(int32_t layer) {
        const std::span<const float> states = target_.context().layer_input(layer);
        const py::ssize_t n_embd = target_.context().model().n_embd();
        return py::array_t<float>({static_cast<py::ssize_t>(states.size()) / n_embd, n_embd}, states.data());
    }
    [[nodiscard]] int64_t n_graphs_built() { return target_.context().n_graphs_built(); }

  private:
    static ContextOptions options(int32_t n_cells, int32_t n_sequences, int32_t n_threads, const std::string& kv_type,
                                  int32_t n_kept_rows) {
        ContextOptions options;
        options.n_kept_rows = n_kept_rows;
        options.n_cells = options.n_batch = options.n_ubatch = options.n_outputs = n_cells;
        options.n_sequences = n_sequences;
        options.n_threads = options.n_threads_batch = n_threads;
        options.kv_type = kv_type;
        return options;
    }

    LlamaTarget target_;
};

} // namespace

void register_target_probe(py::module_& module) {
    py::module_ testing = module.attr("_testing");
    testing.def("set_groups_enabled", &dspark::kernels::set_groups_enabled, py::arg("enabled"));
    testing.def("n_grouped_nodes", &dspark::kernels::n_grouped_nodes);
    py::class_<TargetProbe>(testing, "TargetProbe")
        .def(py::init<const std::shared_ptr<Model>&, int32_t, int32_t, int32_t, const std::string&, int32_t>(),
             py::arg("model").none(false), py::arg("n_cells"), py::arg("n_sequences") = 1, py::arg("n_threads") = 1,
             py::arg("kv_type") = "f16", py::arg("n_kept_rows") = 32)
        .def("decode", &TargetProbe::decode, py::arg("rows"))
        .def("tap_layer", &TargetProbe::tap_layer, py::arg("layer"))
        .def("layer_input", &TargetProbe::layer_input, py::arg("layer"))
        .def_property_readonly("n_graphs_built", &TargetProbe::n_graphs_built)
        .def("remove", &TargetProbe::remove, py::arg("sequence"), py::arg("begin") = 0);
}
