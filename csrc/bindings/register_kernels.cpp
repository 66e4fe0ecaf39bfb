// Matrix kernels: what runs on this machine, and one product for the benchmark and the tests.
#include "bindings.h"
#include "kernels/kernels.h"
#include "llama_api.h"
#include "matrix_bench.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>

namespace py = pybind11;
using dspark::MatrixBench;
using dspark::ProductPath;
using dspark::kernels::WeightType;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

constexpr std::array<std::pair<WeightType, const char*>, dspark::kernels::kWeightTypes> kTypes = {{
    {WeightType::q8_0, "q8_0"},
    {WeightType::q4_0, "q4_0"},
    {WeightType::iq4_nl, "iq4_nl"},
    {WeightType::q4_k, "q4_K"},
    {WeightType::q5_k, "q5_K"},
    {WeightType::q6_k, "q6_K"},
    {WeightType::f16, "f16"},
    {WeightType::bf16, "bf16"},
}};

std::vector<std::string> kernel_types() {
    std::vector<std::string> names;
    for (const auto& [type, name] : kTypes) {
        if (dspark::kernels::covers(type)) {
            names.emplace_back(name);
        }
    }
    return names;
}

std::vector<std::string> kernel_instruction_sets() {
    const auto names = dspark::kernels::instruction_sets();
    return {names.begin(), names.end()};
}

void set_kernel_instruction_set(const std::string& name) {
    if (!dspark::kernels::set_instruction_set(name)) {
        std::string known;
        for (const std::string& one : kernel_instruction_sets()) {
            known += (known.empty() ? "" : ", ") + one;
        }
        throw std::invalid_argument("instruction set must be one that this processor has (" +
                                    (known.empty() ? "none" : known) + "), got " + name);
    }
}

ProductPath parse_path(const std::string& name) {
    if (name == "kernels") {
        return ProductPath::kernels;
    }
    if (name == "plain") {
        return ProductPath::plain;
    }
    if (name == "repacked") {
        return ProductPath::repacked;
    }
    throw std::invalid_argument("path must be kernels, plain or repacked, got " + name);
}

std::unique_ptr<MatrixBench> make_bench(const std::string& type_name, const Bytes& rows, int64_t n_values,
                                        int32_t n_matrices, int32_t n_threads) {
    if (rows.ndim() != 2) {
        throw std::invalid_argument("rows must be two-dimensional, got " + std::to_string(rows.ndim()) + " dimensions");
    }
    const std::span data(reinterpret_cast<const std::byte*>(rows.data()), static_cast<size_t>(rows.size()));
    const py::gil_scoped_release release;
    return std::make_unique<MatrixBench>(
        dspark::MatrixBenchOptions{type_name, rows.shape(0), n_values, n_matrices, n_threads}, data);
}

py::tuple multiply(MatrixBench& bench, const std::string& path, const Floats& x) {
    if (x.ndim() != 2) {
        throw std::invalid_argument("x must be two-dimensional, got " + std::to_string(x.ndim()) + " dimensions");
    }
    const std::span columns(x.data(), static_cast<size_t>(x.size()));
    std::vector<float> y;
    double seconds = 0.0;
    {
        const py::gil_scoped_release release;
        seconds = bench.multiply(parse_path(path), columns, y);
    }
    const py::ssize_t n_outputs = static_cast<py::ssize_t>(y.size()) / x.shape(0);
    Floats result({x.shape(0), n_outputs});
    std::copy(y.begin(), y.end(), result.mutable_data());
    return py::make_tuple(result, seconds);
}

Bytes quantize_rows(const std::string& type_name, const Floats& values) {
    if (values.ndim() != 2) {
        throw std::invalid_argument("values must be two-dimensional, got " + std::to_string(values.ndim()) +
                                    " dimensions");
    }
    const std::span floats(values.data(), static_cast<size_t>(values.size()));
    std::vector<std::byte> rows;
    {
        const py::gil_scoped_release release;
        rows = dspark::quantize_rows(type_name, floats, values.shape(1));
    }
    Bytes result({values.shape(0), static_cast<py::ssize_t>(rows.size()) / values.shape(0)});
    std::memcpy(result.mutable_data(), rows.data(), rows.size());
    return result;
}

} // namespace

void register_kernels(py::module_& module) {
    module.def("kernel_types", &kernel_types, "Weight types that our kernels multiply on this machine.");
    module.def(
        "kernel_instruction_set", [] { return std::string(dspark::kernels::instruction_set()); },
        "Instruction set of our kernels here; none: ggml's run.");
    module.def("kernel_instruction_sets", &kernel_instruction_sets,
               "Instruction sets of our kernels that this processor has, the best first.");
    module.def("set_kernel_instruction_set", &set_kernel_instruction_set, py::arg("name"),
               "Another instruction set for the whole process, while nothing computes: for tests and benchmarks.");
    module.def("n_math_threads", &dspark::n_math_threads, "Cores that this process may use, without hyper-threads.");
    module.def("quantize_rows", &quantize_rows, py::arg("type_name"), py::arg("values"),
               "Rows of floats as blocks of a type, by ggml's quantizer.");
    py::class_<MatrixBench>(module, "MatrixBench", py::is_final())
        .def(py::init(&make_bench), py::arg("type_name"), py::arg("rows"), py::kw_only(), py::arg("n_values"),
             py::arg("n_matrices") = 1, py::arg("n_threads") = 1)
        .def_property_readonly("can_repack", &MatrixBench::can_repack)
        .def("multiply", &multiply, py::arg("path"), py::arg("x"));
}
