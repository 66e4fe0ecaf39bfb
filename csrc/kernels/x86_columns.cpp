// Quantizes the columns of X to 8 bits, bit for bit as ggml does for the partner type. Needs AVX2; shared by all x86
// instruction sets.
#include "kernels/x86.h"

#include <immintrin.h>

namespace dspark::kernels {
namespace {

__m256 magnitude(__m256 v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0F), v); }

// Compared as integers, which orders magnitudes alike and puts NaN above all: a NaN among the values becomes the scale,
// and so the product, as in ggml. A maximum of floats would lose it.
float largest_magnitude(const float* x, int n_values) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < n_values; i += 8) {
        largest = _mm256_max_epi32(_mm256_castps_si256(magnitude(_mm256_loadu_ps(x + i))), largest);
    }
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(1, 0, 3, 2)));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, _MM_SHUFFLE(2, 3, 0, 1)));
    return _mm_cvtss_f32(_mm_castsi128_ps(m));
}

// The first value of that magnitude, with its sign.
float first_of_magnitude(const float* x, float size) {
    for (int i = 0; i < kSuperBlockSize; i += 8) {
        const __m256 same = _mm256_cmp_ps(magnitude(_mm256_loadu_ps(x + i)), _mm256_set1_ps(size), _CMP_EQ_OQ);
        const int mask = _mm256_movemask_ps(same);
        if (mask != 0) {
            return x[i + __builtin_ctz(static_cast<unsigned>(mask))];
        }
    }
    return size;
}

__m256i round_8(const float* x, __m256 scale) {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x), scale)); // to nearest even, as ggml rounds
}

// 32 values times `scale`, rounded, as int8.
__m256i round_32(const float* x, float scale) {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256i low = _mm256_packs_epi32(round_8(x, s), round_8(x + 8, s));
    const __m256i high = _mm256_packs_epi32(round_8(x + 16, s), round_8(x + 24, s));
    // Packing works within 128-bit lanes: put the groups of four back in order.
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

struct HalfSums {
    int32_t low;
    int32_t high;
};

// Sums of the first and the last 16 of 32 signed bytes.
HalfSums sum_halves(__m256i q) {
    const __m256i eights = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    const __m256i halves = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, _MM_SHUFFLE(1, 0, 3, 2)));
    return {_mm256_cvtsi256_si32(halves) - 16 * 128, _mm_cvtsi128_si32(_mm256_extracti128_si256(halves, 1)) - 16 * 128};
}

void store(__m256i v, int32_t* out) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), v); }

int32_t float_bits(float value) { return _mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(value))); }

int32_t pair(int32_t low, int32_t high) {
    return static_cast<int32_t>(static_cast<uint32_t>(low & 0xffff) | (static_cast<uint32_t>(high) << 16));
}

// One super-block of one column: values, sums, scale.
void put_super(const float* x, ColumnLayout layout, int32_t* out) {
    const float largest = first_of_magnitude(x, largest_magnitude(x, kSuperBlockSize));
    const float inverse = largest == 0.0F ? 0.0F : -127.0F / largest;
    HalfSums sums[8];
    for (int i = 0; i < 8; ++i) {
        const __m256i q = round_32(x + 32 * i, inverse);
        store(q, out + 8 * i);
        sums[i] = sum_halves(q);
    }
    out += 64;
    if (layout == ColumnLayout::super16) {
        for (int i = 0; i < 8; ++i) {
            *out++ = pair(sums[i].low, sums[i].high);
        }
    } else {
        for (int i = 0; i < 8; i += 2) {
            *out++ = pair(sums[i].low + sums[i].high, sums[i + 1].low + sums[i + 1].high);
        }
    }
    *out = float_bits(largest == 0.0F ? 0.0F : 1.0F / inverse);
}

// One block of 32 of one column: values, correction, scale.
void put_block(const float* x, int32_t weight_offset, int32_t* out) {
    const float largest = largest_magnitude(x, kBlockSize);
    const __m256i q = round_32(x, largest != 0.0F ? 127.0F / largest : 0.0F);
    const HalfSums sums = sum_halves(q);
    store(q, out);
    out[8] = -weight_offset * (sums.low + sums.high);
    const __m128i half = _mm_cvtps_ph(_mm_set_ss(largest / 127.0F), _MM_FROUND_TO_NEAREST_INT); // ggml stores it as f16
    out[9] = float_bits(_mm_cvtss_f32(_mm_cvtph_ps(half)));
}

} // namespace

bool has_avx512_vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

void prepare_x86(const Product& product, int64_t begin, const Columns& columns, Part part) {
    const bool is_super = columns.layout != ColumnLayout::bytes;
    const int32_t offset = weight_offset(product.type);
    const int64_t n_steps = (columns.n_values + kSuperBlockSize - 1) / kSuperBlockSize;
    const int64_t n_records = n_steps * columns.n_columns, end = part.end(n_records);
    for (int64_t r = part.begin(n_records); r < end; ++r) {
        const int64_t k = r / columns.n_columns * kSuperBlockSize;
        const int64_t n_values = columns.n_values - k < kSuperBlockSize ? columns.n_values - k : kSuperBlockSize;
        const float* x = product.x + (begin + r % columns.n_columns) * product.x_stride + k;
        int32_t* out = columns.groups + r * record_groups(columns.layout);
        if (is_super) {
            put_super(x, columns.layout, out);
            continue;
        }
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            put_block(x + b * kBlockSize, offset, out + b * kBlockRecord);
        }
    }
}

} // namespace dspark::kernels
