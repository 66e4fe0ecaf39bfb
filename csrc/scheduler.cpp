#include "scheduler.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dspark {

FixedScheduler::FixedScheduler(int32_t length) : length_(length) {
    if (length < 0) {
        throw std::invalid_argument("draft length must be 0 or more, got " + std::to_string(length));
    }
}

void FixedScheduler::select(std::span<const Proposal> proposals, std::span<int8_t> is_drafting) {
    for (size_t i = 0; i < proposals.size(); ++i) {
        is_drafting[i] = length_ > 0 && proposals[i].most > 0 ? 1 : 0;
    }
}

void FixedScheduler::schedule(std::span<const Proposal> proposals, std::span<int32_t> prefix_len) {
    for (size_t i = 0; i < proposals.size(); ++i) {
        prefix_len[i] = std::min(length_, proposals[i].most);
    }
}

} // namespace dspark
