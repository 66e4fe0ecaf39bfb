// Quantizes the columns of X to 8 bits and writes them as tiles. Values and scales are those of the AVX2 file to the
// bit. (ggml multiplies by 1 / (largest / 127) on ARM and by 127 / largest on x86; we always do the latter.)
//
// A tile is up to kTileColumns columns, Dot::padded(width) with what fills it up. A step of a tile:
//   K-quants  16 chunks of values of every column, 8 sums of 32 values as int16 per column, a float scale per column
//   others    per block of 32 values: 2 chunks of every column, a float scale per column
// How the 16 bytes of a chunk lie among those of the other columns is the Dot's.
#pragma once

#include "kernels/neon.h"

namespace dspark::kernels::neon {

// Groups of 4 bytes per column, no more than columns.h allows for: the room is made by the dispatcher.
inline constexpr int kSuperGroups = 64 + 4 + 1;
inline constexpr int kBlockGroups = 8 + 1;

// Compared as integers, which orders magnitudes alike and puts NaN above all: a NaN among the values becomes the scale,
// and so the product, as in ggml. A maximum of floats would lose it.
static inline float largest_magnitude(const float* x, int n_values) {
    int32x4_t largest = vdupq_n_s32(0);
    for (int i = 0; i < n_values; i += 4) {
        largest = vmaxq_s32(largest, vreinterpretq_s32_f32(vabsq_f32(vld1q_f32(x + i))));
    }
    const int32_t bits = vmaxvq_s32(largest);
    float out;
    __builtin_memcpy(&out, &bits, sizeof(out));
    return out;
}

// The first value of that magnitude, with its sign.
static inline float first_of_magnitude(const float* x, float size) {
    for (int i = 0; i < kSuperBlockSize; ++i) {
        if (__builtin_fabsf(x[i]) == size) {
            return x[i];
        }
    }
    return size;
}

static inline int16x4_t round_4(const float* x, float scale) { // to nearest even, as ggml rounds
    return vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x), scale)));
}

static inline int8x16_t round_chunk(const float* x, float scale) {
    const int16x8_t low = vcombine_s16(round_4(x, scale), round_4(x + 4, scale));
    const int16x8_t high = vcombine_s16(round_4(x + 8, scale), round_4(x + 12, scale));
    return vcombine_s8(vqmovn_s16(low), vqmovn_s16(high));
}

template <typename Dot> void put_super(const float* x, int32_t* out, int width, int column) {
    const float largest = first_of_magnitude(x, largest_magnitude(x, kSuperBlockSize));
    const float inverse = largest == 0.0F ? 0.0F : -127.0F / largest;
    auto* values = reinterpret_cast<int8_t*>(out);
    int16_t sums[8] = {};
    for (int i = 0; i < kStepChunks; ++i) {
        const int8x16_t chunk = round_chunk(x + kChunk * i, inverse);
        Dot::put(chunk, values + kChunk * width * i, column);
        sums[i / 2] = static_cast<int16_t>(sums[i / 2] + vaddlvq_s8(chunk));
    }
    __builtin_memcpy(out + 64 * width + 4 * column, sums, sizeof(sums));
    const float scale = largest == 0.0F ? 0.0F : 1.0F / inverse;
    __builtin_memcpy(out + 68 * width + column, &scale, sizeof(scale));
}

template <typename Dot> void put_block(const float* x, int32_t* out, int width, int column) {
    const float largest = largest_magnitude(x, kBlockSize);
    const float inverse = largest != 0.0F ? 127.0F / largest : 0.0F;
    auto* values = reinterpret_cast<int8_t*>(out);
    for (int i = 0; i < kBlockChunks; ++i) {
        Dot::put(round_chunk(x + kChunk * i, inverse), values + kChunk * width * i, column);
    }
    const float16x4_t half = vcvt_f16_f32(vdupq_n_f32(largest / 127.0F)); // ggml stores it as f16
    const float scale = vgetq_lane_f32(vcvt_f32_f16(half), 0);
    __builtin_memcpy(out + 8 * width + column, &scale, sizeof(scale));
}

// One step of one column into its tile.
template <typename Dot>
void put_step(const float* x, int64_t n_values, bool is_super, int32_t* tile, int width, int column) {
    if (is_super) {
        return put_super<Dot>(x, tile, width, column);
    }
    for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
        put_block<Dot>(x + b * kBlockSize, tile + b * kBlockGroups * width, width, column);
    }
}

// Groups of one column in a step.
static inline int64_t step_groups(bool is_super, int64_t n_values) {
    return is_super ? kSuperGroups : n_values / kBlockSize * kBlockGroups;
}

// Columns of all tiles, with what fills them up.
template <typename Dot> int64_t padded_columns(int64_t n_columns) {
    return n_columns / kTileColumns * kTileColumns + Dot::padded(static_cast<int>(n_columns % kTileColumns));
}

template <typename Dot> void prepare(const Product& product, int64_t begin, const Columns& columns, Part part) {
    const bool is_super = columns.layout == ColumnLayout::super32 || columns.layout == ColumnLayout::super16;
    const int64_t n_padded = padded_columns<Dot>(columns.n_columns);
    const int64_t n_steps = (columns.n_values + kSuperBlockSize - 1) / kSuperBlockSize, n_items = n_steps * n_padded;
    for (int64_t item = part.begin(n_items), end = part.end(n_items); item < end; ++item) {
        const int64_t step = item / n_padded, k = step * kSuperBlockSize;
        const int first = static_cast<int>(item % n_padded / kTileColumns * kTileColumns);
        const int c = static_cast<int>(item % n_padded) - first;
        const int n = columns.n_columns - first < kTileColumns ? columns.n_columns - first : kTileColumns;
        const int64_t n_values = columns.n_values - k < kSuperBlockSize ? columns.n_values - k : kSuperBlockSize;
        int32_t* tile = columns.groups + step * step_groups(is_super, kSuperBlockSize) * n_padded +
                        step_groups(is_super, n_values) * first;
        // What fills the tile up is the last column again; nobody reads its sums.
        const float* x = product.x + (begin + first + (c < n ? c : n - 1)) * product.x_stride + k;
        put_step<Dot>(x, n_values, is_super, tile, Dot::padded(n), c);
    }
}

} // namespace dspark::kernels::neon
