// AVX2: walks the strips of W, unpacks a step of 256 weights once and multiplies it with every tile of columns.
#include "kernels/avx2_block.h"
#include "kernels/avx2_super.h"

#include <utility>

namespace dspark::kernels {
namespace avx2 {
namespace {

// Asks for the step's share of the next strip while this one is computed. In the order of memory: following the 8 rows
// instead, as the loads do, or trusting the hardware alone is up to 1.5 and 2.4 times slower for one column.
template <size_t n_bytes> inline const uint8_t* prefetch_rows(const uint8_t* next) {
    for (size_t b = 0; b < kStripOutputs * n_bytes; b += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(next) + b, _MM_HINT_T0);
    }
    return next + kStripOutputs * n_bytes;
}

template <typename Format> struct SuperKernel {
    static constexpr int64_t kStepValues = kSuperBlockSize;
    static constexpr bool kCanFuse = false;
    const uint8_t* next = nullptr; // of the next strip: what is to be prefetched
    SuperStrip strip;

    void load(const uint8_t** rows, int64_t) {
        next = prefetch_rows<sizeof(typename Format::Block)>(next);
        unpack(Format{}, rows, strip);
        for (int r = 0; r < 8; ++r) {
            rows[r] += sizeof(typename Format::Block);
        }
    }

    template <int N> void multiply(int64_t, const int32_t* x, __m256* acc) const {
        multiply_super<Format, N>(strip, x, acc);
    }
};

template <typename Format> struct BlockKernel {
    static constexpr int64_t kStepValues = kSuperBlockSize;
    static constexpr bool kCanFuse = true;
    const uint8_t* next = nullptr;
    BlockStrip strip;

    void load(const uint8_t** rows, int64_t n_values) {
        next = prefetch_rows<sizeof(typename Format::Block) * kStepBlocks>(next);
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            strip.d[b] = gather_halves(rows, 0);
            unpack(Format{}, rows, strip.q + b * Format::kVectors);
            for (int r = 0; r < 8; ++r) {
                rows[r] += sizeof(typename Format::Block);
            }
        }
    }

    // One or two columns: the unpacked weights are used at once and never stored.
    template <int N> void load_and_multiply(const uint8_t** rows, int64_t n_values, const int32_t* x, __m256* acc) {
        constexpr int kGroups = (Format::kVectors + (Format::kIsWords ? 1 : 2)) * N;
        next = prefetch_rows<sizeof(typename Format::Block) * kStepBlocks>(next);
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            __m256i q[Format::kVectors];
            unpack(Format{}, rows, q);
            multiply_block<Format, N>(q, gather_halves(rows, 0), x + b * kGroups, acc);
            for (int r = 0; r < 8; ++r) {
                rows[r] += sizeof(typename Format::Block);
            }
        }
    }

    template <int N> void multiply(int64_t n_values, const int32_t* x, __m256* acc) const {
        constexpr int kGroups = (Format::kVectors + (Format::kIsWords ? 1 : 2)) * N;
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            multiply_block<Format, N>(strip.q + b * Format::kVectors, strip.d[b], x + b * kGroups, acc);
        }
    }
};

template <typename Kernel, int... widths>
inline void multiply_tile(const Kernel& kernel, int width, int64_t n_values, const int32_t* x, __m256* acc,
                          std::integer_sequence<int, widths...>) {
    ((width == widths + 1 ? kernel.template multiply<widths + 1>(n_values, x, acc) : void()), ...);
}

void store(const Product& product, int64_t column, int64_t output, int64_t n_outputs, __m256 values) {
    float* y = product.y + column * product.y_stride + output;
    if (n_outputs == kStripOutputs) {
        _mm256_storeu_ps(y, values);
        return;
    }
    alignas(32) float all[kStripOutputs];
    _mm256_store_ps(all, values);
    for (int64_t i = 0; i < n_outputs; ++i) {
        y[i] = all[i];
    }
}

template <typename Kernel>
void multiply_strip(const Product& product, const Columns& columns, const uint8_t** rows, size_t strip_bytes,
                    __m256* acc) {
    Kernel kernel;
    kernel.next = rows[0] + strip_bytes;
    const int32_t* x = columns.groups.data();
    for (int c = 0; c < columns.n_columns; ++c) {
        acc[c] = _mm256_setzero_ps();
    }
    for (int64_t k = 0; k < product.n_values; k += Kernel::kStepValues) {
        const int64_t n_values =
            product.n_values - k < Kernel::kStepValues ? product.n_values - k : Kernel::kStepValues;
        const size_t groups = groups_per_column(columns.layout, static_cast<size_t>(n_values));
        if constexpr (Kernel::kCanFuse) {
            if (columns.n_columns <= 2) {
                columns.n_columns == 1 ? kernel.template load_and_multiply<1>(rows, n_values, x, acc)
                                       : kernel.template load_and_multiply<2>(rows, n_values, x, acc);
                x += groups * static_cast<size_t>(columns.n_columns);
                continue;
            }
        }
        kernel.load(rows, n_values);
        for (int tile = 0; tile < columns.n_tiles; ++tile) {
            const int first = columns.tile_begin(tile);
            const int width = columns.tile_begin(tile + 1) - first;
            multiply_tile(kernel, width, n_values, x, acc + first, std::make_integer_sequence<int, kTileColumns>{});
            x += groups * static_cast<size_t>(width);
        }
    }
}

template <typename Kernel>
void multiply_outputs(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    __m256 acc[kMaxColumns];
    const auto* weights = static_cast<const uint8_t*>(product.weights);
    for (int64_t o = first; o < last; o += kStripOutputs) {
        const int64_t n_outputs = last - o < kStripOutputs ? last - o : kStripOutputs;
        const uint8_t* rows[kStripOutputs];
        for (int64_t r = 0; r < kStripOutputs; ++r) {
            rows[r] = weights + static_cast<size_t>(o + (r < n_outputs ? r : n_outputs - 1)) * product.weight_stride;
        }
        multiply_strip<Kernel>(product, columns, rows, kStripOutputs * product.weight_stride, acc);
        for (int c = 0; c < columns.n_columns; ++c) {
            store(product, begin + c, o, n_outputs, acc[c]);
        }
    }
}

void multiply(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    switch (product.type) {
    case WeightType::q8_0:
        return multiply_outputs<BlockKernel<Q8_0>>(product, begin, columns, first, last);
    case WeightType::q4_0:
        return multiply_outputs<BlockKernel<Q4_0>>(product, begin, columns, first, last);
    case WeightType::iq4_nl:
        return multiply_outputs<BlockKernel<IQ4_NL>>(product, begin, columns, first, last);
    case WeightType::q4_k:
        return multiply_outputs<SuperKernel<Q4K>>(product, begin, columns, first, last);
    case WeightType::q5_k:
        return multiply_outputs<SuperKernel<Q5K>>(product, begin, columns, first, last);
    case WeightType::q6_k:
        return multiply_outputs<SuperKernel<Q6K>>(product, begin, columns, first, last);
    default:
        return;
    }
}

} // namespace
} // namespace avx2

const Isa* find_avx2() {
    static constexpr Isa kIsa{"avx2", avx2::prepare, avx2::multiply};
    const bool is_supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? &kIsa : nullptr;
}

} // namespace dspark::kernels
