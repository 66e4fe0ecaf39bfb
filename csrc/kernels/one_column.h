// One column of the K-quants: by rows, each along the memory; the lanes of a vector are neighbouring weights. The steps
// of a strip from row to row cost memory's speed: from one moment to the next, and for seconds, prefetches come too
// late there (Q5_K, Zen 4: 17 or 34 GB/s; by rows 42). The integers are those of the strips, so are the floats that
// follow (finish_super), so are the bits.
#pragma once

#include "kernels/tiles.h"

#include <cstring>

namespace dspark::kernels {
namespace {

inline constexpr int kRowBlocks = 16;          // of a row at once: sums fit into L1
inline constexpr int kRowWeights = 4 * kLanes; // of a vector
inline constexpr int kRowVectors = static_cast<int>(kSuperBlockSize) / kRowWeights; // of a super-block

// How many rows are walked at once: more need fewer loads, one suits the memory. Measured.
template <typename Format> inline constexpr int kRowsAtOnce = 1;
template <> inline constexpr int kRowsAtOnce<Q4K> = kLanes == 8 ? 4 : 1;

template <typename Format> inline constexpr int kColumnRecord = record_groups(super_layout<Format>());

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

// The sum over the lanes of each of kLanes vectors: lane r is that of v[r].
[[gnu::always_inline]] inline Ints sum_lanes(const Ints* v) {
    Ints quads[kLanes / 4]; // within every 128 bits
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i, v += 4) {
        const Ints a = add_ints(interleave_low(v[0], v[1]), interleave_high(v[0], v[1]));
        const Ints b = add_ints(interleave_low(v[2], v[3]), interleave_high(v[2], v[3]));
        quads[i] = add_ints(interleave_low_pairs(a, b), interleave_high_pairs(a, b));
    }
    return sum_parts(quads);
}

// sums[b][r]: row r's part of super-block b. next: as prefetch() takes it.
template <typename Format>
inline void sum_rows(const Rows& rows, const int32_t* x, int n_blocks, const uint8_t*& next, Ints (*sums)[kLanes]) {
    constexpr int kAtOnce = kRowsAtOnce<Format>;
    const uint8_t* ahead = next; // in a register: stores to `sums` might change what lies in memory
    for (int first = 0; first < kLanes; first += kAtOnce) {
        const uint8_t* block = rows.quarter[0] + static_cast<size_t>(first) * rows.stride;
        for (int b = 0; b < n_blocks; ++b, block += sizeof(typename Format::Block)) {
            Ints values[kRowVectors];
            load_values(Format{}, x + b * kColumnRecord<Format>, values);
#pragma GCC unroll 4
            for (int r = 0; r < kAtOnce; ++r) {
                prefetch<sizeof(typename Format::Block)>(ahead);
                sums[b][first + r] = sum_row(Format{}, block + static_cast<size_t>(r) * rows.stride, values);
            }
        }
    }
    next = ahead;
}

// kLanes outputs: all weights of each row times those of the column.
template <typename Format>
inline Floats multiply_rows(Rows rows, const uint8_t* next, const int32_t* x, int64_t n_values) {
    Floats acc = zero_floats();
    Ints sums[kRowBlocks][kLanes];
    for (int64_t n_left = n_values / kSuperBlockSize; n_left > 0; n_left -= kRowBlocks) {
        const int n_blocks = static_cast<int>(n_left < kRowBlocks ? n_left : kRowBlocks);
        sum_rows<Format>(rows, x, n_blocks, next, sums);
        for (int b = 0; b < n_blocks; ++b, x += kColumnRecord<Format>) {
            SuperHead head;
            unpack_head(Format{}, rows, head);
            const Ints total = sum_lanes(sums[b]);
            finish_super<Format, 1>(head, x, &total, &acc);
            rows.advance(sizeof(typename Format::Block));
        }
    }
    return acc;
}

} // namespace
} // namespace dspark::kernels
