// How steps with drafts and steps without follow each other, and what that takes: a step that drafts behind many that
// did not finds cold caches and graphs of other contexts, and so does the way back; and where answers end and begin,
// their callers take a share of the machine, whoever drafts. Such steps tell nothing of drafts that go on. Must not
// know: costs, policies. Engine thread only.
#pragma once

#include "estimates.h"

#include <algorithm>
#include <cstdint>

namespace dspark {

class DraftRuns {
  public:
    // Every step, before its times are told.
    void observe(int32_t n_requests, int32_t n_prefill_rows, bool has_drafted);
    // What the draft and the pass behind it took to their price, of a cold step; or the first plain pass behind drafts.
    void observe_cold(double ratio) { cold_.push(std::min(ratio, kMostCold)); }
    void observe_return(double ratio) { return_.push(std::min(ratio, kMostReturn)); }

    // Of the step observed last. Calm: it and the one before decoded the same requests and nothing else, or there was
    // no such step for some time.
    [[nodiscard]] bool is_calm() const { return n_calm_ > 0 || n_disturbed_ >= kMostDisturbed; }
    [[nodiscard]] bool was_cold() const { return was_cold_; }
    [[nodiscard]] bool is_return() const { return n_undrafted_ == 1; }

    // Of the step to come: whether it would be cold, and whether drafts are under way, those of one step not counted.
    [[nodiscard]] bool is_cold() const { return n_undrafted_ >= kCold; }
    [[nodiscard]] bool is_drafting() const { return n_undrafted_ == 0 && n_drafted_ > 1; }
    // Of a long run, the share that those under way make: at most 1.
    [[nodiscard]] double share_of_run() const { return std::min(1.0, n_drafted_ / kLongRun); }
    [[nodiscard]] double run_length() const { return run_length_; } // drafted steps in a row, decayed average

    // What a cold step, or the way back, takes beyond its price, in shares of it.
    [[nodiscard]] double cold_share() const { return cold_.size() > 0 ? std::max(0.0, cold_.median() - 1) : 0; }
    [[nodiscard]] double return_share() const { return return_.size() > 0 ? std::max(0.0, return_.median() - 1) : 0; }

  private:
    // Steps: behind 8, drafted passes of the demo pair take 1.05 times as long, behind 60 1.3.
    static constexpr int32_t kCold = 4;
    static constexpr int32_t kMostDisturbed = 4;
    static constexpr double kMostCold = 1.3; // the rest is a slow moment's
    static constexpr double kMostReturn = 1.5;
    static constexpr double kLongRun = 16;
    static constexpr double kLastShare = 0.2; // of the last run in their average

    int32_t n_requests_ = 0;               // of the last step
    int32_t n_calm_ = 0;                   // calm steps in a row
    int32_t n_disturbed_ = kMostDisturbed; // drafted steps since a calm one
    int32_t n_undrafted_ = 0;              // steps since one drafted
    int32_t n_drafted_ = 0;                // drafted steps of the run under way
    double run_length_ = 8;
    bool was_cold_ = false;
    MedianRing cold_;
    MedianRing return_;
};

} // namespace dspark
