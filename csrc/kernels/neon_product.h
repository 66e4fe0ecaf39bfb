// Walks the strips of W: unpacks a step of 256 weights once and multiplies it with every tile of columns.
#pragma once

#include "kernels/neon_columns.h"
#include "kernels/neon_formats.h"

#include <utility>

namespace dspark::kernels::neon {

// Inlined by force: the sums must stay in registers, and the compiler leaves some of these calls otherwise.

// sum += the products of `n_chunks` chunks with N columns, in the Dot's order.
template <typename Dot, int N, int n_chunks>
[[gnu::always_inline]] inline void add_chunks(const int8x16_t* q, const int8_t* x, int32x4_t* sum) {
    for (int i = 0; i < n_chunks; ++i) {
        Dot::template add<N>(q + kChunkVectors * i, x + kChunk * Dot::padded(N) * i, sum);
    }
}

// acc[c] += sum * d * dx[c], the only rounding of a block.
template <typename Dot, int N>
[[gnu::always_inline]] inline void add_scaled(const int32x4_t* sum, const Floats& d, const float* dx, Floats* acc) {
    for (int c = 0; c < N; ++c) {
        for (int h = 0; h < 2; ++h) {
            const float32x4_t scale = vmulq_n_f32(d.part[h], dx[c]);
            acc[c].part[h] = vfmaq_f32(acc[c].part[h], vcvtq_f32_s32(Dot::rows(sum, c, h)), scale);
        }
    }
}

template <typename Dot, int N>
[[gnu::always_inline]]
inline void multiply_block(const int8x16_t* q, const Floats& d, const int32_t* x, Floats* acc) {
    constexpr int kWidth = Dot::padded(N);
    int32x4_t sum[2 * kWidth] = {};
    add_chunks<Dot, N, kBlockChunks>(q, reinterpret_cast<const int8_t*>(x), sum);
    float dx[N];
    __builtin_memcpy(dx, x + 8 * kWidth, sizeof(dx));
    add_scaled<Dot, N>(sum, d, dx, acc);
}

// acc[c] -= dmin * dx[c] * (mins . sums of the column)
template <int N>
[[gnu::always_inline]] inline void subtract_mins(const SuperStrip& w, const int32_t* sums, const float* dx,
                                                 Floats* acc) {
    for (int c = 0; c < N; ++c) {
        int16_t column[8];
        __builtin_memcpy(column, sums + 4 * c, sizeof(column));
        int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
        for (int s = 0; s < 8; ++s) {
            low = vmlal_n_s16(low, vget_low_s16(w.mins[s]), column[s]);
            high = vmlal_high_n_s16(high, w.mins[s], column[s]);
        }
        acc[c].part[0] = vfmsq_f32(acc[c].part[0], vcvtq_f32_s32(low), vmulq_n_f32(w.dmin.part[0], dx[c]));
        acc[c].part[1] = vfmsq_f32(acc[c].part[1], vcvtq_f32_s32(high), vmulq_n_f32(w.dmin.part[1], dx[c]));
    }
}

template <typename Dot, typename Format, int N>
[[gnu::always_inline]]
inline void multiply_super(const SuperStrip& w, const int32_t* x, Floats* acc) {
    constexpr int kWidth = Dot::padded(N), kSub = Format::kSubChunks;
    const auto* values = reinterpret_cast<const int8_t*>(x);
    int32x4_t total[2 * kWidth] = {};
    for (int s = 0; s < kStepChunks / kSub; ++s) {
        int32x4_t sum[2 * kWidth] = {};
        add_chunks<Dot, N, kSub>(w.q + s * kSub * kChunkVectors, values + s * kSub * kChunk * kWidth, sum);
        for (int i = 0; i < 2 * kWidth; ++i) {
            total[i] = vmlaq_s32(total[i], sum[i], Dot::scale(w.scale[s], i));
        }
    }
    float dx[N];
    __builtin_memcpy(dx, x + 68 * kWidth, sizeof(dx));
    add_scaled<Dot, N>(total, w.d, dx, acc);
    if constexpr (Format::kHasMins) {
        subtract_mins<N>(w, x + 64 * kWidth, dx, acc);
    }
}

template <typename Dot, typename Format> struct SuperKernel {
    SuperStrip strip;

    void load(const uint8_t** rows, int64_t) {
        unpack<Dot>(Format{}, rows, strip);
        for (int r = 0; r < 8; ++r) {
            rows[r] += sizeof(typename Format::Block);
        }
    }

    template <int N> void multiply(int64_t, const int32_t* x, Floats* acc) const {
        multiply_super<Dot, Format, N>(strip, x, acc);
    }
};

template <typename Dot, typename Format> struct BlockKernel {
    BlockStrip strip;

    void load(const uint8_t** rows, int64_t n_values) {
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            strip.d[b] = gather_halves(rows, 0);
            unpack<Dot>(Format{}, rows, strip.q + b * kBlockChunks * kChunkVectors);
            for (int r = 0; r < 8; ++r) {
                rows[r] += sizeof(typename Format::Block);
            }
        }
    }

