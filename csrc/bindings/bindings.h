// One register function per topic. Rules: convert with the GIL, release it around the pure call, convert out.
#pragma once

#include <pybind11/pybind11.h>

void register_models(pybind11::module_& module);
void register_chat(pybind11::module_& module);
void register_engine(pybind11::module_& module);
void register_testing(pybind11::module_& module);
void register_context_probe(pybind11::module_& module); // after register_testing
void register_target_probe(pybind11::module_& module);  // likewise
void register_graph_head(pybind11::module_& module);
void register_math(pybind11::module_& module);
void register_synthetic(pybind11::module_& module);
void register_scheduler(pybind11::module_& module);
void register_kernels(pybind11::module_& module);
