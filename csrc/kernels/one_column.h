// One column of the K-quants: by rows in streams (streams.h); the lanes of a vector are neighbouring weights. The steps
// of a strip from row to row cost memory's speed: from one moment to the next, and for seconds, prefetches come too
// late there. The integers are those of the strips, so are the floats that follow (finish_super), so are the bits.
#pragma once

#include "kernels/streams.h"
#include "kernels/tiles.h"

#include <cstring>

namespace dspark::kernels {
namespace {

inline constexpr int kRowWeights = 4 * kLanes;                                      // of a vector
inline constexpr int kRowVectors = static_cast<int>(kSuperBlockSize) / kRowWeights; // of a super-block

// The sub-block of weight i of vector v. Q4_K: even vectors are the low nibbles of some bytes, odd ones the high.
constexpr int sub_block(Q4K, int v, int i) { return v / 2 * (kRowWeights / 16) + v % 2 + i / 32 * 2; }
constexpr int sub_block(Q5K, int v, int i) { return sub_block(Q4K{}, v, i); }
constexpr int sub_block(Q6K, int v, int i) { return (v * kRowWeights + i) / 16; }

// For shuffle_bytes: the scales of each vector's weights, in the words that they multiply: with VNNI the low one of a
// lane, otherwise both. In the word's low byte, or in the high one if they have a sign.
template <typename Format> struct ScaleIndex {
    alignas(64) uint8_t bytes[kRowVectors][kRowWeights];

    constexpr ScaleIndex() : bytes() {
        constexpr int kByte = Format::kHasMins ? 0 : 1;
        for (int v = 0; v < kRowVectors; ++v) {
            for (int i = 0; i < kRowWeights; ++i) {
                const bool is_scale = i % 4 == kByte || (!kHasVnni && i % 4 == kByte + 2);
                bytes[v][i] = is_scale ? static_cast<uint8_t>(sub_block(Format{}, v, i)) : 0x80; // 0x80: zero
            }
        }
    }
};

// total + scale * (w . x) of neighbouring weights. A sum of 4 products is at most 4 * 63 * 128 and fits into a word.
[[gnu::always_inline]] inline Ints add_scaled(Ints total, Ints w, Ints x, Ints scale) {
    return kHasVnni ? dot_words(total, dot_bytes(zero_ints(), w, x), scale)
                    : add_ints(total, madd_words(madd_bytes(w, x), scale));
}

// The values that meet each vector of a super-block's weights.
template <typename Format> [[gnu::always_inline]] inline void load_values(Format, const int32_t* x, Ints* out) {
    for (int v = 0; v < kRowVectors; ++v) {
        out[v] = load_alternate(x + 8 * sub_block(Format{}, v, 0));
    }
}
[[gnu::always_inline]] inline void load_values(Q6K, const int32_t* x, Ints* out) {
    for (int v = 0; v < kRowVectors; ++v) {
        out[v] = load(x + v * kLanes);
    }
}

// Weights that are used twice, loaded once: the compiler would fold a load into each use, and most cross a cache line.
[[gnu::always_inline]] inline Ints load_once(const uint8_t* p) {
    Ints v = load(p);
    keep_order(v);
    return v;
}

// The 8 scales of a row of Q4_K or Q5_K, in bytes.
[[gnu::always_inline]] inline uint64_t scales_8(const uint8_t* block) {
    uint32_t first = 0, last = 0;
    std::memcpy(&first, block + 4, sizeof(first));
    std::memcpy(&last, block + 12, sizeof(last));
    const uint32_t high = (last & 0x0f0f0f0fU) | (first >> 2 & 0x30303030U);
    return (first & 0x3f3f3f3fU) | static_cast<uint64_t>(high) << 32;
}

// The fifth bits of vector v's weights, in place.
[[gnu::always_inline]] inline Ints fifth_bits(Q4K, const uint8_t*, int) { return zero_ints(); }
[[gnu::always_inline]] inline Ints fifth_bits(Q5K, const uint8_t* block, int v) {
    return bits_to_4(repeat_32(block + 16), sub_block(Q5K{}, v, 0));
}

// One row's part of one super-block, its lanes still to be added up. Q4_K and Q5_K.
template <typename Format>
[[gnu::always_inline]] inline Ints sum_row(Format, const uint8_t* block, const Ints* values) {
    static constexpr ScaleIndex<Format> kIndex;
    const Ints scales = repeat_8(scales_8(block));
    const uint8_t* nibbles = block + sizeof(typename Format::Block) - kSuperBlockSize / 2;
    Ints total = zero_ints();
#pragma GCC unroll 4
    for (int v = 0; v < kRowVectors; v += 2) {
        const Ints q = load_once(nibbles + v / 2 * kRowWeights);
        const Ints low = nibbles_low(q) | fifth_bits(Format{}, block, v);
        const Ints high = nibbles_high(q) | fifth_bits(Format{}, block, v + 1);
        total = add_scaled(total, low, values[v], shuffle_bytes(scales, load(kIndex.bytes[v])));
        total = add_scaled(total, high, values[v + 1], shuffle_bytes(scales, load(kIndex.bytes[v + 1])));
    }
    return total;
}

// Weights with their offset 32.
[[gnu::always_inline]] inline Ints sum_row(Q6K, const uint8_t* block, const Ints* values) {
    static constexpr ScaleIndex<Q6K> kIndex;
    const Ints scales = repeat_16(block + 192);
    Ints total = zero_ints();
#pragma GCC unroll 8
    for (int v = 0; v < kRowVectors; ++v) {
        const int first = v * kRowWeights, half = first / 128;
        const Ints low = load(block + 64 * half + first % 64), high = repeat_32(block + 128 + 32 * half);
        const Ints nibbles = first % 128 < 64 ? nibbles_low(low) : nibbles_high(low);
        const Ints scale = shift_words_signed(shuffle_bytes(scales, load(kIndex.bytes[v])), 8);
        total = add_scaled(total, nibbles | two_bits(high, first % 128 / 32), values[v], scale);
    }
    return total;
}

// What finish_super() needs of a chunk's rows: 16 bytes of each, part r of head[i] from row r of stream i.
struct SuperSums {
    Ints quads[kStreamRows]; // [r]: lane i of each part is a sum of row r of stream i
    Ints head[kStreams];
    uint16_t d[kLanes]; // Q6_K

