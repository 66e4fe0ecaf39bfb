// The arithmetic of attention, for the vectors of one instruction set: `Simd` is 8 floats and what can be done to them.
//
// Scores, in float, each by itself. Their largest, M. Weights p = exp(s - M). Then two sums whose order must not
// matter: of the weights, in steps of 2^-22; of weights times values, in steps of about 2^-22 of the row's largest
// value. A float near 1.5 * 2^23 holds whole numbers only, so that sum += p * v, fused, adds p * v rounded to whole
// steps: always the same number, for halfway cases, which go by the sum, do not exist. Their last bit would have to be
// 1/2, but the last of the 24 bits of a weight is made 1: such a product is 2^22 or more, and none is. After each
// block the bits, which grow by one per step, are added up as integers.
//
// The step has to be known before the values are read. What a sequence's largest value was in its last pass, it nearly
// always still is: a single token goes by that, sees the true one on its way, and starts again where they differ.
#pragma once

#include "kernels/attention_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace dspark::kernels {

template <typename Simd> class RunRows {
  public:
    RunRows(const Attention& attention, const AttentionRun& run, AttentionHeads heads, AttentionScratch& scratch)
        : attention_(attention), run_(run), scratch_(scratch), n_padded_(static_cast<int64_t>(run.cells.size())),
          stride_(score_stride(run.cells.size())) {
        const int64_t group = attention.n_heads / attention.n_kv_heads;
        const int64_t n_heads = std::min(heads.n, group); // of one key head
        first_kv_head_ = heads.first / group;
        n_kv_heads_ = heads.n / n_heads;
        n_kv_rows_ = run.n_tokens * n_heads;
        n_rows_ = n_kv_rows_ * n_kv_heads_;
        for (int64_t row = 0; row < n_rows_; ++row) {
            const int64_t token = row % n_kv_rows_ / n_heads;
            rows_[row].token = run.first_token + token;
            rows_[row].head = heads.first + row / n_kv_rows_ * n_heads + row % n_heads;
        }
    }

    // All key heads of a block of cells, then the next block: along the memory.
    void compute() {
        pack_queries();
        is_recalled_ = recall_largest_values();
        for (int64_t block = 0; block < n_padded_; block += kCellBlock) {
            for (int64_t i = 0; i < n_kv_heads_; ++i) {
                score_block(i, block);
                if (!is_recalled_) {
                    find_largest_values(i, block);
                }
            }
        }
        for (int64_t row = 0; row < n_rows_; ++row) {
            weigh(row);
            set_step(row);
        }
        sum_values();
        if (is_recalled_ && correct_steps()) {
            sum_values();
        }
        remember_largest_values();
        for (int64_t row = 0; row < n_rows_; ++row) {
            store(row);
        }
    }

  private:
    using Floats = typename Simd::Floats;
    using Ints = typename Simd::Ints;
    using Halves = const uint16_t*;

    static constexpr int64_t kAhead = 16; // cells; a block's heads are asked for while those before it are computed

    struct Row {
        int64_t token = 0;
        int64_t head = 0;
        float total = 0.0F;          // of the weights; 0: sees nothing
        float largest_value = -1.0F; // that it sees
        float step = 1.0F;           // of the sums of values

        [[nodiscard]] bool is_finite() const { return largest_value < kNotFinite && !std::isnan(total); }
    };

    // Calls rows(size, row) for the rows of a key head, as split_rows does.
    template <typename Rows> void for_rows(int64_t kv_head, Rows rows) const {
        split_rows(kv_head * n_kv_rows_, (kv_head + 1) * n_kv_rows_, rows);
    }

    [[nodiscard]] float* scores(int64_t row) { return scratch_.scores.data() + row * stride_; }
    [[nodiscard]] float* largest(int64_t kv_head) { return scratch_.largest.data() + kv_head * n_padded_; }
    [[nodiscard]] Halves key(int64_t kv_head, int64_t i) const {
        return place(attention_.k, attention_.k_cell_stride, attention_.k_head_stride, kv_head, i);
    }
    [[nodiscard]] Halves value(int64_t kv_head, int64_t i) const {
        return place(attention_.v, attention_.v_cell_stride, attention_.v_head_stride, kv_head, i);
    }
    [[nodiscard]] Halves place(const void* cache, size_t cell_stride, size_t head_stride, int64_t kv_head,
                               int64_t i) const {
        const auto cell = static_cast<size_t>(run_.cells[static_cast<size_t>(i)]);
        const auto head = static_cast<size_t>(first_kv_head_ + kv_head);
        return reinterpret_cast<Halves>(static_cast<const uint8_t*>(cache) + cell * cell_stride + head * head_stride);
    }

    static void prefetch(Halves p, int64_t n) {
        for (int64_t i = 0; i < n; i += 32) {
            __builtin_prefetch(p + i, 0, 2);
        }
    }

    // In the order in which score_block reads them: (rows in steps of for_rows, key_size / 8, rows, 8).
    void pack_queries() {
        for (int64_t i = 0; i < n_kv_heads_; ++i) {
            for_rows(i, [&](auto n, int64_t row) {
                float* out = scratch_.queries.data() + row * attention_.key_size;
                for (int64_t d = 0; d < attention_.key_size; d += 8) {
                    for (int64_t r = row; r < row + n; ++r, out += 8) {
                        const Row& at = rows_[r];
                        std::copy_n(attention_.q + at.token * attention_.q_token_stride +
                                        at.head * attention_.q_head_stride + d,
                                    8, out);
                    }
                }
            });
        }
    }

    // The mask of a token for a block; -inf for the cells that fill the last block up.
    [[nodiscard]] Floats load_mask(int64_t token, int64_t block) const {
        const int32_t* cells = run_.cells.data() + block;
        const int64_t n = std::max<int64_t>(0, static_cast<int64_t>(run_.n_cells) - block);
        const uint16_t* mask = attention_.mask + token * attention_.mask_stride;
        if (n >= kCellBlock && attention_.mask == nullptr) {
            return Simd::set(0.0F);
        }
        if (n >= kCellBlock && cells[kCellBlock - 1] - cells[0] == kCellBlock - 1) {
            return Simd::load_halves(mask + cells[0]);
        }
        uint16_t halves[kCellBlock] = {};
        for (int64_t i = 0; i < kCellBlock && attention_.mask != nullptr; ++i) {
            halves[i] = mask[cells[i]];
        }
        for (int64_t i = n; i < kCellBlock; ++i) {
            halves[i] = kHidden;
        }
        return Simd::load_halves(halves);
    }

    void score_block(int64_t kv_head, int64_t block) {
        Halves keys[kCellBlock];
        for (int64_t i = 0; i < kCellBlock; ++i) {
            keys[i] = key(kv_head, block + i);
            if (block + kAhead < n_padded_) {
                prefetch(key(kv_head, block + kAhead + i), attention_.key_size);
            }
        }
        int64_t token = -1;
        Floats mask = Simd::set(0.0F);
        for_rows(kv_head, [&](auto n, int64_t row) {
            Floats score[n];
            Simd::template dot<n>(scratch_.queries.data() + row * attention_.key_size, keys, attention_.key_size,
                                  score);
            for (int64_t i = 0; i < n; ++i) {
                if (rows_[row + i].token != token) {
                    token = rows_[row + i].token;
                    mask = load_mask(token, block);
                }
                const Floats scaled = Simd::mul(score[i], Simd::set(attention_.scale));
                const Floats sum = Simd::add(scaled, mask);
                // A hidden key may be anything, NaN too. A cell that is seen is never -inf.
                const Floats seen = Simd::keep_seen(sum, sum, std::numeric_limits<float>::lowest());
                Simd::store(scores(row + i) + block, Simd::keep_seen(mask, seen, -INFINITY));
            }
        });
    }

    void find_largest_values(int64_t kv_head, int64_t block) {
        float* out = largest(kv_head) + block;
        for (int64_t i = 0; i < kCellBlock; ++i) {
            if (block + kAhead < n_padded_) {
                prefetch(value(kv_head, block + kAhead + i), attention_.value_size);
            }
            out[i] = Simd::largest_magnitude(value(kv_head, block + i), attention_.value_size);
        }
    }

    [[nodiscard]] KnownLargest& known_largest(int64_t kv_head) const {
        return scratch_.known[known_index(value(kv_head, 0))];
    }

    // Of one token, which sees all cells of the run.
    bool recall_largest_values() {
        bool is_known = run_.n_tokens == 1 && n_padded_ > 0;
        for (int64_t i = 0; i < n_kv_heads_ && is_known; ++i) {
            const KnownLargest& known = known_largest(i);
            is_known = known.value == value(i, 0);
            for (int64_t row = i * n_kv_rows_; row < (i + 1) * n_kv_rows_; ++row) {
                rows_[row].largest_value = known.largest;
            }
            found_[i] = 0.0F;
        }
        return is_known;
    }

    void remember_largest_values() const {
        for (int64_t i = 0; i < n_kv_heads_ && run_.n_tokens == 1 && n_padded_ > 0; ++i) {
            known_largest(i) = {value(i, 0), rows_[i * n_kv_rows_].largest_value};
        }
    }

    // To the largest values that were found. Whether sums have to be taken again.
    bool correct_steps() {
        bool is_changed = false;
        for (int64_t row = 0; row < n_rows_; ++row) {
            const float step = rows_[row].step;
            rows_[row].largest_value = found_[row / n_kv_rows_];
            set_step(row);
            is_changed = is_changed || rows_[row].step != step;
        }
        return is_changed;
    }

    // Scores to weights, the largest of which is 1.
    void weigh(int64_t row) {
        Row& state = rows_[row];
        float* s = scores(row);
        Floats largest = Simd::set(-INFINITY);
        for (int64_t i = 0; i < n_padded_; i += 8) { // hidden cells have no say
            largest = Simd::max(largest, Simd::load(s + i));
        }
        if (!is_recalled_) {
            state.largest_value = largest_seen_value(row);
        }
        if (state.largest_value < 0.0F) { // sees nothing
            std::fill_n(s, n_padded_, 0.0F);
            return;
        }
        const Floats most = Simd::set(Simd::largest(largest));
        Floats check = Simd::set(0.0F);
        for (int64_t i = 0; i < n_padded_; i += 8) {
            const Floats weight = exp_negative<Simd>(Simd::sub(Simd::load(s + i), most));
            check = Simd::add(check, weight);
            Simd::store(s + i, weight);
        }
        state.total = std::isnan(Simd::sum(check)) ? NAN : sum_weights(s);
    }

    [[nodiscard]] float largest_seen_value(int64_t row) {
        const float* s = scores(row);
        const float* values = largest(row / n_kv_rows_);
        Floats most = Simd::set(-1.0F);
        for (int64_t i = 0; i < n_padded_; i += 8) {
            most = Simd::max(most, Simd::keep_seen(Simd::load(s + i), Simd::load(values + i), -1.0F));
        }
        return Simd::largest(most);
    }

    // Weights to units of the step in which the row sums its values: powers of two, so that it can be done again.
    void set_step(int64_t row) {
        Row& state = rows_[row];
        if (!state.is_finite() || state.largest_value < 0.0F) {
            return;
        }
        const float step = find_step(state.largest_value, state.total);
        float* s = scores(row);
        const Floats factor = Simd::set(state.step / step);
        for (int64_t i = 0; i < n_padded_ && step != state.step; i += 8) {
            Simd::store(s + i, Simd::make_odd(Simd::mul(Simd::load(s + i), factor)));
        }
        state.step = step;
    }

    // In steps of 2^-22, like the products with the values: the same weights are too small to count in both.
    [[nodiscard]] float sum_weights(const float* weights) const {
        constexpr float offset = 3.0F;       // 1.5 * 2^23 steps
        constexpr int64_t n_exact = 256 * 8; // below 2^31 in every lane
        int64_t total = 0;
        for (int64_t begin = 0; begin < n_padded_; begin += n_exact) {
            const int64_t end = std::min(begin + n_exact, n_padded_);
            Ints sum = {};
            for (int64_t i = begin; i < end; i += 8) {
                sum = Simd::add_ints(sum, Simd::bits(Simd::add(Simd::load(weights + i), Simd::set(offset))));
            }
            int32_t lanes[8] = {};
            Simd::add_to(lanes, sum);
            for (const int32_t lane : lanes) {
                total += static_cast<int32_t>(static_cast<uint32_t>(lane) - bias(offset, (end - begin) / 8));
            }
        }
        return static_cast<float>(total) * 0x1p-22F;
    }

    // What n offsets add to a sum of bits.
    static uint32_t bias(float offset, int64_t n) { return std::bit_cast<uint32_t>(offset) * static_cast<uint32_t>(n); }

    void sum_values() {
        std::fill_n(scratch_.sums.begin(), n_rows_ * attention_.value_size, 0);
        for (int64_t block = 0; block < n_padded_; block += kValueBlock) {
            for (int64_t i = 0; i < n_kv_heads_; ++i) {
                add_values(i, block);
            }
        }
    }

    void add_values(int64_t kv_head, int64_t block) {
        Halves values[kValueBlock];
        for (int64_t i = 0; i < kValueBlock; ++i) {
            // What is not finite counts as 0: rows that see it are known, the others must not take weight 0 times it.
            const bool is_finite = is_recalled_ || largest(kv_head)[block + i] < kNotFinite;
            values[i] = is_finite ? value(kv_head, block + i) : scratch_.zeros.data();
            if (is_recalled_) {
                found_[kv_head] = std::max(found_[kv_head], Simd::largest_magnitude(values[i], attention_.value_size));
            }
            if (block + kAhead < n_padded_) {
                prefetch(value(kv_head, block + kAhead + i), attention_.value_size);
            }
        }
        for_rows(kv_head, [&](auto n, int64_t row) {
            using Wide = typename Simd::Wide;
            constexpr int n_vectors = std::min(Wide::kSums / n, 8);
            int64_t d = 0;
            for (; d + n_vectors * Wide::kLanes <= attention_.value_size; d += n_vectors * Wide::kLanes) {
                add_slice<Wide, n, n_vectors>(row, d, block, values);
            }
            for (; d + n_vectors / 2 * Wide::kLanes <= attention_.value_size; d += n_vectors / 2 * Wide::kLanes) {
                add_slice<Wide, n, n_vectors / 2>(row, d, block, values);
            }
            for (; d < attention_.value_size; d += 8) {
                add_slice<Simd, n, 1>(row, d, block, values);
            }
        });
    }

    // n_vectors of the values of a block, weighted, to the sums of n_rows rows.
    template <typename V, int n_rows, int n_vectors>
    void add_slice(int64_t row, int64_t d, int64_t block, const Halves* values) {
        typename V::Floats sum[n_rows][n_vectors];
#pragma GCC unroll 16
        for (int i = 0; i < n_rows * n_vectors; ++i) {
            sum[i / n_vectors][i % n_vectors] = V::set(kOffset);
        }
        const float* weights = scores(row) + block;
#pragma GCC unroll 4
        for (int64_t i = 0; i < kValueBlock; ++i) {
            typename V::Floats v[n_vectors];
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; ++j) {
                v[j] = V::pin(V::load_halves(values[i] + d + V::kLanes * j));
            }
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; ++r) {
                const auto weight = V::pin(V::set(weights[r * stride_ + i]));
#pragma GCC unroll 8
                for (int j = 0; j < n_vectors; ++j) {
                    sum[r][j] = V::fma(v[j], weight, sum[r][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; ++r) {
            int32_t* out = scratch_.sums.data() + (row + r) * attention_.value_size + d;
#pragma GCC unroll 8
            for (int j = 0; j < n_vectors; ++j) {
                V::add_to(out + V::kLanes * j, V::bits(sum[r][j]));
            }
        }
    }

    void store(int64_t row) {
        const Row& state = rows_[row];
        float* y = attention_.y + (state.token * attention_.n_heads + state.head) * attention_.value_size;
        const int32_t* sums = scratch_.sums.data() + row * attention_.value_size;
        const float factor = state.total == 0.0F ? 0.0F : state.step / state.total;
        const uint32_t offsets = bias(kOffset, n_padded_ / kValueBlock);
        for (int64_t d = 0; d < attention_.value_size; ++d) {
            const auto sum = static_cast<int32_t>(static_cast<uint32_t>(sums[d]) - offsets);
            y[d] = state.is_finite() ? static_cast<float>(sum) * factor : NAN;
        }
    }

    const Attention& attention_;
    const AttentionRun& run_;
    AttentionScratch& scratch_;
    int64_t n_padded_;
    int64_t stride_;
    int64_t first_kv_head_;
    int64_t n_kv_heads_;
    int64_t n_kv_rows_; // of one key head
    int64_t n_rows_;
    bool is_recalled_ = false; // the largest values
    float found_[kShareRows];  // of a key head, on the way
    Row rows_[kShareRows];
};

} // namespace dspark::kernels
