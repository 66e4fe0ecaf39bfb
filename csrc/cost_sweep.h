// Sizes of passes that are timed in turns, and what they took. Must not know: what a pass is.
#pragma once

#include "cost_table.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

namespace dspark {

struct Sweep {
    std::vector<int32_t> sizes;
    double end_ms; // the first round leaves out what begins later, from the largest sizes on
    std::function<double(int32_t)> time;
    size_t n_always = 2; // sizes that are timed whatever the time: a curve needs a start and a slope
    std::vector<std::vector<double>> samples = {};

    // What else runs only adds to a time, and for seconds: of each size the lower quartile, not the median.
    [[nodiscard]] CostPoints points() const { return ranked(4); }
    [[nodiscard]] CostPoints least() const { return ranked(std::numeric_limits<size_t>::max()); }

    [[nodiscard]] CostPoints ranked(size_t quantile) const {
        CostPoints ranked;
        for (size_t i = 0; i < samples.size(); ++i) {
            std::vector<double> sorted = samples[i];
            std::sort(sorted.begin(), sorted.end());
            ranked.emplace_back(sizes[i], sorted[(sorted.size() - 1) / quantile]);
        }
        std::sort(ranked.begin(), ranked.end());
        return ranked;
    }
};

inline constexpr double kLongPass = 10; // ms

// As of a sweep's sizes; the second one of three is all that there is time for where a pass is long.
template <typename Time> double lower_quartile(Time time) {
    std::vector<double> samples{time(), time(), time()};
    while (samples.size() < 9 && samples.back() < kLongPass) {
        samples.push_back(time());
    }
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() == 3 ? 1 : 2];
}

} // namespace dspark