    template <int N> void multiply(int64_t n_values, const int32_t* x, Floats* acc) const {
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            multiply_block<Dot, N>(strip.q + b * kBlockChunks * kChunkVectors, strip.d[b],
                                   x + b * kBlockGroups * Dot::padded(N), acc);
        }
    }
};

template <typename Kernel, int... widths>
void multiply_tile(const Kernel& kernel, int n, int64_t n_values, const int32_t* x, Floats* acc,
                   std::integer_sequence<int, widths...>) {
    ((n == widths + 1 ? kernel.template multiply<widths + 1>(n_values, x, acc) : void()), ...);
}

template <typename Dot, typename Format>
void multiply_strip(const Columns& columns, const uint8_t** rows, Floats* acc) {
    std::conditional_t<Format::kIsSuper, SuperKernel<Dot, Format>, BlockKernel<Dot, Format>> kernel;
    const int32_t* x = columns.groups;
    for (int c = 0; c < columns.n_columns; ++c) {
        acc[c] = Floats{};
    }
    for (int64_t k = 0; k < columns.n_values; k += kSuperBlockSize) {
        const int64_t n_values = columns.n_values - k < kSuperBlockSize ? columns.n_values - k : kSuperBlockSize;
        kernel.load(rows, n_values);
        for (int first = 0; first < columns.n_columns; first += kTileColumns) {
            const int n = columns.n_columns - first < kTileColumns ? columns.n_columns - first : kTileColumns;
            multiply_tile(kernel, n, n_values, x, acc + first, std::make_integer_sequence<int, kTileColumns>{});
            x += step_groups(Format::kIsSuper, n_values) * Dot::padded(n);
        }
    }
}

static inline void store(float* y, int64_t n_outputs, const Floats& values) {
    float all[kStripOutputs];
    vst1q_f32(all, values.part[0]);
    vst1q_f32(all + 4, values.part[1]);
    __builtin_memcpy(y, all, static_cast<size_t>(n_outputs) * sizeof(float));
}

template <typename Dot, typename Format>
void multiply_outputs(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    Floats acc[kMaxColumns];
    const auto* weights = static_cast<const uint8_t*>(product.weights);
    for (int64_t o = first; o < last; o += kStripOutputs) {
        const int64_t n_outputs = last - o < kStripOutputs ? last - o : kStripOutputs;
        const uint8_t* rows[kStripOutputs];
        for (int64_t r = 0; r < kStripOutputs; ++r) {
            rows[r] = weights + static_cast<size_t>(o + (r < n_outputs ? r : n_outputs - 1)) * product.weight_stride;
        }
        multiply_strip<Dot, Format>(columns, rows, acc);
        for (int c = 0; c < columns.n_columns; ++c) {
            store(product.y + (begin + c) * product.y_stride + o, n_outputs, acc[c]);
        }
    }
}

template <typename Dot>
void multiply(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    switch (product.type) {
    case WeightType::q8_0:
        return multiply_outputs<Dot, Q8_0>(product, begin, columns, first, last);
    case WeightType::q4_0:
        return multiply_outputs<Dot, Q4_0>(product, begin, columns, first, last);
    case WeightType::iq4_nl:
        return multiply_outputs<Dot, IQ4_NL>(product, begin, columns, first, last);
    case WeightType::q4_k:
        return multiply_outputs<Dot, Q4K>(product, begin, columns, first, last);
    case WeightType::q5_k:
        return multiply_outputs<Dot, Q5K>(product, begin, columns, first, last);
    case WeightType::q6_k:
        return multiply_outputs<Dot, Q6K>(product, begin, columns, first, last);
    default:
        return;
    }
}

} // namespace dspark::kernels::neon
