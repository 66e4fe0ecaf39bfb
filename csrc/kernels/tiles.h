// Unpacked weights times a tile of N columns. With VNNI byte products add up in 32 bits; without, in 16 bits as long as
// they fit. Both are exact, and the floats that follow are the same: so are the bits of the result.
#pragma once

#include "kernels/block_formats.h"
#include "kernels/columns.h"
#include "kernels/super_formats.h"

namespace dspark::kernels {
namespace {

template <typename Format> constexpr ColumnLayout super_layout() {
    return Format::kSums == 4 ? ColumnLayout::super32 : ColumnLayout::super16;
}

// sum + w times the 4 bytes at `group`, in 32 bits with VNNI, in 16 without.
[[gnu::always_inline]] inline void add_byte_products(Ints& sum, Ints w, const int32_t* group) {
    sum = kHasVnni ? dot_group(sum, w, group) : add_words(sum, madd_bytes(w, broadcast(group)));
    keep_order(sum);
}

// sum + signed w times the 4 bytes at `group`, in 32 bits.
[[gnu::always_inline]] inline void add_signed_products(Ints& sum, Ints size, Ints w, const int32_t* group) {
    sum = add_ints(sum, madd_words(madd_bytes(size, give_sign(broadcast(group), w)), all_words(1)));
    keep_order(sum);
}

// Integer sums of one block, or of its halves one after the other: before, between and behind add_block_products().
// x: the block in the first column's record.
template <int N> [[gnu::always_inline]] inline void begin_block(const int32_t* x, Ints* sum) {
    constexpr int kRecord = record_groups(ColumnLayout::bytes);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        sum[c] = kHasVnni ? broadcast(x + c * kRecord + 8) : zero_ints();
    }
}

// x: the values that meet the first of n vectors.
template <typename Format, int N, int n>
[[gnu::always_inline]] inline void add_block_products(const Ints* q, const int32_t* x, Ints* sum) {
    constexpr int kRecord = record_groups(ColumnLayout::bytes);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const Ints size = Format::kIsSigned ? sizes_of_bytes(q[i]) : q[i];
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
            if constexpr (Format::kIsSigned) {
                add_signed_products(sum[c], size, q[i], x + c * kRecord + i);
            } else {
                add_byte_products(sum[c], q[i], x + c * kRecord + i);
            }
        }
    }
}

// acc[c] += the block's part of the outputs.
template <typename Format, int N>
[[gnu::always_inline]] inline void finish_block(Floats d, const int32_t* x, Ints* sum, Floats* acc) {
    constexpr int kRecord = record_groups(ColumnLayout::bytes);
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        if constexpr (!kHasVnni && !Format::kIsSigned) { // 16-bit sums of at most 8 * 2 * 15 * 128
            sum[c] = add_ints(madd_words(sum[c], all_words(1)), broadcast(x + c * kRecord + 8));
        }
        const Floats dx = broadcast_scale(x + c * kRecord + kBlockRecord - 1);
        acc[c] = fmadd(to_floats(sum[c]), mul(d, dx), acc[c]);
    }
}

template <typename Format, int N>
[[gnu::always_inline]] inline void multiply_block(const Ints* q, Floats d, const int32_t* x, Floats* acc) {
    Ints sum[N];
    begin_block<N>(x, sum);
    add_block_products<Format, N, kBlockVectors>(q, x, sum);
    finish_block<Format, N>(d, x, sum, acc);
}

// sum[c] += the products of n vectors, all columns beside each other: they hide each other's latency.
template <typename Format, int N, int n>
[[gnu::always_inline]] inline void add_products(const Ints* w, const int32_t* x, Ints* sum) {
    constexpr int kRecord = record_groups(super_layout<Format>());
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
        const Ints weights = w[i];
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
            add_byte_products(sum[c], weights, x + c * kRecord + i);
        }
    }
}

template <int N> [[gnu::always_inline]] inline void clear(Ints* sum) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        sum[c] = zero_ints();
    }
}

