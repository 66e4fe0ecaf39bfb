// What block_column.h needs of vectors of 8 lanes: 2 blocks to a vector, loaded one by one. Included by it only.
#pragma once

#include "kernels/block_formats.h"

#include <cstring>

namespace dspark::kernels {
namespace {

// [b][lane]: the f16 of block b of each row. Copied by the integer units: the vector units have more to do.
struct ChunkScales {
    alignas(16) uint16_t of[8][kLanes];
};

// Blocks 2 group and 2 group + 1 of a chunk: the first and the last 16 weights of each. Not Q8_0 (strips.h).
template <typename Format>
[[gnu::always_inline]] inline void load_group(Format, const uint8_t* chunk, int group, Ints* q) {
    const uint8_t* w = chunk + 2 * group * static_cast<int>(sizeof(BlockQ4_0)) + 2;
    const uint8_t* both[2] = {w, w + sizeof(BlockQ4_0)};
    const Ints bytes = load_parts(both);
    q[0] = nibble_values(Format{}, nibbles_low(bytes));
    q[1] = nibble_values(Format{}, nibbles_high(bytes));
}

// Those of row r of stream i.
template <typename Format>
[[gnu::always_inline]] inline void keep_scales(Format, const uint8_t* chunk, int r, int i, ChunkScales& kept) {
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
        std::memcpy(&kept.of[b][kStreams * r + i], chunk + b * static_cast<int>(sizeof(typename Format::Block)), 2);
    }
}

// Part r of out[b] is part b of v[r].
[[gnu::always_inline]] inline void exchange_parts(const Ints* v, Ints* out) {
    out[0] = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    out[1] = _mm256_permute2x128_si256(v[0], v[1], 0x31);
}

// out[b]: the scale of block b of each lane's row.
[[gnu::always_inline]] inline void find_scales(const ChunkScales& kept, Floats* out) {
    for (int b = 0; b < 8; ++b) {
        out[b] = load_f16(reinterpret_cast<const uint8_t*>(kept.of[b]));
    }
}

} // namespace
} // namespace dspark::kernels
