// The vectors of one instruction set; a vector's lanes belong to as many outputs. Every .cpp of an instruction set
// defines DSPARK_LANES (8 or 16) and includes the kernels' headers, whose contents have internal linkage: each file
// compiles its own copy with its own flags, and no copy can be linked in place of another.
#pragma once

#include "kernels/x86.h"

#if DSPARK_LANES == 16
#include "kernels/lanes16.h"
#else
#include "kernels/lanes8.h"
#endif

namespace dspark::kernels {
namespace {

inline constexpr size_t kLine = 64; // bytes of a line of the caches

inline Ints broadcast(const int32_t* group) { return all_ints(*group); }
inline Floats broadcast_scale(const int32_t* group) { return as_floats(broadcast(group)); }

inline Ints nibbles_low(Ints q) { return q & all_bytes(15); }
inline Ints nibbles_high(Ints q) { return nibbles_low(shift_words_right(q, 4)); }

// kLanes rows of W at the current block, one lane each. Addresses are a quarter's plus 0 to 3 strides, which the
// processor adds for nothing: pointers to all rows would not fit into its registers.
struct Rows {
    const uint8_t* quarter[kLanes / 4]; // rows 0, 4, ...
    size_t stride;
    size_t stride_3;

    Rows(const uint8_t* first, size_t bytes) : stride(bytes), stride_3(3 * bytes) {
        for (int i = 0; i < kLanes / 4; ++i) {
            quarter[i] = first + 4 * static_cast<size_t>(i) * bytes;
        }
    }
    [[gnu::always_inline]] const uint8_t* at(int row, int offset) const {
        const uint8_t* first = quarter[row / 4] + offset;
        return row % 4 == 3 ? first + stride_3 : first + static_cast<size_t>(row % 4) * stride;
    }
    [[gnu::always_inline]] void advance(size_t n_bytes) {
        for (const uint8_t*& q : quarter) {
            q += n_bytes;
        }
    }
};

// part[r]: 16 bytes of rows r, 4 + r, ... -> 4 vectors; lane r of vector i: bytes 4 i .. 4 i + 3 of row r.
[[gnu::always_inline]] inline void transpose_parts(const Ints (&part)[4], Ints out[4]) {
    const Ints low_01 = interleave_low(part[0], part[1]), high_01 = interleave_high(part[0], part[1]);
    const Ints low_23 = interleave_low(part[2], part[3]), high_23 = interleave_high(part[2], part[3]);
    out[0] = interleave_low_pairs(low_01, low_23);
    out[1] = interleave_high_pairs(low_01, low_23);
    out[2] = interleave_low_pairs(high_01, high_23);
    out[3] = interleave_high_pairs(high_01, high_23);
}

// The same of 16 bytes at `offset` of each row.
[[gnu::always_inline]] inline void transpose_16(const Rows& rows, int offset, Ints out[4]) {
    Ints part[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) { // row r of every quarter
        const uint8_t* parts[kLanes / 4];
        for (int i = 0; i < kLanes / 4; ++i) {
            parts[i] = rows.at(4 * i + r, offset);
        }
        part[r] = load_parts(parts);
    }
    transpose_parts(part, out);
}

// The f16 at at(0) .. at(7). Two more bytes are read than needed.
template <typename At> [[gnu::always_inline]] inline __m128i gather_8(At at) {
    __m128i pairs[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        pairs[i] = _mm_unpacklo_epi16(_mm_loadu_si32(at(2 * i)), _mm_loadu_si32(at(2 * i + 1)));
    }
    return _mm_unpacklo_epi64(_mm_unpacklo_epi32(pairs[0], pairs[1]), _mm_unpacklo_epi32(pairs[2], pairs[3]));
}

// The f16 at `offset` of each row, followed by other bytes of the block.
[[gnu::always_inline]] inline Floats gather_halves(const Rows& rows, int offset) {
    __m128i eights[kLanes / 8];
    for (int i = 0; i < kLanes / 8; ++i) {
        eights[i] = gather_8([&](int row) { return rows.at(8 * i + row, offset); });
    }
    return widen_halves(eights);
}

// Where prefetches of a strip begin. A short strip's own length ahead is too late: in the order of memory its last rows
// come at the end, and all rows are needed at the beginning (AVX2, rows of 1024, from memory: Q4_0 9 GB/s, so 14).
inline const uint8_t* prefetch_start(const uint8_t* weights, size_t stride) {
    constexpr size_t kLeastAhead = 16 << 10;
    const size_t strip = kLanes * stride;
    return weights + (strip < kLeastAhead ? kLeastAhead : strip);
}

// An instruction of its own: the compiler gathers its intrinsics to a burst that stalls for those misses.
[[gnu::always_inline]] inline void prefetch_lines(const uint8_t* from, size_t n_bytes) {
    if (prefetches_to_l1) {
#pragma GCC unroll 16
        for (size_t b = 0; b < n_bytes; b += kLine) {
            __asm__ volatile("prefetcht0 %0" : : "m"(from[b]));
        }
    } else {
#pragma GCC unroll 16
        for (size_t b = 0; b < n_bytes; b += kLine) {
            __asm__ volatile("prefetcht1 %0" : : "m"(from[b]));
        }
    }
}

// Asks for n_bytes of the next strip, in the order of memory, while this one is computed, a little with every chunk:
// the loads follow many rows at once, which hardware prefetchers do not.
template <size_t n_bytes> [[gnu::always_inline]] inline void prefetch(const uint8_t*& next) {
    prefetch_lines(next, n_bytes);
    next += n_bytes;
}

// The sum over the lanes of each vector. One or four at a time by the same tree of additions: the same bits.
inline void store_sums(float* y, const Floats (&v)[1]) {
    const __m128 four = fold(v[0]);
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    *y = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void store_sums(float* y, const Floats (&v)[4]) {
    const __m128 a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); // a0 + a2, b0 + b2, a1 + a3, b1 + b3
    const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
    _mm_storeu_ps(y, _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab)));
}

} // namespace
} // namespace dspark::kernels
