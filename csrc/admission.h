// Who gets how many rows of a pass for its prompt. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace dspark {

// Splits `room` rows among prompts that still need needs[i] rows: equal shares, and what a short prompt leaves goes to
// the others, so that it never waits behind a long one. Single rows that cannot be split go round from prompt `first`:
// with fewer rows than prompts everyone has a turn.
[[nodiscard]] std::vector<int32_t> share_rows(std::span<const int32_t> needs, int32_t room, size_t first);

} // namespace dspark
