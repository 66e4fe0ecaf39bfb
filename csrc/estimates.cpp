#include "estimates.h"

#include <algorithm>

namespace dspark {

void MedianRing::push(double value) {
    values_[next_] = value;
    next_ = (next_ + 1) % kCapacity;
    n_ = std::min(n_ + 1, static_cast<int32_t>(kCapacity));
    median_ = find_median();
}

double MedianRing::find_median() const {
    std::array<double, kCapacity> sorted = values_;
    const auto end = sorted.begin() + n_;
    const auto middle = sorted.begin() + n_ / 2;
    std::nth_element(sorted.begin(), middle, end);
    if (n_ % 2 == 1) {
        return *middle;
    }
    return 0.5 * (*middle + *std::max_element(sorted.begin(), middle));
}

void OverheadLine::push(int32_t n_rows, double ms) {
    const double most_ms = kMost * at(n_rows);
    const double y = weight_ > 4 && most_ms > 0 ? std::min(ms, most_ms) : ms;
    const double x = n_rows;
    weight_ = kMemory * weight_ + 1;
    rows_ = kMemory * rows_ + x;
    rows_squared_ = kMemory * rows_squared_ + x * x;
    ms_ = kMemory * ms_ + y;
    rows_ms_ = kMemory * rows_ms_ + x * y;
    const double spread = rows_squared_ - rows_ * rows_ / weight_;
    const double slope = spread > 1e-9 ? (rows_ms_ - rows_ * ms_ / weight_) / spread : 0.0;
    slope_ms_ = std::clamp(slope, 0.0, rows_ > 0 ? ms_ / rows_ : 0.0); // neither part of it is below 0
    base_ms_ = (ms_ - slope_ms_ * rows_) / weight_;
}

} // namespace dspark
