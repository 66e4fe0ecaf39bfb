// SMMLA: a vector of weights is 8 of each of 2 rows, multiplied with 8 values of each of 2 columns.
// Compiled with -march=armv8.2-a+dotprod+i8mm.
#include "kernels/neon_product.h"

namespace dspark::kernels::neon {
namespace {

struct Smmla {
    static constexpr int padded(int width) { return (width + 1) / 2 * 2; }

    // out[4 h + p]: bytes 8 h .. 8 h + 7 of rows 2 p, 2 p + 1.
    static void transpose(Rows rows, int offset, uint8x16_t* out) {
        for (int p = 0; p < 4; ++p) {
            const uint64x2_t first = vreinterpretq_u64_u8(vld1q_u8(rows[2 * p] + offset));
            const uint64x2_t second = vreinterpretq_u64_u8(vld1q_u8(rows[2 * p + 1] + offset));
            out[p] = vreinterpretq_u8_u64(vtrn1q_u64(first, second));
            out[4 + p] = vreinterpretq_u8_u64(vtrn2q_u64(first, second));
        }
    }

    // Per pair of columns: the first 8 values of both, then the last 8 of both.
    static void put(int8x16_t chunk, int8_t* values, int column) {
        int8_t* pair = values + 2 * kChunk * (column / 2) + 8 * (column % 2);
        vst1_s8(pair, vget_low_s8(chunk));
        vst1_s8(pair + 16, vget_high_s8(chunk));
    }

    // sum[4 pair + p]: (first column, second column) x (row 2 p, row 2 p + 1).
    template <int N> [[gnu::always_inline]] static void add(const int8x16_t* q, const int8_t* values, int32x4_t* sum) {
        for (int h = 0; h < 2; ++h) {
            for (int pair = 0; pair < padded(N) / 2; ++pair) {
                const int8x16_t x = vld1q_s8(values + 2 * kChunk * pair + 16 * h);
                for (int p = 0; p < 4; ++p) {
                    sum[4 * pair + p] = vmmlaq_s32(sum[4 * pair + p], x, q[4 * h + p]);
                }
            }
        }
    }

    static int32x4_t scale(const int32_t* rows, int i) {
        const int32x2_t two = vld1_s32(rows + 2 * (i % 4));
        return vcombine_s32(two, two);
    }

    static int32x4_t rows(const int32x4_t* sum, int column, int half) {
        const int64x2_t low = vreinterpretq_s64_s32(sum[4 * (column / 2) + 2 * half]);
        const int64x2_t high = vreinterpretq_s64_s32(sum[4 * (column / 2) + 2 * half + 1]);
        return vreinterpretq_s32_s64(column % 2 == 0 ? vtrn1q_s64(low, high) : vtrn2q_s64(low, high));
    }
};

} // namespace

const Isa kI8mm{"neon i8mm", prepare<Smmla>, multiply<Smmla>};

} // namespace dspark::kernels::neon
