#include "thread_choice.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr double kClear = 0.9;    // of the time: working alone must gain more than noise
constexpr double kHopeless = 1.5; // times the time: one such pass ends a trial
constexpr double kChanged = 1.3;  // times the time: what the last trial found holds no longer
constexpr int32_t kShortWait = 128;
constexpr int32_t kLongWait = 2048;
constexpr int32_t kLongWaitAlone = 256; // what the others could do meanwhile shows in no other way
// Of a trial, not counted, nor a reason to end it where there are threads to wake: those that sleep wake up late, and
// at first on the processor of whoever woke them.
constexpr size_t kWarmUp = 3;

template <size_t n> double median(std::array<double, n> values) {
    std::sort(values.begin(), values.end());
    return values[n / 2];
}

} // namespace

bool ThreadChoice::is_alone(int32_t n_rows) const {
    if (n_rows < 1 || n_rows > kMostRows) {
        return false;
    }
    const Size& size = sizes_[static_cast<size_t>(n_rows) - 1];
    return size.is_alone != size.is_trying();
}

void ThreadChoice::observe(int32_t n_rows, double ms) {
    if (n_rows < 1 || n_rows > kMostRows) {
        return;
    }
    Size& size = sizes_[static_cast<size_t>(n_rows) - 1];
    if (!size.is_trying()) {
        size.observe(ms);
    } else if (size.observe_trial(ms)) {
        for (Size& one : sizes_) {
            one.wait = 0; // what changed for one size did so for others
        }
    }
}

void ThreadChoice::Size::observe(double ms) {
    recent[n_seen++ % kRecent] = ms;
    ++n_waited;
    if (n_seen < kRecent || n_waited < static_cast<int32_t>(kRecent) || (!is_alone && ms > kShortMs)) {
        return;
    }
    if (n_waited >= wait || median(recent) > kChanged * expected) {
        begin_trial();
    }
}

void ThreadChoice::Size::begin_trial() {
    expected = median(recent);
    n_tried = 0;
}

bool ThreadChoice::Size::observe_trial(double ms) {
    trial[n_tried++] = ms;
    const bool is_hopeless = n_tried > (is_alone ? kWarmUp : 1) && ms > kHopeless * expected;
    if (n_tried < kTrial && !is_hopeless) {
        return false;
    }
    n_tried = kTrial;
    n_waited = 0;
    if (!is_hopeless && is_won()) {
        is_alone = !is_alone;
        return true;
    }
    wait = std::clamp(2 * wait, kShortWait, is_alone ? kLongWaitAlone : kLongWait);
    return false;
}

bool ThreadChoice::Size::is_won() const {
    std::array<double, kTrial - kWarmUp> counted{};
    std::copy(trial.begin() + kWarmUp, trial.end(), counted.begin());
    return median(counted) < (is_alone ? 1.0 : kClear) * expected;
}

} // namespace dspark
