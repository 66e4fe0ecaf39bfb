// The C++ side of python/dspark_cpp/errors.py: the bindings translate each class to its namesake. A caller's mistake
// is std::invalid_argument (ValueError).
#pragma once

#include <stdexcept>
#include <string>

namespace dspark {

struct DSparkError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ModelLoadError : DSparkError {
    using DSparkError::DSparkError;
};
struct ModelMismatchError : DSparkError {
    using DSparkError::DSparkError;
};
struct ContextFullError : DSparkError {
    using DSparkError::DSparkError;
};
struct QueueFullError : DSparkError {
    using DSparkError::DSparkError;
};
struct DecodeError : DSparkError {
    using DSparkError::DSparkError;
};
struct EngineClosedError : DSparkError {
    using DSparkError::DSparkError;
};

} // namespace dspark
