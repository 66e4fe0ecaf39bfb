// Models, build information, quantization.
#include "bindings.h"
#include "llama_api.h"

#include <pybind11/stl.h>

namespace py = pybind11;
using dspark::BuildInfo;
using dspark::DeviceInfo;
using dspark::DrafterInfo;
using dspark::MarkovHeadType;
using dspark::Model;
using dspark::ModelOptions;

namespace {

const char* head_type_name(MarkovHeadType type) {
    switch (type) {
    case MarkovHeadType::vanilla:
        return "vanilla";
    case MarkovHeadType::gated:
        return "gated";
    case MarkovHeadType::rnn:
        return "rnn";
    case MarkovHeadType::none:
        break;
    }
    return "none";
}

std::vector<std::string> requested_backends() {
    std::vector<std::string> names;
    std::string list = DSPARK_REQUESTED_BACKENDS; // comma-separated, set by CMake
    for (size_t begin = 0; begin < list.size();) {
        const size_t end = std::min(list.find(',', begin), list.size());
        names.push_back(list.substr(begin, end - begin));
        begin = end + 1;
    }
    return names;
}

void register_build(py::module_& module) {
    py::class_<DeviceInfo>(module, "DeviceInfo")
        .def_readonly("name", &DeviceInfo::name)
        .def_readonly("description", &DeviceInfo::description)
        .def_readonly("kind", &DeviceInfo::kind)
        .def_readonly("memory_free_bytes", &DeviceInfo::memory_free_bytes)
        .def_readonly("memory_total_bytes", &DeviceInfo::memory_total_bytes);
    py::class_<BuildInfo>(module, "BuildInfo")
        .def_readonly("version", &BuildInfo::version)
        .def_readonly("llama_cpp_commit", &BuildInfo::llama_cpp_commit)
        .def_readonly("system_info", &BuildInfo::system_info)
        .def_readonly("backends", &BuildInfo::backends)
        .def_property_readonly("requested_backends", [](const BuildInfo&) { return requested_backends(); })
        .def_readonly("devices", &BuildInfo::devices);
    module.def("build_info", &dspark::build_info, "What this build is and what it runs on.");
    module.def("set_log_level", &dspark::set_log_level, py::arg("level"),
               "0 silent, 1 errors, 2 warnings, 3 info, 4 debug: what llama.cpp may print to stderr.");
    module.def("quantize_model", &dspark::quantize_model, py::arg("source"), py::arg("destination"),
               py::arg("type_name"), py::arg("keep"), py::arg("n_threads") = 0,
               py::call_guard<py::gil_scoped_release>(),
               "Quantizes a GGUF file through llama_model_quantize; tensors named in `keep` keep their type.");
}

void register_drafter_info(py::module_& module) {
    py::class_<DrafterInfo>(module, "DrafterInfo")
        .def_readonly("block_size", &DrafterInfo::block_size)
        .def_readonly("target_layers", &DrafterInfo::target_layers)
        .def_readonly("mask_token", &DrafterInfo::mask_token)
        .def_property_readonly("head_type", [](const DrafterInfo& info) { return head_type_name(info.head_type); })
        .def_readonly("markov_rank", &DrafterInfo::markov_rank)
        .def_readonly("sample_from_anchor", &DrafterInfo::sample_from_anchor)
        .def_readonly("is_causal", &DrafterInfo::is_causal)
        .def_readonly("has_confidence", &DrafterInfo::has_confidence)
        .def_readonly("confidence_with_markov", &DrafterInfo::confidence_with_markov)
        .def_readonly("owns_embedding", &DrafterInfo::owns_embedding)
        .def_readonly("owns_output", &DrafterInfo::owns_output)
        .def_readonly("n_vocab_draft", &DrafterInfo::n_vocab_draft);
}

std::shared_ptr<Model> load_target(const std::string& path, int32_t n_gpu_layers, bool use_mmap, bool check_tensors,
                                   bool use_kernels) {
    const py::gil_scoped_release release;
    return Model::load_target(path, ModelOptions{n_gpu_layers, use_mmap, check_tensors, use_kernels});
}

std::shared_ptr<Model> load_drafter(const std::string& path, std::shared_ptr<Model> target, int32_t n_gpu_layers,
                                    bool use_mmap, bool check_tensors, bool use_kernels) {
    const py::gil_scoped_release release;
    return Model::load_drafter(path, ModelOptions{n_gpu_layers, use_mmap, check_tensors, use_kernels},
                               std::move(target));
}

py::dict metadata(const Model& model) {
    py::dict entries;
    for (const auto& [key, value] : model.metadata()) {
        entries[py::str(key)] = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeUTF8(value.data(), static_cast<Py_ssize_t>(value.size()), "replace"));
    }
    return entries;
}

