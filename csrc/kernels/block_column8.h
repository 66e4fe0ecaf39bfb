// What block_column.h needs of vectors of 8 lanes: 2 blocks to a vector, loaded one by one. Included by it only.
#pragma once

#include "kernels/block_formats.h"

namespace dspark::kernels {
namespace {

struct ChunkScales {}; // gathered when they are needed

// Blocks 2 group and 2 group + 1 of a chunk: the first and the last 16 weights of each. Not Q8_0 (strips.h).
template <typename Format>
[[gnu::always_inline]] inline void load_group(Format, const uint8_t* chunk, int group, Ints* q) {
    const uint8_t* w = chunk + 2 * group * static_cast<int>(sizeof(BlockQ4_0)) + 2;
    const uint8_t* both[2] = {w, w + sizeof(BlockQ4_0)};
    const Ints bytes = load_parts(both);
    q[0] = nibble_values(Format{}, nibbles_low(bytes));
    q[1] = nibble_values(Format{}, nibbles_high(bytes));
}

template <typename Format>
[[gnu::always_inline]] inline void keep_scales(Format, const uint8_t*, int, int, ChunkScales&) {}

// Part r of out[b] is part b of v[r].
[[gnu::always_inline]] inline void exchange_parts(const Ints* v, Ints* out) {
    out[0] = _mm256_permute2x128_si256(v[0], v[1], 0x20);
    out[1] = _mm256_permute2x128_si256(v[0], v[1], 0x31);
}

// out[b]: the scale of block b of each lane's row; `at`: where the chunk begins in each.
template <typename Format>
[[gnu::always_inline]] inline void find_scales(Format, const ChunkScales&, const StreamRows& rows, int at,
                                               Floats* out) {
    for (int b = 0; b < 8; ++b, at += static_cast<int>(sizeof(typename Format::Block))) {
        const __m128i halves[1] = {
            gather_8([&](int lane) { return rows.at(kStreamRows * (lane % kStreams) + lane / kStreams, at); })};
        out[b] = widen_halves(halves);
    }
}

} // namespace
} // namespace dspark::kernels
