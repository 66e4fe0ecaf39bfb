// NEON: how the weights of a strip lie in vectors, and what the two instruction sets (SDOT, SMMLA) have in common.
//
// A strip is 8 rows of W. 16 weights of each, a chunk, are 8 vectors of int8; `Dot` decides which of the chunk's bytes
// share a vector and multiplies them with as many values of the columns. Everything else is the same code for both, and
// sums of products are exact in int32, so both give the same bits.
//
// Every function is a template or static: the files that include this one are compiled for different processors, and
// an inline function shared by them could end up as the one that the older processor cannot run.
#pragma once

#include "kernels/blocks.h"
#include "kernels/isa.h"

#include <arm_neon.h>

namespace dspark::kernels::neon {

extern const Isa kDotprod, kI8mm;

inline constexpr int kChunk = 16;       // weights
inline constexpr int kChunkVectors = 8; // of a chunk of 8 rows
inline constexpr int kStepChunks = kSuperBlockSize / kChunk;
inline constexpr int kBlockChunks = kBlockSize / kChunk;
inline constexpr int kTileColumns = 4; // 8 sums and as many scaled ones stay in registers

using Rows = const uint8_t* const*; // 8 rows of W at the current block; beyond the last row: the last row again

// One value for each of the 8 rows.
struct Floats {
    float32x4_t part[2];
};

static inline uint64_t load_half(const uint8_t* p) {
    uint16_t half;
    __builtin_memcpy(&half, p, sizeof(half));
    return half;
}

// The f16 at `offset` of each row, as floats.
static inline Floats gather_halves(Rows rows, int offset) {
    Floats out;
    for (int i = 0; i < 2; ++i) {
        Rows r = rows + 4 * i;
        const uint64_t bits = load_half(r[0] + offset) | load_half(r[1] + offset) << 16 |
                              load_half(r[2] + offset) << 32 | load_half(r[3] + offset) << 48;
        out.part[i] = vcvt_f32_f16(vreinterpret_f16_u64(vcreate_u64(bits)));
    }
    return out;
}

static inline int8x16_t nibbles_low(uint8x16_t q) { return vreinterpretq_s8_u8(vandq_u8(q, vdupq_n_u8(15))); }
static inline int8x16_t nibbles_high(uint8x16_t q) { return vreinterpretq_s8_u8(vshrq_n_u8(q, 4)); }

} // namespace dspark::kernels::neon
