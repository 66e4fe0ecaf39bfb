// SDOT: a vector of weights is 4 of each of 4 rows, multiplied with one group of 4 values of one column.
// Compiled with -march=armv8.2-a+dotprod.
#include "kernels/neon_product.h"

namespace dspark::kernels::neon {
namespace {

struct Sdot {
    static constexpr int padded(int width) { return width; }

    // out[4 h + g]: bytes 4 g .. 4 g + 3 of rows 4 h .. 4 h + 3.
    static void transpose(Rows rows, int offset, uint8x16_t* out) {
        for (int h = 0; h < 2; ++h) {
            uint32x4_t row[4];
            for (int r = 0; r < 4; ++r) {
                row[r] = vreinterpretq_u32_u8(vld1q_u8(rows[4 * h + r] + offset));
            }
            const uint64x2_t even_01 = vreinterpretq_u64_u32(vtrn1q_u32(row[0], row[1])); // groups 0, 2
            const uint64x2_t odd_01 = vreinterpretq_u64_u32(vtrn2q_u32(row[0], row[1]));  // groups 1, 3
            const uint64x2_t even_23 = vreinterpretq_u64_u32(vtrn1q_u32(row[2], row[3]));
            const uint64x2_t odd_23 = vreinterpretq_u64_u32(vtrn2q_u32(row[2], row[3]));
            out[4 * h] = vreinterpretq_u8_u64(vtrn1q_u64(even_01, even_23));
            out[4 * h + 1] = vreinterpretq_u8_u64(vtrn1q_u64(odd_01, odd_23));
            out[4 * h + 2] = vreinterpretq_u8_u64(vtrn2q_u64(even_01, even_23));
            out[4 * h + 3] = vreinterpretq_u8_u64(vtrn2q_u64(odd_01, odd_23));
        }
    }

    static void put(int8x16_t chunk, int8_t* values, int column) { vst1q_s8(values + kChunk * column, chunk); }

    template <int N, int g>
    [[gnu::always_inline]] static void add_group(const int8x16_t* q, const int8x16_t* x, int32x4_t* sum) {
        for (int c = 0; c < N; ++c) {
            sum[2 * c] = vdotq_laneq_s32(sum[2 * c], q[g], x[c], g);
            sum[2 * c + 1] = vdotq_laneq_s32(sum[2 * c + 1], q[4 + g], x[c], g);
        }
    }

    // sum[2 c + h]: rows 4 h .. 4 h + 3, column c.
    template <int N> [[gnu::always_inline]] static void add(const int8x16_t* q, const int8_t* values, int32x4_t* sum) {
        int8x16_t x[N];
        for (int c = 0; c < N; ++c) {
            x[c] = vld1q_s8(values + kChunk * c);
        }
        add_group<N, 0>(q, x, sum);
        add_group<N, 1>(q, x, sum);
        add_group<N, 2>(q, x, sum);
        add_group<N, 3>(q, x, sum);
    }

    static int32x4_t scale(const int32_t* rows, int i) { return vld1q_s32(rows + 4 * (i % 2)); }

    static int32x4_t rows(const int32x4_t* sum, int column, int half) { return sum[2 * column + half]; }
};

} // namespace

const Isa kDotprod{"neon dotprod", prepare<Sdot>, multiply<Sdot>};

} // namespace dspark::kernels::neon