    [[gnu::always_inline]] void keep_head(const uint8_t* bytes, int i, int r) {
        std::memcpy(reinterpret_cast<uint8_t*>(&head[i]) + 16 * r, bytes, 16);
    }
};

template <typename Format>
[[gnu::always_inline]] inline void keep_head(Format, const uint8_t* block, int i, int r, SuperSums& sums) {
    sums.keep_head(block, i, r);
}
[[gnu::always_inline]] inline void keep_head(Q6K, const uint8_t* block, int i, int r, SuperSums& sums) {
    sums.keep_head(block + 192, i, r);
    std::memcpy(&sums.d[kStreams * r + i], block + 208, sizeof(uint16_t));
}

template <typename Format>
[[gnu::always_inline]] inline void unpack_kept(Format, const SuperSums& sums, SuperHead& out) {
    Ints head[4];
    transpose_parts(sums.head, head);
    unpack_scales(head, out);
}
[[gnu::always_inline]] inline void unpack_kept(Q6K, const SuperSums& sums, SuperHead& out) {
    Ints scales[4];
    transpose_parts(sums.head, scales);
    unpack_signed_scales(scales, out);
    out.d = load_f16(reinterpret_cast<const uint8_t*>(sums.d));
}

// For multiply_in_streams().
template <typename Format> struct SuperColumn {
    static constexpr ColumnLayout kLayout = super_layout<Format>();
    static constexpr int kBytes = static_cast<int>(sizeof(typename Format::Block));
    using Sums = SuperSums;
    struct Values {
        const int32_t* record;
        void set(const int32_t* x) { record = x; }
    };

    [[gnu::always_inline]] static void sum(const StreamRows& rows, int r, int at, const Values& x, Sums& sums) {
        Ints values[kRowVectors], four[kStreams];
        load_values(Format{}, x.record, values);
#pragma GCC unroll 4
        for (int i = 0; i < kStreams; ++i) {
            const uint8_t* block = rows.at(i, r, at);
            rows.ask_ahead<kBytes>(block);
            keep_head(Format{}, block, i, r, sums);
            four[i] = sum_row(Format{}, block, values);
        }
        sums.quads[r] = sum_quads(four);
    }

    [[gnu::noinline]] static Floats add(const Sums& sums, const int32_t* record, Floats acc) {
        SuperHead head;
        unpack_kept(Format{}, sums, head);
        const Ints total = sum_parts(sums.quads);
        finish_super<Format, 1>(head, record, &total, &acc);
        return acc;
    }
};

} // namespace
} // namespace dspark::kernels
