// Unpacks a step of a strip (256 weights of 8 rows, or the blocks left of a row) to signed bytes, with the scales.
#pragma once

#include "kernels/neon.h"

namespace dspark::kernels::neon {

struct Q8_0 {
    using Block = BlockQ8_0;
    static constexpr bool kIsSuper = false;
};
struct Q4_0 {
    using Block = BlockQ4_0;
    static constexpr bool kIsSuper = false;
};
struct IQ4_NL {
    using Block = BlockQ4_0;
    static constexpr bool kIsSuper = false;
};
struct Q4K {
    using Block = BlockQ4_K;
    static constexpr bool kIsSuper = true, kHasMins = true;
    static constexpr int kSubChunks = 2; // chunks that share a scale
};
struct Q5K {
    using Block = BlockQ5_K;
    static constexpr bool kIsSuper = true, kHasMins = true;
    static constexpr int kSubChunks = 2;
};
struct Q6K {
    using Block = BlockQ6_K;
    static constexpr bool kIsSuper = true, kHasMins = false;
    static constexpr int kSubChunks = 1;
};

struct BlockStrip {
    int8x16_t q[kStepChunks * kChunkVectors];
    Floats d[kStepChunks / kBlockChunks]; // per block
};

struct SuperStrip {
    int8x16_t q[kStepChunks * kChunkVectors];
    int32_t scale[16][8]; // per sub-block and row
    int16x8_t mins[8];    // per sub-block of 32, lanes are rows
    Floats d;
    Floats dmin;
};

template <typename Dot> void unpack(Q8_0, Rows rows, int8x16_t* out) {
    for (int i = 0; i < kBlockChunks; ++i) {
        uint8x16_t bytes[kChunkVectors];
        Dot::transpose(rows, 2 + kChunk * i, bytes);
        for (int v = 0; v < kChunkVectors; ++v) {
            out[kChunkVectors * i + v] = vreinterpretq_s8_u8(bytes[v]);
        }
    }
}

template <typename Dot> void unpack(Q4_0, Rows rows, int8x16_t* out) {
    uint8x16_t bytes[kChunkVectors];
    Dot::transpose(rows, 2, bytes);
    for (int v = 0; v < kChunkVectors; ++v) {
        out[v] = vsubq_s8(nibbles_low(bytes[v]), vdupq_n_s8(8));
        out[kChunkVectors + v] = vsubq_s8(nibbles_high(bytes[v]), vdupq_n_s8(8));
    }
}

template <typename Dot> void unpack(IQ4_NL, Rows rows, int8x16_t* out) {
    static constexpr int8_t kTable[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
    const int8x16_t table = vld1q_s8(kTable);
    uint8x16_t bytes[kChunkVectors];
    Dot::transpose(rows, 2, bytes);
    for (int v = 0; v < kChunkVectors; ++v) {
        out[v] = vqtbl1q_s8(table, vreinterpretq_u8_s8(nibbles_low(bytes[v])));
        out[kChunkVectors + v] = vqtbl1q_s8(table, vreinterpretq_u8_s8(nibbles_high(bytes[v])));
    }
}

// 16 signed bytes per row, bytes[row][s] -> scale[s][row].
static inline void spread_scales(const uint8_t* bytes, int32_t (*scale)[8]) {
    static constexpr uint8_t kFirst[16] = {0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51};
    for (int half = 0; half < 2; ++half) {
        const uint8x16x4_t table = vld1q_u8_x4(bytes + 64 * half);
        for (int s = 0; s < 16; s += 4) {
            const uint8x16_t index = vaddq_u8(vld1q_u8(kFirst), vdupq_n_u8(static_cast<uint8_t>(s)));
            const int8x16_t four = vreinterpretq_s8_u8(vqtbl4q_u8(table, index));
            const int16x8_t low = vmovl_s8(vget_low_s8(four)), high = vmovl_high_s8(four);
            vst1q_s32(scale[s] + 4 * half, vmovl_s16(vget_low_s16(low)));
            vst1q_s32(scale[s + 1] + 4 * half, vmovl_high_s16(low));
            vst1q_s32(scale[s + 2] + 4 * half, vmovl_s16(vget_low_s16(high)));
            vst1q_s32(scale[s + 3] + 4 * half, vmovl_high_s16(high));
        }
    }
}

// The 12 bytes of Q4_K's and Q5_K's scales -> 8 scales, then 8 mins.
static inline void unpack_six_bits(const uint8_t* packed, uint8_t* out) {
    uint32_t words[3];
    __builtin_memcpy(words, packed, sizeof(words));
    constexpr uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
    const uint32_t bytes[4] = {words[0] & six, (words[2] & four) | ((words[0] >> 2) & two), words[1] & six,
                               ((words[2] >> 4) & four) | ((words[1] >> 2) & two)};
    __builtin_memcpy(out, bytes, sizeof(bytes));
}

// d, dmin and the 6-bit scales and mins of Q4_K and Q5_K: the first 16 bytes of the block.
static inline void unpack_head(Rows rows, SuperStrip& out) {
    uint8_t bytes[8 * 16];
    for (int r = 0; r < 8; ++r) {
        unpack_six_bits(rows[r] + 4, bytes + 16 * r);
    }
    spread_scales(bytes, out.scale);
    for (int s = 0; s < 8; ++s) {
        const int32_t* mins = out.scale[8 + s];
        out.mins[s] = vcombine_s16(vmovn_s32(vld1q_s32(mins)), vmovn_s32(vld1q_s32(mins + 4)));
    }
    out.d = gather_halves(rows, 0);
    out.dmin = gather_halves(rows, 2);
}

template <typename Dot> void unpack(Q4K, Rows rows, SuperStrip& out) {
    unpack_head(rows, out);
    for (int i = 0; i < 8; ++i) { // 16 bytes: half i % 2 of the bytes of weights 64 (i / 2) ..
        uint8x16_t bytes[kChunkVectors];
        Dot::transpose(rows, 16 + kChunk * i, bytes);
        int8x16_t* q = out.q + (i / 2 * 4 + i % 2) * kChunkVectors;
        for (int v = 0; v < kChunkVectors; ++v) {
            q[v] = nibbles_low(bytes[v]);
            q[2 * kChunkVectors + v] = nibbles_high(bytes[v]);
        }
    }
}

// q with bit `bit` of `high` as its bit 4.
static inline int8x16_t with_fifth_bit(int8x16_t q, uint8x16_t high, int bit) {
    const uint8x16_t moved = vshlq_u8(high, vdupq_n_s8(static_cast<int8_t>(4 - bit)));
    return vorrq_s8(q, vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(16))));
}

