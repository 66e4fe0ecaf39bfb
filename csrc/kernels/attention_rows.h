// The arithmetic of attention, for the vectors of one instruction set: `Simd` is 8 floats and what can be done to them.
//
// Scores, in float, each by itself. Their largest, M. Weights p = exp(s - M). Then two sums whose order must not
// matter: of the weights, in steps of 2^-22; of weights times values, in steps of `grid`, 2^-22 of the row's largest
// value. The latter costs two operations where a float sum takes one: p * v + C, with C so large that the sum is
// rounded to whole steps, and an integer addition of its bits, which grow by one per step.
#pragma once

#include "kernels/attention_run.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace dspark::kernels {

// exp(x) for x <= 0; 0 below -87. NaN stays.
template <typename Simd> [[gnu::always_inline]] inline typename Simd::Floats exp_negative(typename Simd::Floats x) {
    using S = Simd;
    const auto n = S::round(S::mul(x, S::set(1.44269504F)));
    auto r = S::fma(n, S::set(-0.693145752F), x); // ln 2 in two parts: the first times n is exact
    r = S::fma(n, S::set(-1.42860677e-6F), r);
    auto p = S::set(1.0F / 720);
    for (const float c : {1.0F / 120, 1.0F / 24, 1.0F / 6, 0.5F, 1.0F, 1.0F}) {
        p = S::fma(p, r, S::set(c));
    }
    return S::zero_below(x, -87.0F, S::scale_by_power(p, n));
}

// How the values of a row are rounded and summed.
struct Grid {
    float step = 0.0F;
    float offset = 0.0F; // C
};

inline constexpr float kNotFinite = 0x1p17F; // stands for the magnitude of values that are no numbers

// `largest`: a finite f16. Single terms stay below 2^22 steps, and all of them, with weights that sum up to `total`,
// below 2^31. Static: each instruction set has its own, compiled with its flags.
static inline Grid make_grid(float largest, float total) {
    const auto exponent_of = [](float x) { return static_cast<int>(std::bit_cast<uint32_t>(x) >> 23) - 126; };
    const int exponent = largest == 0.0F ? 0 : exponent_of(largest); // 2^exponent is larger
    const int headroom = std::max(0, exponent_of(total) - 8);
    const float step = std::bit_cast<float>(static_cast<uint32_t>(exponent - 22 + headroom + 127) << 23);
    return {step, 1.5F * 0x1p23F * step};
}