template <int N> [[gnu::always_inline]] inline void add_scaled_sums(const Ints* sum, Ints scale, Ints* total) {
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        total[c] = add_ints(total[c], kHasVnni ? mul_ints(sum[c], scale) : madd_words(sum[c], scale));
        keep_order(total[c]);
    }
}

// total[c] += the sub-block's products times their scale.
template <typename Format, int N>
[[gnu::always_inline]] inline void multiply_beside(const Ints* w, Ints scale, const int32_t* x, Ints* total) {
    Ints sum[N];
    clear<N>(sum);
    add_products<Format, N, Format::kVectors>(w, x, sum);
    add_scaled_sums<N>(sum, scale, total);
}

// The same column after column, where no more than kDepth vectors add up in 16 bits: those, one sum and the totals of 8
// columns are what 16 registers hold.
template <typename Format, int N>
[[gnu::always_inline]] inline void multiply_in_turn(const Ints* w, Ints scale, const int32_t* x, Ints* total) {
    constexpr int kRecord = record_groups(super_layout<Format>());
#pragma GCC unroll 4
    for (int part = 0; part < Format::kVectors; part += Format::kDepth, x += Format::kDepth) {
        Ints weights[Format::kDepth];
#pragma GCC unroll 4
        for (int i = 0; i < Format::kDepth; ++i) {
            weights[i] = w[part + i];
            keep_order(weights[i]);
        }
#pragma GCC unroll 8
        for (int c = 0; c < N; ++c) {
            Ints sum = madd_bytes(weights[0], broadcast(x + c * kRecord));
#pragma GCC unroll 4
            for (int i = 1; i < Format::kDepth; ++i) {
                add_byte_products(sum, weights[i], x + c * kRecord + i);
            }
            total[c] = add_ints(total[c], madd_words(sum, scale));
            keep_order(total[c]);
        }
    }
}

template <typename Format, int N>
[[gnu::always_inline]] inline void multiply_sub_block(const Ints* w, Ints scale, const int32_t* x, Ints* total) {
    constexpr bool kIsBeside = kHasVnni || Format::kDepth == Format::kVectors;
    if constexpr (kIsBeside) {
        multiply_beside<Format, N>(w, scale, x, total);
    } else {
        multiply_in_turn<Format, N>(w, scale, x, total);
    }
}

// The part of the mins (Q6_K: of the offset 32) in one column's outputs, still to be scaled. sums: of the column.
template <typename Format> [[gnu::always_inline]] inline Ints sum_mins(const SuperHead& head, const int32_t* sums) {
    Ints offset = madd_words(head.mins[0], broadcast(sums));
#pragma GCC unroll 8
    for (int s = 1; s < Format::kSums; ++s) {
        offset = kHasVnni ? dot_word_group(offset, head.mins[s], sums + s)
                          : add_ints(offset, madd_words(head.mins[s], broadcast(sums + s)));
    }
    return offset;
}

// acc[c] += the super-block's part of the outputs, from its integer totals.
template <typename Format, int N>
[[gnu::always_inline]] inline void finish_super(const SuperHead& head, const int32_t* x, const Ints* total,
                                                Floats* acc) {
    constexpr int kRecord = record_groups(super_layout<Format>());
#pragma GCC unroll 8
    for (int c = 0; c < N; ++c) {
        const int32_t* sums = x + c * kRecord + 64;
        const Ints offset = sum_mins<Format>(head, sums);
        const Floats dx = broadcast_scale(sums + Format::kSums);
        if constexpr (Format::kHasMins) {
            acc[c] = fmadd(to_floats(total[c]), mul(head.d, dx), acc[c]);
            acc[c] = fnmadd(to_floats(offset), mul(head.dmin, dx), acc[c]);
        } else {
            acc[c] = fmadd(to_floats(sub_ints(total[c], shift_ints_left(offset, 5))), mul(head.d, dx), acc[c]);
        }
    }
}

} // namespace
} // namespace dspark::kernels
