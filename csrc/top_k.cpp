// Implements top_k.h.
#include "top_k.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace dspark {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Calls visit(index) for those of x that reach the threshold, in order. Few do: bits are cheaper to walk than values.
template <class Visit> void visit_at_least(const float* x, size_t n, float threshold, Visit visit) {
    for (uint64_t bits = mask_at_least(x, n, threshold); bits != 0; bits &= bits - 1) {
        visit(static_cast<size_t>(std::countr_zero(bits)));
    }
}

} // namespace

bool TopSearch::scan(std::span<const float> row) {
    row_ = row;
    maxima_.resize((row.size() + kMaxGroup - 1) / kMaxGroup);
    const bool is_surely_valid = max_groups(row.data(), row.size(), maxima_.data());
    if (!is_surely_valid && !is_below_infinity(row.data(), row.size())) {
        return false;
    }
    largest_ = maxima_.empty() ? -kInf : *std::max_element(maxima_.begin(), maxima_.end());
    return largest_ > -kInf;
}

std::span<const Ranked> TopSearch::at_least(float threshold) {
    found_.clear();
    const float least = std::max(threshold, std::numeric_limits<float>::lowest()); // all but -inf
    for (size_t group = 0; group < maxima_.size(); ++group) {
        if (maxima_[group] < least) {
            continue;
        }
        const size_t begin = group * kMaxGroup;
        const size_t n = std::min(kMaxGroup, row_.size() - begin);
        visit_at_least(row_.data() + begin, n, least,
                       [&](size_t i) { found_.push_back({row_[begin + i], static_cast<int32_t>(begin + i)}); });
    }
    return found_;
}

// Into bounds_: maxima of groups of values, at least k of them where the row is long enough.
void TopSearch::find_bounds(size_t k) {
    bounds_ = maxima_;
    if (k <= bounds_.size()) {
        return;
    }
    bounds_.clear();
    for (size_t begin = 0; begin < row_.size(); begin += kLanes) {
        const size_t n = std::min(kLanes, row_.size() - begin);
        bounds_.push_back(*std::max_element(row_.data() + begin, row_.data() + begin + n));
    }
}

// The k-th largest group maximum is a lower bound of the k-th largest value, and few values beyond the k lie above it.
std::span<const Ranked> TopSearch::top(int32_t k) {
    if (k <= 0) {
        return {};
    }
    const auto n_wanted = static_cast<size_t>(k);
    find_bounds(n_wanted);
    at_least(n_wanted <= bounds_.size() ? kth_largest(bounds_, n_wanted, keys_) : -kInf);
    keep_top(found_, n_wanted, bounds_, keys_);
    return found_;
}

void keep_top(std::vector<Ranked>& entries, size_t k, std::vector<float>& weights, std::vector<int32_t>& keys) {
    if (k == 0 || k >= entries.size()) {
        entries.resize(std::min(k, entries.size()));
        return;
    }
    weights.resize(entries.size());
    std::transform(entries.begin(), entries.end(), weights.begin(), [](const Ranked& r) { return r.weight; });
    const float least = kth_largest(weights, k, keys);
    const auto n_above = std::count_if(weights.begin(), weights.end(), [least](float w) { return w > least; });
    auto n_ties = static_cast<std::ptrdiff_t>(k) - n_above;
    size_t n_kept = 0;
    for (const Ranked entry : entries) {
        if (entry.weight > least || (entry.weight == least && n_ties-- > 0)) {
            entries[n_kept++] = entry;
        }
    }
    entries.resize(n_kept);
}

void top_rows(const TopRows& rows, int part, int n_parts) {
    thread_local TopSearch search; // its buffers stay: nothing is allocated in the steady state
    for (int64_t row = part; row < rows.n_rows; row += n_parts) {
        const std::span<const float> values(rows.rows + row * rows.row_stride, static_cast<size_t>(rows.n_values));
        Ranked* out = rows.out + row * (rows.k + 1);
        if (!search.scan(values)) {
            *out = {0.0f, -1};
            continue;
        }
        const std::span<const Ranked> found = search.top(rows.k);
        *out = {0.0f, static_cast<int32_t>(found.size())};
        std::transform(found.begin(), found.end(), out + 1, [&](Ranked entry) {
            return rows.names == nullptr ? entry : Ranked{entry.weight, static_cast<int32_t>(rows.names[entry.id])};
        });
    }
}

} // namespace dspark