template <typename Simd> class RunRows {
  public:
    RunRows(const Attention& attention, const AttentionRun& run, AttentionHeads heads, AttentionScratch& scratch)
        : attention_(attention), run_(run), heads_(heads), scratch_(scratch),
          n_padded_(static_cast<int64_t>(run.cells.size())), n_rows_(run.n_tokens * heads.n) {
        const int64_t kv_head = heads.first / (attention.n_heads / attention.n_kv_heads);
        keys_ = static_cast<const uint8_t*>(attention.k) + static_cast<size_t>(kv_head) * attention.k_head_stride;
        values_ = static_cast<const uint8_t*>(attention.v) + static_cast<size_t>(kv_head) * attention.v_head_stride;
    }

    void compute() {
        for (int64_t block = 0; block < n_padded_; block += kCellBlock) {
            load_keys(block);
            score_block(block);
        }
        find_largest_values();
        for (int64_t row = 0; row < n_rows_; ++row) {
            weigh(row);
        }
        std::fill_n(scratch_.sums.begin(), n_rows_ * attention_.value_size, 0);
        for (int64_t block = 0; block < n_padded_; block += kValueBlock) {
            add_values(block, std::min(block + kValueBlock, n_padded_));
        }
        for (int64_t row = 0; row < n_rows_; ++row) {
            store(row);
        }
    }

  private:
    using Floats = typename Simd::Floats;
    using Ints = typename Simd::Ints;
    struct Row {
        float total = 0.0F; // of the weights; 0: sees nothing
        bool is_finite = true;
        Grid grid;
    };

    [[nodiscard]] int64_t token(int64_t row) const { return run_.first_token + row / heads_.n; }
    [[nodiscard]] int64_t head(int64_t row) const { return heads_.first + row % heads_.n; }
    [[nodiscard]] float* scores(int64_t row) { return scratch_.scores.data() + row * n_padded_; }

    [[nodiscard]] const uint16_t* cell_values(int64_t i) const {
        const auto cell = static_cast<size_t>(run_.cells[static_cast<size_t>(i)]);
        return reinterpret_cast<const uint16_t*>(values_ + cell * attention_.v_cell_stride);
    }

    void load_keys(int64_t block) {
        float* out = scratch_.keys.data();
        for (int64_t i = 0; i < kCellBlock; ++i) {
            const auto cell = static_cast<size_t>(run_.cells[static_cast<size_t>(block + i)]);
            const auto* key = reinterpret_cast<const uint16_t*>(keys_ + cell * attention_.k_cell_stride);
            for (int64_t d = 0; d < attention_.key_size; d += 8, out += 8) {
                Simd::store(out, Simd::load_halves(key + d));
            }
        }
    }

    // The mask of a token for a block; -inf for the cells that fill the last block up.
    [[nodiscard]] Floats load_mask(int64_t token, int64_t block) const {
        uint16_t halves[kCellBlock] = {};
        for (int64_t i = 0; i < kCellBlock && attention_.mask != nullptr; ++i) {
            const int32_t cell = run_.cells[static_cast<size_t>(block + i)];
            halves[i] = attention_.mask[token * attention_.mask_stride + cell];
        }
        for (int64_t i = static_cast<int64_t>(run_.n_cells) - block; i < kCellBlock; ++i) {
            halves[i] = kHidden;
        }
        return Simd::load_halves(halves);
    }

    void score_block(int64_t block) {
        Floats mask = Simd::set(0.0F);
        for (int64_t row = 0; row < n_rows_; row += 2) {
            Floats score[2];
            const int64_t second = row + 1 < n_rows_ ? row + 1 : row;
            dot_block(queries(row), queries(second), score);
            for (int64_t i = 0; i < 2 && row + i < n_rows_; ++i) {
                if ((row + i) % heads_.n == 0) {
                    mask = load_mask(token(row + i), block);
                }
                const Floats scaled = Simd::mul(score[i], Simd::set(attention_.scale));
                // A hidden key may be anything, NaN too.
                Simd::store(scores(row + i) + block, Simd::keep_seen(mask, Simd::add(scaled, mask), -INFINITY));
            }
        }
    }

    [[nodiscard]] const float* queries(int64_t row) const {
        return attention_.q + token(row) * attention_.q_token_stride + head(row) * attention_.q_head_stride;
    }

    // Two rows of Q with 8 keys, 4 at a time. Every dot product has the same order, whichever of the 16 it is.
    void dot_block(const float* first, const float* second, Floats* out) const {
        const int64_t n = attention_.key_size;
        Floats sum[2][kCellBlock] = {};
        for (int64_t k = 0; k < kCellBlock; k += 4) {
            const float* keys = scratch_.keys.data() + k * n;
            Floats a[4] = {}, b[4] = {};
            for (int64_t d = 0; d < n; d += 8) {
                const Floats x = Simd::load(first + d), y = Simd::load(second + d);
#pragma GCC unroll 4
                for (int64_t i = 0; i < 4; ++i) {
                    const Floats key = Simd::pin(Simd::load(keys + i * n + d));
                    a[i] = Simd::fma(x, key, a[i]);
                    b[i] = Simd::fma(y, key, b[i]);
                }
            }
            std::copy_n(a, 4, sum[0] + k);
            std::copy_n(b, 4, sum[1] + k);
        }
        out[0] = Simd::sum_each(sum[0]);
        out[1] = Simd::sum_each(sum[1]);
    }

    void find_largest_values() {
        for (int64_t i = 0; i < n_padded_; ++i) {
            const float largest = Simd::largest_magnitude(cell_values(i), attention_.value_size);
            scratch_.largest[static_cast<size_t>(i)] = largest;
            all_finite_ = all_finite_ && largest < kNotFinite;
        }
    }

    // Scores to weights, and how the row will sum its values.
    void weigh(int64_t row) {
        Row& state = rows_[row];
        state = Row{};
        float* s = scores(row);
        Floats largest = Simd::set(-INFINITY), largest_value = Simd::set(-1.0F);
        for (int64_t i = 0; i < n_padded_; i += 8) { // hidden cells have no say
            const Floats score = Simd::load(s + i);
            largest = Simd::max(largest, score);
            const Floats value = Simd::load(&scratch_.largest[static_cast<size_t>(i)]);
            largest_value = Simd::max(largest_value, Simd::keep_seen(score, value, -1.0F));
        }
        const float most_value = Simd::largest(largest_value);
        if (most_value < 0.0F) { // sees nothing
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
        state.is_finite = most_value < kNotFinite && !std::isnan(Simd::sum(check));
        if (state.is_finite) {
            state.total = sum_weights(s);
            state.grid = make_grid(most_value, state.total);
        }
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
                sum = Simd::add_bits(sum, Simd::add(Simd::load(weights + i), Simd::set(offset)));
            }
            int32_t lanes[8] = {};
            Simd::add_to(lanes, sum, static_cast<int32_t>(0U - bias(offset, (end - begin) / 8)));
            for (const int32_t lane : lanes) {
                total += lane;
            }
        }
        return static_cast<float>(total) * 0x1p-22F;
    }

    // What n offsets add to a sum of bits.
    static uint32_t bias(float offset, int64_t n) { return std::bit_cast<uint32_t>(offset) * static_cast<uint32_t>(n); }

    // What is not finite counts as 0: rows that see it are known, the others must not take weight 0 times it.
    void load_values(int64_t begin, int64_t end) {
        float* out = scratch_.values.data();
        for (int64_t i = begin; i < end; ++i) {
            const bool is_finite = scratch_.largest[static_cast<size_t>(i)] < kNotFinite;
            for (int64_t d = 0; d < attention_.value_size; d += 8, out += 8) {
                Simd::store(out, is_finite ? Simd::load_halves(cell_values(i) + d) : Simd::set(0.0F));
            }
        }
    }

    void add_values(int64_t begin, int64_t end) {
        if (n_rows_ <= 2 && all_finite_) { // each value is used once: a copy would not pay
            n_rows_ == 2 ? add_rows<2, false>(0, begin, end) : add_rows<1, false>(0, begin, end);
            return;
        }
        load_values(begin, end);
        int64_t row = 0;
        for (; row + 2 <= n_rows_; row += 2) {
            add_rows<2, true>(row, begin, end);
        }
        if (row < n_rows_) {
            add_rows<1, true>(row, begin, end);
        }
    }

    template <int n_rows, bool is_loaded> void add_rows(int64_t row, int64_t begin, int64_t end) {
        int64_t d = 0;
        for (; d + 32 <= attention_.value_size; d += 32) {
            add_slice<n_rows, 4, is_loaded>(row, d, begin, end);
        }
        for (; d < attention_.value_size; d += 8) {
            add_slice<n_rows, 1, is_loaded>(row, d, begin, end);
        }
    }

    // n_vectors * 8 values of cells [begin, end), weighted, to the sums of n_rows rows.
    template <int n_rows, int n_vectors, bool is_loaded>
    void add_slice(int64_t row, int64_t d, int64_t begin, int64_t end) {
        Ints sum[n_rows * n_vectors] = {};
        Floats offset[n_rows];
        const float* weights[n_rows];
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; ++r) {
            offset[r] = Simd::set(rows_[row + r].grid.offset);
            weights[r] = scores(row + r);
        }
        const float* values = scratch_.values.data() + d;
        for (int64_t i = begin; i < end; ++i, values += attention_.value_size) {
            Floats v[n_vectors];
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; ++j) {
                v[j] =
                    Simd::pin(is_loaded ? Simd::load(values + 8 * j) : Simd::load_halves(cell_values(i) + d + 8 * j));
            }
