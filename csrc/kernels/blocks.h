// The weight blocks of a GGUF file that our kernels read, byte for byte as they lie there. Declared here so that the
// kernels know nothing of ggml; names and order of the fields are the format's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dspark::kernels {

inline constexpr int64_t kBlockSize = 32;       // weights of a Q8_0, Q4_0 or IQ4_NL block
inline constexpr int64_t kSuperBlockSize = 256; // weights of a K-quant block

struct BlockQ8_0 {
    uint16_t d; // f16
    int8_t qs[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

struct BlockQ4_0 { // weight = d * (nibble - 8); IQ4_NL: d * table[nibble]
    uint16_t d;
    uint8_t qs[16]; // weight j in the low nibble of byte j, weight j + 16 in the high one
};
static_assert(sizeof(BlockQ4_0) == 18);

struct BlockQ4_K { // weight = d * scale * nibble - dmin * min, scale and min per 32 weights
    uint16_t d;
    uint16_t dmin;
    uint8_t scales[12]; // 8 scales and 8 mins of 6 bits
    uint8_t qs[128];    // 64 weights per 32 bytes: low nibbles first
};
static_assert(sizeof(BlockQ4_K) == 144);

struct BlockQ5_K { // as Q4_K with a fifth bit
    uint16_t d;
    uint16_t dmin;
    uint8_t scales[12];
    uint8_t qh[32]; // bit i of byte j: weight 32 i + j
    uint8_t qs[128];
};
static_assert(sizeof(BlockQ5_K) == 176);

struct BlockQ6_K {   // weight = d * scale * (q - 32), scale per 16 weights
    uint8_t ql[128]; // low 4 bits: per half of 128 weights, 0..63 in the low nibbles, 64..127 in the high ones
    uint8_t qh[64];  // high 2 bits: bits 2 i, 2 i + 1 of byte j: weight 32 i + j of the half
    int8_t scales[16];
    uint16_t d;
};
static_assert(sizeof(BlockQ6_K) == 210);

} // namespace dspark::kernels
