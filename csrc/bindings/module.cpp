// The Python module: one register_* per topic, and the exceptions of python/dspark_cpp/errors.py by name.
#include "bindings.h"
#include "errors.h"
#include "llama_api.h"

#include <exception>

namespace py = pybind11;

namespace {

// The classes live in Python; C++ errors become their namesakes.
void set_python_error(const char* class_name, const char* message) {
    const py::object type = py::module_::import("dspark_cpp.errors").attr(class_name);
    py::set_error(type, message);
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) {
            std::rethrow_exception(pointer);
        }
    } catch (const dspark::ModelLoadError& error) {
        set_python_error("ModelLoadError", error.what());
    } catch (const dspark::ModelMismatchError& error) {
        set_python_error("ModelMismatchError", error.what());
    } catch (const dspark::ContextFullError& error) {
        set_python_error("ContextFullError", error.what());
    } catch (const dspark::QueueFullError& error) {
        set_python_error("QueueFullError", error.what());
    } catch (const dspark::DecodeError& error) {
        set_python_error("DecodeError", error.what());
    } catch (const dspark::EngineClosedError& error) {
        set_python_error("EngineClosedError", error.what());
    } catch (const dspark::DSparkError& error) {
        set_python_error("DSparkError", error.what());
    }
}

} // namespace

PYBIND11_MODULE(_core, module) {
    py::register_local_exception_translator(translate);
    const dspark::BuildInfo info = dspark::build_info();
    module.attr("__version__") = info.version;
    module.attr("llama_cpp_commit") = info.llama_cpp_commit;
    register_models(module);
    register_chat(module);
    register_synthetic(module); // before the engine: an argument of its constructor
    register_engine(module);
    register_testing(module);
    register_context_probe(module);
    register_target_probe(module);
    register_graph_head(module);
    register_math(module);
    register_scheduler(module);
    register_kernels(module);
}
