#include "feature_queue.h"

#include <algorithm>

namespace dspark {

namespace {

// An emptied sequence keeps room for a few rounds' rows and gives the rest back.
constexpr size_t kKeptRows = 64;

} // namespace

FeatureQueue::FeatureQueue(size_t n_features, int32_t n_sequences, int32_t window)
    : n_features_(n_features), window_(window), rows_(static_cast<size_t>(n_sequences)) {}

std::span<float> FeatureQueue::push(int32_t sequence, int32_t position) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    if (position != rows.first_position + rows.n_rows) {
        truncate(rows, 0);
        rows.first_position = position;
    }
    if (rows.n_rows == window_) {
        drop_oldest(sequence, 1);
    }
    const size_t end = (rows.begin + static_cast<size_t>(rows.n_rows)) * n_features_;
    rows.values.resize(end + n_features_);
    ++rows.n_rows;
    ++n_rows_;
    return std::span(rows.values).subspan(end, n_features_);
}

void FeatureQueue::drop_oldest(int32_t sequence, int32_t n_rows) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    const int32_t n = std::min(n_rows, rows.n_rows);
    rows.first_position += n;
    rows.begin += static_cast<size_t>(n);
    rows.n_rows -= n;
    n_rows_ -= static_cast<size_t>(n);
    compact(rows);
}

void FeatureQueue::remove(int32_t sequence, int32_t begin) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    truncate(rows, std::max(0, begin - rows.first_position));
}

void FeatureQueue::shift(int32_t sequence, int32_t n) { rows_[static_cast<size_t>(sequence)].first_position -= n; }

void FeatureQueue::copy(int32_t from, int32_t to, int32_t end) {
    const int32_t n = std::min(n_rows(from), end - first_position(from));
    for (int32_t row = 0; row < n; ++row) {
        const std::span<float> copied = push(to, first_position(from) + row);
        std::ranges::copy(features(from, row), copied.begin());
    }
}

void FeatureQueue::truncate(Rows& rows, int32_t n_kept) {
    if (n_kept >= rows.n_rows) {
        return;
    }
    n_rows_ -= static_cast<size_t>(rows.n_rows - n_kept);
    rows.n_rows = n_kept;
    compact(rows);
}

// Moving the rows that are left only when fewer are left than were dropped costs O(1) per row in the long run.
void FeatureQueue::compact(Rows& rows) const {
    const auto n_left = static_cast<size_t>(rows.n_rows);
    if (n_left == 0 && rows.values.capacity() > kKeptRows * n_features_) {
        rows.values = {};
    }
    rows.values.resize(n_left == 0 ? 0 : (rows.begin + n_left) * n_features_);
    if (rows.begin >= n_left) {
        const size_t n_dropped = std::min(rows.begin * n_features_, rows.values.size());
        rows.values.erase(rows.values.begin(), rows.values.begin() + static_cast<std::ptrdiff_t>(n_dropped));
        rows.begin = 0;
    }
}

int32_t FeatureQueue::last_position(int32_t sequence) const {
    const Rows& rows = of(sequence);
    return rows.n_rows == 0 ? -1 : rows.first_position + rows.n_rows - 1;
}

std::span<const float> FeatureQueue::features(int32_t sequence, int32_t row) const {
    const Rows& rows = of(sequence);
    return std::span(rows.values).subspan((rows.begin + static_cast<size_t>(row)) * n_features_, n_features_);
}

int32_t FeatureQueue::longest() const {
    const auto is_shorter = [](const Rows& a, const Rows& b) { return a.n_rows < b.n_rows; };
    return static_cast<int32_t>(std::max_element(rows_.begin(), rows_.end(), is_shorter) - rows_.begin());
}

} // namespace dspark
