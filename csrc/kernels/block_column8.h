// What block_column.h needs of vectors of 8 lanes: 2 blocks to a vector. Included by it only.
#pragma once

#include "kernels/block_formats.h"

namespace dspark::kernels {
namespace {

// [b][lane]: the f16 of block b of each row.
struct ChunkScales {
    alignas(16) uint16_t of[8][kLanes];
};

// Blocks 2 group and 2 group + 1 of a chunk: the first and the last 16 weights of each. The second block is a part of a
// longer load, since blends are free of the shuffles' two pipes. Not Q8_0 (strips.h).
template <typename Format>
[[gnu::always_inline]] inline void load_group(Format, const uint8_t* chunk, int group, Ints* q) {
    const uint8_t* pair = chunk + 2 * group * static_cast<int>(sizeof(BlockQ4_0));
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pair + 2));
    const Ints bytes = _mm256_blend_epi32(_mm256_castsi128_si256(first), load(pair + sizeof(BlockQ4_0) - 14), 0xf0);
    q[0] = nibble_values(Format{}, nibbles_low(bytes));
    q[1] = nibble_values(Format{}, nibbles_high(bytes));
}

// Those of a group, all streams with the first. A pair of blocks lies so that 32 bytes hold both scales, each in a part
// of its own.
template <typename Format>
[[gnu::always_inline]] inline void keep_scales(Format, const StreamRows& rows, int r, int at, int group, int i,
                                               ChunkScales& kept) {
    if (i != 0) {
        return;
    }
    const int pair = 2 * group * static_cast<int>(sizeof(typename Format::Block));
    const Ints first = _mm256_unpacklo_epi16(load(rows.at(0, r, at) + pair), load(rows.at(1, r, at) + pair));
    const Ints last = _mm256_unpacklo_epi16(load(rows.at(2, r, at) + pair), load(rows.at(3, r, at) + pair));
    const __m256d all = _mm256_castsi256_pd(interleave_low(first, last));
    _mm_storel_pd(reinterpret_cast<double*>(&kept.of[2 * group][kStreams * r]), _mm256_castpd256_pd128(all));
    _mm_storeh_pd(reinterpret_cast<double*>(&kept.of[2 * group + 1][kStreams * r]), _mm256_extractf128_pd(all, 1));
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
