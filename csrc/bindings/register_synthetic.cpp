// Options of synthetic acceptance, and its rounds for the tests.
#include "bindings.h"
#include "synthetic_acceptance.h"

#include <pybind11/stl.h>

namespace py = pybind11;
using namespace dspark;

namespace {

SyntheticOptions make_options(std::vector<std::vector<double>> rates, double spread, double noise, double bias,
                              uint64_t seed) {
    SyntheticOptions options{std::move(rates), spread, noise, bias, seed};
    options.validate();
    return options;
}

py::tuple draw_rounds(const SyntheticOptions& options, int32_t block_size, uint64_t request_seed, uint64_t n_rounds) {
    const SyntheticAcceptance synthetic(options, block_size);
    std::vector<std::vector<float>> confidence_logits(n_rounds, std::vector<float>(static_cast<size_t>(block_size)));
    std::vector<int32_t> n_accepted;
    for (uint64_t start = 0; start < n_rounds; ++start) {
        synthetic.confidence_logits(request_seed, start, confidence_logits[start]);
        n_accepted.push_back(synthetic.n_accepted(request_seed, start, block_size));
    }
    return py::make_tuple(confidence_logits, n_accepted);
}

} // namespace

void register_synthetic(py::module_& module) {
    const SyntheticOptions defaults;
    py::class_<SyntheticOptions>(module, "SyntheticAcceptance", py::is_final())
        .def(py::init(&make_options), py::kw_only(), py::arg("rates"), py::arg("spread") = defaults.spread,
             py::arg("noise") = defaults.noise, py::arg("bias") = defaults.bias, py::arg("seed") = defaults.seed)
        .def("draw_rounds", &draw_rounds, py::arg("block_size"), py::arg("request_seed"), py::arg("n_rounds"));
}
