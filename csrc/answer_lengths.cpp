#include "answer_lengths.h"

namespace dspark {

void AnswerLengths::observe(int32_t n_tokens) {
    recent_[next_] = n_tokens;
    next_ = (next_ + 1) % recent_.size();
}

double AnswerLengths::left(int32_t n_written) const {
    double n_left = 0;
    int32_t n_longer = 0;
    for (const int32_t length : recent_) {
        if (length > n_written) {
            n_left += length - n_written;
            ++n_longer;
        }
    }
    return n_longer > 0 ? n_left / n_longer : n_written;
}

} // namespace dspark
