// The arithmetic of attention, for the vectors of one instruction set: `Simd` is 8 floats and what can be done to them.
//
// Scores, in float, each by itself. Their largest, M. Weights p = exp(s - M). Then two sums whose order must not
// matter: of the weights, in steps of 2^-22; of weights times values, in steps of about 2^-22 of the row's largest
// value. A float near 1.5 * 2^23 holds whole numbers only, so that sum += p * v, fused, adds p * v rounded to whole
// steps: always the same number, for halfway cases, which go by the sum, do not exist. Their last bit would have to be
// 1/2, but the last of the 24 bits of a weight is made 1: such a product is 2^22 or more, and none is. After each
// block the bits, which grow by one per step, are added up as integers.
#pragma once

#include "kernels/attention_run.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

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

inline constexpr float kNotFinite = 0x1p17F; // stands for the magnitude of values that are no numbers

// The step in which the values of a row are summed. `largest`: a finite f16; `total`: of the weights, the largest of
// which is 1. The terms of a block stay below 2^22 steps, those of all blocks below 2^31. Static: each instruction set
// has its own, compiled with its flags.
static inline float find_step(float largest, float total) {
    static_assert(kValueBlock == 1 << 4);
    const auto exponent_of = [](float x) { return static_cast<int>(std::bit_cast<uint32_t>(x) >> 23) - 126; };
    const int exponent = largest == 0.0F ? 0 : exponent_of(largest); // 2^exponent is larger
    const int total_exponent = total <= 1.0F ? 0 : exponent_of(total);
    const int headroom = std::max(std::min(4, total_exponent), total_exponent - 9);
    return std::bit_cast<float>(static_cast<uint32_t>(exponent - 22 + headroom + 127) << 23);
}

inline constexpr float kOffset = 1.5F * 0x1p23F; // around it floats are whole numbers

// n_rows rows of Q with 8 keys. Every dot product has the same order, whichever of them it is.
template <typename Simd, int n_rows>
[[gnu::always_inline]] inline void dot_rows(const float* queries, const uint16_t* const* keys, int64_t n,
                                            typename Simd::Floats* out) {
    using Floats = typename Simd::Floats;
    constexpr int n_keys = 8 / n_rows; // what the registers hold
    Floats all[n_rows][kCellBlock];
    for (int64_t k = 0; k < kCellBlock; k += n_keys) {
        Floats sum[n_rows][n_keys] = {};
        const float* q = queries;
        for (int64_t d = 0; d < n; d += 8, q += 8 * n_rows) {
            Floats x[n_keys];
#pragma GCC unroll 8
            for (int i = 0; i < n_keys; ++i) {
                x[i] = Simd::pin(Simd::load_halves(keys[k + i] + d));
            }
#pragma GCC unroll 8
            for (int r = 0; r < n_rows; ++r) {
                const Floats y = Simd::pin(Simd::load(q + 8 * r));
#pragma GCC unroll 8
                for (int i = 0; i < n_keys; ++i) {
                    sum[r][i] = Simd::fma(y, x[i], sum[r][i]);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < n_rows; ++r) {
            std::copy_n(sum[r], n_keys, all[r] + k);
        }
    }
    for (int r = 0; r < n_rows; ++r) {
        out[r] = Simd::sum_each(all[r]);
    }
}

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
        for (int64_t block = 0; block < n_padded_; block += kCellBlock) {
            for (int64_t i = 0; i < n_kv_heads_; ++i) {
                score_block(i, block);
                find_largest_values(i, block);
            }
        }
        for (int64_t row = 0; row < n_rows_; ++row) {
            weigh(row);
        }
        std::fill_n(scratch_.sums.begin(), n_rows_ * attention_.value_size, 0);
        for (int64_t block = 0; block < n_padded_; block += kValueBlock) {
            for (int64_t i = 0; i < n_kv_heads_; ++i) {
                add_values(i, block);
            }
        }
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
        float total = 0.0F; // of the weights; 0: sees nothing
        float step = 0.0F;  // of the sums of values
        bool is_finite = true;
    };

    // Calls rows(size, row) for the rows of a key head, size at a time: 4, then 2, then 1.
    template <typename Rows> void for_rows(int64_t kv_head, Rows rows) const {
        int64_t row = kv_head * n_kv_rows_;
        const int64_t end = row + n_kv_rows_;
        for (; row + 4 <= end; row += 4) {
            rows(std::integral_constant<int, 4>(), row);
        }
        if (row + 2 <= end) {
            rows(std::integral_constant<int, 2>(), row);
            row += 2;
        }
        if (row < end) {
            rows(std::integral_constant<int, 1>(), row);
        }
    }

    [[nodiscard]] float* scores(int64_t row) { return scratch_.scores.data() + row * stride_; }
    [[nodiscard]] float* largest(int64_t kv_head) { return scratch_.largest.data() + kv_head * n_padded_; }
    [[nodiscard]] Halves key(int64_t kv_head, int64_t i) const {
        const auto cell = static_cast<size_t>(run_.cells[static_cast<size_t>(i)]);
        const auto head = static_cast<size_t>(first_kv_head_ + kv_head);
        return reinterpret_cast<Halves>(static_cast<const uint8_t*>(attention_.k) + cell * attention_.k_cell_stride +
                                        head * attention_.k_head_stride);
    }
    [[nodiscard]] Halves value(int64_t kv_head, int64_t i) const {
        const auto cell = static_cast<size_t>(run_.cells[static_cast<size_t>(i)]);
        const auto head = static_cast<size_t>(first_kv_head_ + kv_head);
        return reinterpret_cast<Halves>(static_cast<const uint8_t*>(attention_.v) + cell * attention_.v_cell_stride +
                                        head * attention_.v_head_stride);
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
                // A hidden key may be anything, NaN too.
                Simd::store(scores(row + i) + block, Simd::keep_seen(mask, Simd::add(scaled, mask), -INFINITY));
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

    // Scores to weights in units of the steps in which the row will sum its values.
    void weigh(int64_t row) {
        Row& state = rows_[row];
        float* s = scores(row);
        const float* values = largest(row / n_kv_rows_);
        Floats largest = Simd::set(-INFINITY), largest_value = Simd::set(-1.0F);
        for (int64_t i = 0; i < n_padded_; i += 8) { // hidden cells have no say
            const Floats score = Simd::load(s + i);
            largest = Simd::max(largest, score);
            largest_value = Simd::max(largest_value, Simd::keep_seen(score, Simd::load(values + i), -1.0F));
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
        if (!state.is_finite) {
            return;
        }
        state.total = sum_weights(s);
        state.step = find_step(most_value, state.total);
        const Floats n_steps = Simd::set(1.0F / state.step); // a power of two: exact
        for (int64_t i = 0; i < n_padded_; i += 8) {
            Simd::store(s + i, Simd::make_odd(Simd::mul(Simd::load(s + i), n_steps)));
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

    void add_values(int64_t kv_head, int64_t block) {
        Halves values[kValueBlock];
        for (int64_t i = 0; i < kValueBlock; ++i) {
            // What is not finite counts as 0: rows that see it are known, the others must not take weight 0 times it.
            const bool is_finite = largest(kv_head)[block + i] < kNotFinite;
            values[i] = is_finite ? value(kv_head, block + i) : scratch_.zeros.data();
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
            y[d] = state.is_finite ? static_cast<float>(sum) * factor : NAN;
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
    Row rows_[kRunRows];
};

} // namespace dspark::kernels
