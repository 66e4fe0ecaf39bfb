// Grammars, chat templates, the reading of answers, embeddings: what a server needs beside the engine.
#include "bindings.h"
#include "llama_chat.h"
#include "llama_embedder.h"
#include "llama_grammar_mask.h"

#include <pybind11/stl.h>

namespace py = pybind11;
using namespace dspark;

namespace {

std::shared_ptr<TokenMask> make_grammar(std::shared_ptr<Model> model, const std::string& gbnf, bool is_lazy,
                                        std::vector<std::string> trigger_words,
                                        std::vector<std::string> trigger_patterns, const std::string& prefill) {
    const py::gil_scoped_release release;
    return make_grammar_mask(std::move(model),
                             {gbnf, is_lazy, std::move(trigger_words), std::move(trigger_patterns), prefill});
}

bool allows_text(const TokenMask& grammar, const Model& model, const std::string& text) {
    const py::gil_scoped_release release;
    const std::unique_ptr<TokenMask> mask = grammar.clone();
    for (const int32_t token : model.tokenize(text, false, false)) {
        uint8_t is_allowed = 0;
        mask->check(std::span(&token, 1), std::span(&is_allowed, 1));
        if (is_allowed == 0) {
            return false;
        }
        mask->commit(token);
    }
    return true;
}

std::vector<float> embed(Embedder& embedder, const std::vector<int32_t>& tokens) {
    const py::gil_scoped_release release;
    return embedder.embed(tokens);
}

} // namespace

void register_chat(py::module_& module) {
    py::class_<TokenMask, std::shared_ptr<TokenMask>>(module, "Grammar", py::is_final())
        .def(py::init(&make_grammar), py::arg("model").none(false), py::arg("gbnf"), py::kw_only(),
             py::arg("is_lazy") = false, py::arg("trigger_words") = std::vector<std::string>{},
             py::arg("trigger_patterns") = std::vector<std::string>{}, py::arg("prefill") = "")
        .def("allows", &allows_text, py::arg("model").none(false), py::arg("text"));
    py::class_<Embedder>(module, "Embedder", py::is_final())
        .def(py::init([](std::shared_ptr<Model> model, int32_t n_ctx, int32_t n_threads) {
                 const py::gil_scoped_release release;
                 return std::make_unique<Embedder>(std::move(model), n_ctx, n_threads);
             }),
             py::arg("model").none(false), py::kw_only(), py::arg("n_ctx") = 0, py::arg("n_threads") = 0)
        .def_property_readonly("n_ctx", &Embedder::n_ctx)
        .def_property_readonly("pooling", &Embedder::pooling)
        .def("embed", &embed, py::arg("tokens"));
    py::class_<ChatReader>(module, "ChatParser", py::is_final())
        .def(py::init<const std::string&, bool>(), py::arg("plan_json"), py::arg("parse_tool_calls") = true)
        .def("parse", &ChatReader::read, py::arg("text"), py::arg("is_partial"),
             py::call_guard<py::gil_scoped_release>());
    module.def("plan_chat", &plan_chat, py::arg("request_json"), py::call_guard<py::gil_scoped_release>());
    module.def("json_schema_to_grammar", &schema_grammar, py::arg("schema_json"),
               py::call_guard<py::gil_scoped_release>());
}