std::vector<int32_t> tokenize(const Model& model, const std::string& text, bool add_special, bool parse_special) {
    const py::gil_scoped_release release;
    return model.tokenize(text, add_special, parse_special);
}

} // namespace

void register_models(py::module_& module) {
    register_build(module);
    register_drafter_info(module);
    py::class_<Model, std::shared_ptr<Model>>(module, "Model", py::is_final())
        .def_static("load_target", &load_target, py::arg("path"), py::kw_only(), py::arg("n_gpu_layers") = -1,
                    py::arg("use_mmap") = true, py::arg("check_tensors") = false, py::arg("use_kernels") = true)
        .def_static("load_drafter", &load_drafter, py::arg("path"), py::arg("target").none(false), py::kw_only(),
                    py::arg("n_gpu_layers") = -1, py::arg("use_mmap") = true, py::arg("check_tensors") = false,
                    py::arg("use_kernels") = true)
        .def_property_readonly("path", &Model::path)
        .def_property_readonly("architecture", &Model::architecture)
        .def_property_readonly("description", &Model::description)
        .def_property_readonly("size_bytes", &Model::size_bytes)
        .def_property_readonly("uses_kernels", &Model::uses_kernels)
        .def_property_readonly("n_params", &Model::n_params)
        .def_property_readonly("n_vocab", &Model::n_vocab)
        .def_property_readonly("n_embd", &Model::n_embd)
        .def_property_readonly("n_layer", &Model::n_layer)
        .def_property_readonly("n_ctx_train", &Model::n_ctx_train)
        .def_property_readonly("can_tap_layers", &Model::can_tap_layers)
        .def_property_readonly("can_roll_back", &Model::can_roll_back)
        .def_property_readonly("metadata", &metadata)
        .def_property_readonly("bos_token", &Model::bos_token)
        .def_property_readonly("eos_token", &Model::eos_token)
        .def_property_readonly("adds_bos", &Model::adds_bos)
        .def_property_readonly("chat_template", &Model::chat_template)
        .def_property_readonly("drafter_info", &Model::drafter_info, py::return_value_policy::reference_internal)
        .def("tokenize", &tokenize, py::arg("text"), py::arg("add_special") = true, py::arg("parse_special") = true)
        .def(
            "token_to_piece",
            [](const Model& model, int32_t token, bool special) {
                return py::bytes(model.token_to_piece(token, special));
            },
            py::arg("token"), py::arg("special") = false)
        .def(
            "detokenize",
            [](const Model& model, const std::vector<int32_t>& tokens, bool special) {
                return py::bytes(model.detokenize(tokens, special));
            },
            py::arg("tokens"), py::arg("special") = false)
        .def("is_end_of_generation", &Model::is_end_of_generation, py::arg("token"))
        .def("is_control", &Model::is_control, py::arg("token"))
        .def("apply_chat_template", &Model::apply_chat_template, py::arg("messages_json"), py::arg("tools_json") = "",
             py::arg("template_override") = "", py::arg("add_generation_prompt") = true,
             py::arg("enable_thinking") = true);
}
