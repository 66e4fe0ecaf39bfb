// Q8_0, Q4_0, IQ4_NL: blocks of 32 weights with one scale, and how a strip of them is unpacked.
//
// A strip is kLanes rows of W. Its blocks are transposed on the fly so that a vector holds 4 weights of each row: one
// byte product with 4 broadcast values of a column then serves all rows of the strip, scales are vectors, and no sum
// across lanes is ever taken. The transposition is paid once per strip and shared by all columns.
//
// Weights become unsigned bytes by an offset that prepare() takes off again, exactly, as offset * sum(x). Where byte
// products add up in 16 bits (no VNNI) that would overflow for weights beyond 4 bits: those keep their sign and give it
// to x, and two products of at most 128 * 127 still fit.
#pragma once

#include "kernels/blocks.h"
#include "kernels/lanes.h"

namespace dspark::kernels {
namespace {

inline constexpr int kBlockVectors = 8; // of weights, per block

struct Q4_0 {
    using Block = BlockQ4_0;
    static constexpr bool kIsSigned = false;
};
struct Q8_0 {
    using Block = BlockQ8_0;
    static constexpr bool kIsSigned = !kHasVnni;
};
struct IQ4_NL {
    using Block = BlockQ4_0;
    static constexpr bool kIsSigned = !kHasVnni;
};

inline constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

[[gnu::always_inline]] inline Ints offset_weights(Ints weights) {
    return kHasVnni ? weights ^ all_bytes(-128) : weights;
}

// Half a block: 4 vectors. The second half may need what the first one left in `raw`.
template <int half> [[gnu::always_inline]] inline Ints half_nibbles(Ints q) {
    return half == 0 ? nibbles_low(q) : nibbles_high(q);
}

template <int half> [[gnu::always_inline]] inline void unpack_half(Q4_0, const Rows& rows, Ints* raw, Ints* out) {
    if constexpr (half == 0) {
        transpose_16(rows, 2, raw);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = half_nibbles<half>(raw[i]);
    }
}

template <int half> [[gnu::always_inline]] inline void unpack_half(Q8_0, const Rows& rows, Ints* raw, Ints* out) {
    transpose_16(rows, 2 + 16 * half, raw);
    for (int i = 0; i < 4; ++i) {
        out[i] = offset_weights(raw[i]);
    }
}

template <int half> [[gnu::always_inline]] inline void unpack_half(IQ4_NL, const Rows& rows, Ints* raw, Ints* out) {
    const Ints table = offset_weights(repeat_16(kIq4Values));
    if constexpr (half == 0) {
        transpose_16(rows, 2, raw);
    }
    for (int i = 0; i < 4; ++i) {
        out[i] = shuffle_bytes(table, half_nibbles<half>(raw[i]));
    }
}

template <typename Format> [[gnu::always_inline]] inline void unpack(Format, const Rows& rows, Ints* out) {
    Ints raw[4];
    unpack_half<0>(Format{}, rows, raw, out);
    unpack_half<1>(Format{}, rows, raw, out + 4);
}

} // namespace
} // namespace dspark::kernels
