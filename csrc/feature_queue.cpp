#include "feature_queue.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr size_t kBlockRows = 16;
// Blocks that nobody uses are kept up to this: memory asked for anew with every row costs more than the rows' copies.
constexpr size_t kSpareBytes = size_t{8} << 20;

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
    const auto row = static_cast<size_t>(rows.n_rows);
    if (rows.begin + row == rows.blocks.size() * kBlockRows) {
        add_block(rows);
    }
    ++rows.n_rows;
    ++n_rows_;
    return row_of(rows, row);
}

void FeatureQueue::drop_oldest(int32_t sequence, int32_t n_rows) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    const int32_t n = std::min(n_rows, rows.n_rows);
    rows.first_position += n;
    rows.begin += static_cast<size_t>(n);
    rows.n_rows -= n;
    n_rows_ -= static_cast<size_t>(n);
    give_back(rows, 0, rows.begin / kBlockRows);
    rows.begin %= kBlockRows;
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
    const size_t end = rows.begin + static_cast<size_t>(n_kept);
    give_back(rows, (end + kBlockRows - 1) / kBlockRows, rows.blocks.size());
}

void FeatureQueue::add_block(Rows& rows) {
    if (spare_.empty()) {
        rows.blocks.push_back(std::make_unique_for_overwrite<float[]>(kBlockRows * n_features_));
        return;
    }
    rows.blocks.push_back(std::move(spare_.back()));
    spare_.pop_back();
}

void FeatureQueue::give_back(Rows& rows, size_t first, size_t end) {
    const auto begin = rows.blocks.begin();
    const size_t n_spare = kSpareBytes / (kBlockRows * n_features_ * sizeof(float));
    for (size_t i = first; i < end && spare_.size() < n_spare; ++i) {
        spare_.push_back(std::move(rows.blocks[i]));
    }
    rows.blocks.erase(begin + static_cast<std::ptrdiff_t>(first), begin + static_cast<std::ptrdiff_t>(end));
}

std::span<float> FeatureQueue::row_of(const Rows& rows, size_t row) const {
    const size_t place = rows.begin + row;
    return {rows.blocks[place / kBlockRows].get() + place % kBlockRows * n_features_, n_features_};
}

int32_t FeatureQueue::last_position(int32_t sequence) const {
    const Rows& rows = of(sequence);
    return rows.n_rows == 0 ? -1 : rows.first_position + rows.n_rows - 1;
}

std::span<const float> FeatureQueue::features(int32_t sequence, int32_t row) const {
    return row_of(of(sequence), static_cast<size_t>(row));
}

int32_t FeatureQueue::longest() const {
    const auto is_shorter = [](const Rows& a, const Rows& b) { return a.n_rows < b.n_rows; };
    return static_cast<int32_t>(std::max_element(rows_.begin(), rows_.end(), is_shorter) - rows_.begin());
}

} // namespace dspark
