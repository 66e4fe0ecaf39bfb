// Features of committed rows that wait in host memory for their injection into the drafter's cache. Owns: the waiting
// rows of each sequence, gapless, at most a window of them. Must not know: models, caches, passes. Threads: the
// drafter's alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

namespace dspark {

class FeatureQueue {
  public:
    // Rows of `n_features` floats; of one sequence the newest `window` are kept.
    FeatureQueue(size_t n_features, int32_t n_sequences, int32_t window);

    // Room for the features of one more row, to be filled by the caller before the next call. A position that does not
    // continue the sequence's rows drops them: what comes before a gap cannot be injected behind it.
    [[nodiscard]] std::span<float> push(int32_t sequence, int32_t position);
    void drop_oldest(int32_t sequence, int32_t n_rows); // they are injected
    void remove(int32_t sequence, int32_t begin);       // rows at positions >= begin
    void shift(int32_t sequence, int32_t n);            // moves all rows n positions to the front
    void copy(int32_t from, int32_t to, int32_t end);   // appends the rows of `from` at positions < end to `to`

    [[nodiscard]] int32_t n_rows(int32_t sequence) const { return of(sequence).n_rows; }
    [[nodiscard]] int32_t first_position(int32_t sequence) const { return of(sequence).first_position; }
    [[nodiscard]] int32_t last_position(int32_t sequence) const; // -1: empty
    [[nodiscard]] std::span<const float> features(int32_t sequence, int32_t row) const;
    [[nodiscard]] int32_t longest() const; // the sequence with the most rows
    [[nodiscard]] size_t n_bytes() const { return n_rows_ * n_features_ * sizeof(float); }

  private:
    using Block = std::unique_ptr<float[]>; // (rows_per_block_, n_features)

    struct Rows {
        int32_t first_position = 0;
        int32_t n_rows = 0;
        size_t begin = 0; // rows of the first block that were dropped
        std::deque<Block> blocks;
    };

    [[nodiscard]] const Rows& of(int32_t sequence) const { return rows_[static_cast<size_t>(sequence)]; }
    [[nodiscard]] float* row_of(const Rows& rows, int32_t row) const;
    void truncate(Rows& rows, int32_t n_kept);
    void release(Block block);

    size_t n_features_;
    int32_t window_;
    size_t n_rows_ = 0; // of all sequences
    std::vector<Rows> rows_;
    size_t rows_per_block_;
    // To be used again: memory that the system hands out anew costs more than the copy into it.
    std::vector<Block> free_;
};

} // namespace dspark