template <typename Dot> void unpack(Q5K, Rows rows, SuperStrip& out) {
    unpack_head(rows, out);
    for (int half = 0; half < 2; ++half) {
        uint8x16_t high[kChunkVectors];
        Dot::transpose(rows, 16 + kChunk * half, high);
        for (int g = 0; g < 4; ++g) {
            uint8x16_t bytes[kChunkVectors];
            Dot::transpose(rows, 48 + 32 * g + kChunk * half, bytes);
            int8x16_t* q = out.q + (4 * g + half) * kChunkVectors;
            for (int v = 0; v < kChunkVectors; ++v) {
                q[v] = with_fifth_bit(nibbles_low(bytes[v]), high[v], 2 * g);
                q[2 * kChunkVectors + v] = with_fifth_bit(nibbles_high(bytes[v]), high[v], 2 * g + 1);
            }
        }
    }
}

// q with bits 2 i, 2 i + 1 of `high` as its bits 4, 5, less 32.
static inline int8x16_t with_two_bits(int8x16_t q, uint8x16_t high, int i) {
    const uint8x16_t moved = vshlq_u8(high, vdupq_n_s8(static_cast<int8_t>(4 - 2 * i)));
    return vsubq_s8(vorrq_s8(q, vreinterpretq_s8_u8(vandq_u8(moved, vdupq_n_u8(0x30)))), vdupq_n_s8(32));
}

template <typename Dot> void unpack(Q6K, Rows rows, SuperStrip& out) {
    for (int i = 0; i < 4; ++i) { // half of 128 weights, 16 of its 32 columns of bytes
        const int half = i / 2, side = i % 2;
        uint8x16_t first[kChunkVectors], second[kChunkVectors], high[kChunkVectors];
        Dot::transpose(rows, 64 * half + kChunk * side, first);
        Dot::transpose(rows, 64 * half + 32 + kChunk * side, second);
        Dot::transpose(rows, 128 + 32 * half + kChunk * side, high);
        int8x16_t* q = out.q + (8 * half + side) * kChunkVectors;
        for (int v = 0; v < kChunkVectors; ++v) {
            q[v] = with_two_bits(nibbles_low(first[v]), high[v], 0);
            q[2 * kChunkVectors + v] = with_two_bits(nibbles_low(second[v]), high[v], 1);
            q[4 * kChunkVectors + v] = with_two_bits(nibbles_high(first[v]), high[v], 2);
            q[6 * kChunkVectors + v] = with_two_bits(nibbles_high(second[v]), high[v], 3);
        }
    }
    uint8_t bytes[8 * 16];
    for (int r = 0; r < 8; ++r) {
        vst1q_u8(bytes + 16 * r, vld1q_u8(rows[r] + 192));
    }
    spread_scales(bytes, out.scale);
    out.d = gather_halves(rows, 208);
}

} // namespace dspark::kernels::neon
