// What a drafter's file says about itself, and everything about it that llama.cpp or the heads would trip over.
// Loads nothing.
#pragma once

#include "llama_api_impl.h"

#include <string>
#include <vector>

namespace dspark {

// Throws ModelLoadError where the file names an unknown kind of head.
[[nodiscard]] DrafterInfo read_drafter_info(const GgufFile& file);
// Every reason why the drafter does not fit this target, in one go; empty: none.
[[nodiscard]] std::vector<std::string> drafter_mismatches(const GgufFile& file, const DrafterInfo& info,
                                                          const Model& target);

} // namespace dspark
