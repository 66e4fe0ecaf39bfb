// K-quants: super-blocks of 256 weights, and how a strip of them is unpacked (block_formats.h tells what a strip is).
// In 4 chunks of 16 vectors: of a few columns each chunk is used at once and never stored.
#pragma once

#include "kernels/blocks.h"
#include "kernels/lanes.h"

namespace dspark::kernels {
namespace {

inline constexpr int kChunks = 4, kChunkVectors = 16;

// What a super-block's chunks share.
struct SuperHead {
    Ints scale[16]; // per sub-block: with VNNI as 32-bit lanes, otherwise in both 16-bit halves of a lane
    Ints mins[8];   // per pair of sub-blocks: both mins of the row
    Ints high[8];   // Q5_K: the fifth bits
    Floats d;
    Floats dmin;
};

// Sub-blocks of kVectors * 4 weights. kDepth: vectors whose byte products may add up in 16 bits: kDepth * 2 * largest
// weight * 128 < 2^15. sub_block: the number of sub-block i of a chunk.
struct Q4K {
    using Block = BlockQ4_K;
    static constexpr int kVectors = 8, kDepth = 8, kSums = 4;
    static constexpr bool kHasMins = true;
    static constexpr int sub_block(int chunk, int i) { return 2 * chunk + i; }
};
struct Q5K {
    using Block = BlockQ5_K;
    static constexpr int kVectors = 8, kDepth = 4, kSums = 4;
    static constexpr bool kHasMins = true;
    static constexpr int sub_block(int chunk, int i) { return 2 * chunk + i; }
};
struct Q6K {
    using Block = BlockQ6_K;
    static constexpr int kVectors = 4, kDepth = 2, kSums = 8;
    static constexpr bool kHasMins = false; // the offset 32 takes the place of a min: 32 * scale
    static constexpr int sub_block(int chunk, int i) { return chunk / 2 * 8 + chunk % 2 + 2 * i; }
};

// Bytes a and b of each lane, zero-extended into its 16-bit halves.
[[gnu::always_inline]] inline Ints spread(Ints lanes, int a, int b) {
    const int pattern = static_cast<int>(0x80008000U | static_cast<unsigned>(a) | static_cast<unsigned>(b) << 16);
    alignas(16) static constexpr int32_t kBase[4] = {0, 0x00040004, 0x00080008, 0x000c000c};
    return shuffle_bytes(lanes, add_ints(repeat_16(kBase), all_ints(pattern)));
}

// Byte s of each lane as the factor that scaling multiplies by.
[[gnu::always_inline]] inline Ints unsigned_scale(Ints lanes, int s) {
    return kHasVnni ? shift_ints_right(lanes, 8 * s) & all_ints(0xff) : spread(lanes, s, s);
}
[[gnu::always_inline]] inline Ints signed_scale(Ints lanes, int s) {
    return kHasVnni ? shift_ints_signed(shift_ints_left(lanes, 24 - 8 * s), 24)
                    : shift_words_signed(shift_words_left(spread(lanes, s, s), 8), 8);
}

// d, dmin and the 6-bit scales and mins of Q4_K and Q5_K: the first 16 bytes of the block, transposed.
[[gnu::always_inline]] inline void unpack_scales(const Ints (&head)[4], SuperHead& out) {
    out.d = low_halves(head[0]);
    out.dmin = low_halves(shift_ints_right(head[0], 16));
    const Ints six = all_bytes(0x3f), four = all_bytes(0x0f), two = all_bytes(0x30);
    const Ints scales[2] = {head[1] & six, (head[3] & four) | (shift_words_right(head[1], 2) & two)};
    const Ints mins[2] = {head[2] & six,
                          (shift_words_right(head[3], 4) & four) | (shift_words_right(head[2], 2) & two)};
    for (int s = 0; s < 8; ++s) {
        out.scale[s] = unsigned_scale(scales[s / 4], s % 4);
    }
    for (int s = 0; s < 4; ++s) {
        out.mins[s] = spread(mins[s / 2], s % 2 * 2, s % 2 * 2 + 1);
    }
}

[[gnu::always_inline]] inline void unpack_head(Q4K, const Rows& rows, SuperHead& out) {
    Ints head[4];
    transpose_16(rows, 0, head);
    unpack_scales(head, out);
}

[[gnu::always_inline]] inline void unpack_head(Q5K, const Rows& rows, SuperHead& out) {
    unpack_head(Q4K{}, rows, out);
    transpose_16(rows, 16, out.high);
    transpose_16(rows, 32, out.high + 4);
}

// The f16 that ends each row's block: the four bytes around it would reach beyond the last block.
[[gnu::always_inline]] inline Floats last_halves(const Rows& rows) {
    Ints last[4];
    transpose_16(rows, static_cast<int>(sizeof(BlockQ6_K)) - 16, last);
    return low_halves(shift_ints_right(last[3], 16));
}

// The scales of Q6_K, transposed.
[[gnu::always_inline]] inline void unpack_signed_scales(const Ints (&scales)[4], SuperHead& out) {
    for (int s = 0; s < 16; ++s) {
        out.scale[s] = signed_scale(scales[s / 4], s % 4);
    }
    for (int s = 0; s < 8; ++s) { // signed bytes: into the high byte of each half, then down
        const Ints pair = spread(scales[s / 2], s % 2 * 2, s % 2 * 2 + 1);
        out.mins[s] = shift_words_signed(shift_words_left(pair, 8), 8);
    }
}

[[gnu::always_inline]] inline void unpack_head(Q6K, const Rows& rows, SuperHead& out) {
    Ints scales[4];
    transpose_16(rows, 192, scales);
    unpack_signed_scales(scales, out);
    out.d = last_halves(rows);
}

// A chunk is unpacked in 4 parts of 4 vectors. What later parts need of it, transposed, stays in `raw`.
inline constexpr int kPartVectors = 4, kParts = kChunkVectors / kPartVectors, kRawVectors = 12;

// Parts 0 and 1: the low nibbles of 16 bytes each, 2 and 3: the high ones.
template <int chunk, int part>
[[gnu::always_inline]] inline void unpack_part(Q4K, const Rows& rows, const SuperHead&, Ints* raw, Ints* out) {
    constexpr int half = part % 2;
    if constexpr (part < 2) {
        transpose_16(rows, 16 + 32 * chunk + 16 * half, raw + 4 * half);
    }
    for (int i = 0; i < kPartVectors; ++i) {
        out[i] = part < 2 ? nibbles_low(raw[4 * half + i]) : nibbles_high(raw[4 * half + i]);
    }
}

// Bit `from` of every byte to bit 4; bits that cross into a neighbour are masked away.
template <int from> [[gnu::always_inline]] inline Ints bit_to_4(Ints v) {
    return (from < 4 ? shift_words_left(v, from < 4 ? 4 - from : 0) : shift_words_right(v, from < 4 ? 0 : from - 4)) &
           all_bytes(16);
}

template <int chunk, int part>
[[gnu::always_inline]] inline void unpack_part(Q5K, const Rows& rows, const SuperHead& head, Ints* raw, Ints* out) {
    constexpr int half = part % 2;
    if constexpr (part < 2) {
        transpose_16(rows, 48 + 32 * chunk + 16 * half, raw + 4 * half);
    }
    for (int i = 0; i < kPartVectors; ++i) {
        const Ints q = part < 2 ? nibbles_low(raw[4 * half + i]) : nibbles_high(raw[4 * half + i]);
        out[i] = q | bit_to_4<2 * chunk + part / 2>(head.high[4 * half + i]);
    }
}

// The two high bits of a part's weights, in place.
template <int part> [[gnu::always_inline]] inline Ints two_high_bits(Ints v) {
    return (part < 2 ? shift_words_left(v, part < 2 ? 4 - 2 * part : 0) : shift_words_right(v, 2 * part - 4)) &
           all_bytes(0x30);
}

template <int chunk, int part>
[[gnu::always_inline]] inline void unpack_part(Q6K, const Rows& rows, const SuperHead&, Ints* raw, Ints* out) {
    constexpr int half = chunk / 2, side = chunk % 2; // half of 128 weights, 16 of its 32 columns of bytes
    if constexpr (part < 2) {
        transpose_16(rows, 64 * half + 32 * part + 16 * side, raw + 4 * part);
    }
    if constexpr (part == 0) {
        transpose_16(rows, 128 + 32 * half + 16 * side, raw + 8);
    }
    for (int i = 0; i < kPartVectors; ++i) {
        const Ints q = raw[4 * (part % 2) + i];
        out[i] = (part < 2 ? nibbles_low(q) : nibbles_high(q)) | two_high_bits<part>(raw[8 + i]);
    }
}

template <int chunk, typename Format>
[[gnu::always_inline]] inline void unpack_chunk(Format, const Rows& rows, const SuperHead& head, Ints* out) {
    Ints raw[kRawVectors];
    unpack_part<chunk, 0>(Format{}, rows, head, raw, out);
    unpack_part<chunk, 1>(Format{}, rows, head, raw, out + kPartVectors);
    unpack_part<chunk, 2>(Format{}, rows, head, raw, out + 2 * kPartVectors);
    unpack_part<chunk, 3>(Format{}, rows, head, raw, out + 3 * kPartVectors);
}

} // namespace
} // namespace dspark::kernels
