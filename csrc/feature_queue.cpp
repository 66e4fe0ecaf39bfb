#include "feature_queue.h"

#include <algorithm>
#include <utility>

namespace dspark {

namespace {

constexpr size_t kBlockFloats = size_t{1} << 16;
constexpr size_t kMostFreeFloats = size_t{1} << 23; // 32 MB; what is emptied beyond goes back to the system

} // namespace

FeatureQueue::FeatureQueue(size_t n_features, int32_t n_sequences, int32_t window)
    : n_features_(n_features), window_(window), rows_(static_cast<size_t>(n_sequences)),
      rows_per_block_(std::max<size_t>(1, kBlockFloats / n_features)) {}

float* FeatureQueue::row_of(const Rows& rows, int32_t row) const {
    const size_t index = rows.begin + static_cast<size_t>(row);
    return rows.blocks[index / rows_per_block_].get() + index % rows_per_block_ * n_features_;
}

std::span<float> FeatureQueue::push(int32_t sequence, int32_t position) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    if (position != rows.first_position + rows.n_rows) {
        truncate(rows, 0);
        rows.first_position = position;
    }
    if (rows.n_rows == window_) {
        drop_oldest(sequence, 1);
    }
    if (rows.begin + static_cast<size_t>(rows.n_rows) == rows.blocks.size() * rows_per_block_) {
        if (free_.empty()) {
            free_.push_back(std::make_unique_for_overwrite<float[]>(rows_per_block_ * n_features_));
        }
        rows.blocks.push_back(std::move(free_.back()));
        free_.pop_back();
    }
    ++n_rows_;
    return {row_of(rows, rows.n_rows++), n_features_};
}

void FeatureQueue::drop_oldest(int32_t sequence, int32_t n_rows) {
    Rows& rows = rows_[static_cast<size_t>(sequence)];
    const int32_t n = std::min(n_rows, rows.n_rows);
    rows.first_position += n;
    rows.begin += static_cast<size_t>(n);
    rows.n_rows -= n;
    n_rows_ -= static_cast<size_t>(n);
    for (; rows.begin >= rows_per_block_; rows.begin -= rows_per_block_) {
        release(std::move(rows.blocks.front()));
        rows.blocks.pop_front();
    }
    truncate(rows, rows.n_rows);
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

// Blocks behind the last row are free too.
void FeatureQueue::truncate(Rows& rows, int32_t n_kept) {
    if (n_kept < rows.n_rows) {
        n_rows_ -= static_cast<size_t>(rows.n_rows - n_kept);
        rows.n_rows = n_kept;
    }
    if (rows.n_rows == 0) {
        rows.begin = 0;
    }
    const size_t n_used = rows.begin + static_cast<size_t>(rows.n_rows);
    while (rows.blocks.size() * rows_per_block_ >= n_used + rows_per_block_) {
        release(std::move(rows.blocks.back()));
        rows.blocks.pop_back();
    }
}

void FeatureQueue::release(Block block) {
    if ((free_.size() + 1) * rows_per_block_ * n_features_ <= kMostFreeFloats) {
        free_.push_back(std::move(block));
    }
}

int32_t FeatureQueue::last_position(int32_t sequence) const {
    const Rows& rows = of(sequence);
    return rows.n_rows == 0 ? -1 : rows.first_position + rows.n_rows - 1;
}

std::span<const float> FeatureQueue::features(int32_t sequence, int32_t row) const {
    return {row_of(of(sequence), row), n_features_};
}

int32_t FeatureQueue::longest() const {
    const auto is_shorter = [](const Rows& a, const Rows& b) { return a.n_rows < b.n_rows; };
    return static_cast<int32_t>(std::max_element(rows_.begin(), rows_.end(), is_shorter) - rows_.begin());
}

} // namespace dspark