#pragma GCC unroll 4
            for (int r = 0; r < n_rows; ++r) {
                const Floats weight = Simd::set(weights[r][i]);
#pragma GCC unroll 4
                for (int j = 0; j < n_vectors; ++j) {
                    Ints& s = sum[r * n_vectors + j];
                    s = Simd::pin(Simd::add_bits(s, Simd::fma(v[j], weight, offset[r])));
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < n_rows; ++r) {
            const uint32_t offsets = bias(rows_[row + r].grid.offset, end - begin);
            int32_t* out = scratch_.sums.data() + (row + r) * attention_.value_size + d;
#pragma GCC unroll 4
            for (int j = 0; j < n_vectors; ++j) {
                Simd::add_to(out + 8 * j, sum[r * n_vectors + j], static_cast<int32_t>(0U - offsets));
            }
        }
    }

    void store(int64_t row) {
        const Row& state = rows_[row];
        float* y = attention_.y + (token(row) * attention_.n_heads + head(row)) * attention_.value_size;
        const int32_t* sums = scratch_.sums.data() + row * attention_.value_size;
        const float factor = state.total == 0.0F ? 0.0F : state.grid.step / state.total;
        for (int64_t d = 0; d < attention_.value_size; ++d) {
            y[d] = state.is_finite ? static_cast<float>(sums[d]) * factor : NAN;
        }
    }

    const Attention& attention_;
    const AttentionRun& run_;
    AttentionHeads heads_;
    AttentionScratch& scratch_;
    int64_t n_padded_;
    int64_t n_rows_;
    bool all_finite_ = true; // the values
    const uint8_t* keys_ = nullptr;
    const uint8_t* values_ = nullptr;
    Row rows_[kRunRows];
};

} // namespace dspark::kernels
