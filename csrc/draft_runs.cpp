#include "draft_runs.h"

namespace dspark {

void DraftRuns::observe(int32_t n_requests, int32_t n_prefill_rows, bool has_drafted) {
    n_calm_ = n_prefill_rows == 0 && n_requests == n_requests_ ? n_calm_ + 1 : 0;
    n_requests_ = n_requests;
    was_cold_ = has_drafted && is_cold();
    if (has_drafted) {
        n_disturbed_ = n_calm_ > 0 ? 0 : n_disturbed_ + 1;
        n_undrafted_ = 0;
        ++n_drafted_;
        return;
    }
    if (++n_undrafted_ == kCold) {
        if (n_drafted_ > 1) { // a probe is no run, and many of them must not make every run look short
            run_length_ += kLastShare * (n_drafted_ - run_length_);
        }
        n_drafted_ = 0;
    }
}

} // namespace dspark
