// What llama.cpp's parser of GBNF must not see: repetitions that never end or fill the memory. Pure.
#pragma once

#include <string_view>

namespace dspark {

// Throws std::invalid_argument for `{m,n}` with n < m (the parser counts down from 2^64 then), for a count beyond its
// own limit, and for counts that add up to a grammar too large to copy for every drafted token. Returns whether the
// grammar names tokens (`<|name|>`), which only a vocabulary can resolve.
bool check_repetitions(std::string_view gbnf);

} // namespace dspark
