// What is learned of a noisy quantity: medians and lines of its last values. Must not know: what the quantity is.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace dspark {

// The last few values of a quantity, answered by their median.
class MedianRing {
  public:
    void push(double value);
    void clear() { *this = {}; }
    [[nodiscard]] double median() const { return median_; } // 0 when empty
    [[nodiscard]] int32_t size() const { return n_; }

  private:
    [[nodiscard]] double find_median() const;

    static constexpr size_t kCapacity = 9;
    std::array<double, kCapacity> values_{};
    size_t next_ = 0;
    int32_t n_ = 0;
    double median_ = 0; // read several times a step
};

// What a step takes beside its passes, as a line over its drafted rows: decayed least squares. A sample far above the
// line is cut: a pause of the machine teaches nothing.
class OverheadLine {
  public:
    void push(int32_t n_rows, double ms);
    [[nodiscard]] bool is_empty() const { return weight_ == 0; }
    [[nodiscard]] double at(int32_t n_rows) const { return base_ms_ + slope_ms_ * n_rows; }

  private:
    static constexpr double kMemory = 0.97;
    static constexpr double kMost = 3; // times what the line says
    double weight_ = 0;
    double rows_ = 0; // weighted sums
    double rows_squared_ = 0;
    double ms_ = 0;
    double rows_ms_ = 0;
    double base_ms_ = 0;
    double slope_ms_ = 0;
};

} // namespace dspark
