// Names of the verification rules as Python writes them; what else a caller takes, and its error, are its own.
#pragma once

#include "acceptance.h"

#include <optional>
#include <stdexcept>
#include <string>

namespace dspark {

inline std::optional<Verification> find_rule(const std::string& name) {
    if (name == "exact") {
        return Verification::exact;
    }
    if (name == "rejection") {
        return Verification::rejection;
    }
    if (name == "block") {
        return Verification::block;
    }
    return std::nullopt;
}

// Throws std::invalid_argument.
inline Verification parse_rule(const std::string& name) {
    if (const auto rule = find_rule(name)) {
        return *rule;
    }
    throw std::invalid_argument("rule must be exact, rejection or block, got " + name);
}

} // namespace dspark
