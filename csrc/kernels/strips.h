// Walks W strip by strip: kLanes rows against all columns. For few columns the weights are unpacked a chunk at a time
// right before their use; more, from kSharedFrom on, share steps that are unpacked into the L1 cache (shared_steps.h).
#pragma once

#include "kernels/block_column.h"
#include "kernels/isa.h"
#include "kernels/one_column.h"
#include "kernels/shared_steps.h"
#include "kernels/tiles.h"

#include <type_traits>
#include <utility>

namespace dspark::kernels {
namespace {

// kLanes outputs of some columns. x: the first one's records; next: rows that the next strip needs.
struct Tile {
    Rows rows;
    const uint8_t* next;
    const int32_t* x;
    int64_t x_step; // from one step's records to the next one's
    float* y;
    int64_t y_stride;
};

template <typename Format> struct SuperKernel {
    using Shared = SharedSuper<Format>;
    // From memory, one Zen 5 core, GMAC/s of Q4_K at 6 and 8 columns: AVX-512 260 and 277, shared 225 and 245; AVX2 117
    // and 123, shared 126 and 135.
    static constexpr int kSharedFrom = kHasVnni ? kTileColumns + 1 : 6;
    static bool takes_column(int64_t) { return true; }
    static constexpr int kRecord = record_groups(super_layout<Format>());
    static constexpr size_t kStepBytes = sizeof(typename Format::Block);

    // Part by part, each used right away: a processor overlaps the unpacking of some vectors with the products of those
    // before, but not of a whole chunk. The branch in prefetch() keeps the compiler from moving loads of one part to
    // another: without it 4 to 8 columns are 0.7 to 0.9 times as fast. sum: of the sub-block that the part belongs to.
    template <int N, int chunk, int part>
    [[gnu::always_inline]] static void add_part(Tile& tile, const SuperHead& head, Ints* raw, Ints* sum, Ints* total) {
        constexpr int kOfSubBlock = Format::kVectors / kPartVectors; // parts
        constexpr int s = Format::sub_block(chunk, part / kOfSubBlock);
        Ints q[kPartVectors];
        prefetch<kLanes * kStepBytes / (kChunks * kParts)>(tile.next);
        unpack_part<chunk, part>(Format{}, tile.rows, head, raw, q);
        if constexpr (part % kOfSubBlock == 0) {
            clear<N>(sum);
        }
        add_products<Format, N, kPartVectors>(q, tile.x + s * Format::kVectors + part % kOfSubBlock * kPartVectors,
                                              sum);
        if constexpr (part % kOfSubBlock == kOfSubBlock - 1) {
            add_scaled_sums<N>(sum, head.scale[s], total);
        }
    }

    template <int N, int chunk>
    [[gnu::always_inline]] static void add_chunk(Tile& tile, const SuperHead& head, Ints* total) {
        if constexpr (kHasVnni) {
            Ints raw[kRawVectors], sum[N];
            add_part<N, chunk, 0>(tile, head, raw, sum, total);
            add_part<N, chunk, 1>(tile, head, raw, sum, total);
            add_part<N, chunk, 2>(tile, head, raw, sum, total);
            add_part<N, chunk, 3>(tile, head, raw, sum, total);
            return;
        }
        prefetch<kLanes * kStepBytes / kChunks>(tile.next);
        Ints q[kChunkVectors];
        unpack_chunk<chunk>(Format{}, tile.rows, head, q);
#pragma GCC unroll 4
        for (int i = 0; i < kChunkVectors / Format::kVectors; ++i) {
            const int s = Format::sub_block(chunk, i), first = s * Format::kVectors;
            multiply_sub_block<Format, N>(q + i * Format::kVectors, head.scale[s], tile.x + first, total);
        }
    }

    // acc[c] += 256 weights of each row times those of column c.
    template <int N> [[gnu::always_inline]] static void add_step(Tile& tile, int64_t, Floats* acc) {
        SuperHead head;
        unpack_head(Format{}, tile.rows, head);
        Ints total[N];
        for (Ints& one : total) {
            one = zero_ints();
        }
        add_chunk<N, 0>(tile, head, total);
        add_chunk<N, 1>(tile, head, total);
        add_chunk<N, 2>(tile, head, total);
        add_chunk<N, 3>(tile, head, total);
        finish_super<Format, N>(head, tile.x, total, acc);
        tile.rows.advance(kStepBytes);
    }

    static void multiply_column(const Product& product, float* y, const Columns& columns, Outputs outputs) {
        multiply_in_streams<SuperColumn<Format>>(product, y, columns, outputs);
    }
};

template <typename Format> struct BlockKernel {
    using Shared = SharedBlocks<Format>;
    // As above: AVX2 Q8_0 66 and 72, shared 72 and 78; AVX-512 169 and 195, shared 110 and 150.
    static constexpr int kSharedFrom = kHasVnni ? kTileColumns + 1 : Format::kIsSigned ? 5 : 6;
    static constexpr int kRecord = record_groups(ColumnLayout::bytes);
    static constexpr size_t kBlockBytes = sizeof(typename Format::Block);
    // One column of Q8_0 by rows gains nothing with 8 lanes: 0.8 to 1.2 times as fast.
    static constexpr bool kHasRows = kLanes == 16 || !std::is_same_v<Format, Q8_0>;

    // What is not whole chunks of 256 values is left to the strips.
    static bool takes_column(int64_t n_values) { return kHasRows && n_values % kSuperBlockSize == 0; }
    static void multiply_column(const Product& product, float* y, const Columns& columns, Outputs outputs) {
        if constexpr (kHasRows) {
            multiply_in_streams<BlockColumn<Format>>(product, y, columns, outputs);
        }
    }

    template <int N> [[gnu::always_inline]] static void add_step(Tile& tile, int64_t n_values, Floats* acc) {
        for (int64_t b = 0; b < n_values / kBlockSize; ++b) {
            add_block<N>(tile, tile.x + b * kBlockRecord, acc);
            tile.rows.advance(kBlockBytes);
        }
    }

    // By halves, as K-quants by parts, where the products take longer than the unpacking: otherwise up to 0.94 as fast.
    // Prefetches in two parts: all at once, columns 2 to 6 of Q8_0 are 0.75 to 0.9 times as fast.
    template <int N> [[gnu::always_inline]] static void add_block(Tile& tile, const int32_t* x, Floats* acc) {
        constexpr size_t kHalf = kLanes * kBlockBytes / 2;
        prefetch<kHalf>(tile.next);
        if constexpr (kHasVnni && N > 4) {
            Ints raw[4], q[4], sum[N];
            unpack_half<0>(Format{}, tile.rows, raw, q);
            begin_block<N>(x, sum);
            add_block_products<Format, N, 4>(q, x, sum);
            prefetch<kHalf>(tile.next);
            unpack_half<1>(Format{}, tile.rows, raw, q);
            add_block_products<Format, N, 4>(q, x + 4, sum);
            finish_block<Format, N>(gather_halves(tile.rows, 0), x, sum, acc);
        } else {
            Ints q[kBlockVectors];
            unpack(Format{}, tile.rows, q);
            prefetch<kHalf>(tile.next);
            multiply_block<Format, N>(q, gather_halves(tile.rows, 0), x, acc);
        }
    }
};

template <typename Kernel, int N> void multiply_tile(Tile tile, int64_t n_values) {
    Floats acc[N];
    for (Floats& one : acc) {
        one = zero_floats();
    }
    for (; n_values > 0; n_values -= kSuperBlockSize, tile.x += tile.x_step) {
        Kernel::template add_step<N>(tile, n_values < kSuperBlockSize ? n_values : kSuperBlockSize, acc);
    }
    for (int c = 0; c < N; ++c) {
        store(tile.y + c * tile.y_stride, acc[c]);
    }
}

// The call for a width that is known only at run time.
template <typename Kernel, int... widths>
inline void multiply_tile(int width, const Tile& tile, int64_t n_values, std::integer_sequence<int, widths...>) {
    ((width == widths + 1 ? multiply_tile<Kernel, widths + 1>(tile, n_values) : void()), ...);
}

// Whole strips only: the dispatcher fills up the last one.
template <typename Kernel>
void multiply_outputs(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
    if (columns.n_columns == 1 && Kernel::takes_column(columns.n_values)) {
        return Kernel::multiply_column(product, product.y + begin * product.y_stride, columns, {first, last});
    }
    for (int64_t o = first; o < last; o += kLanes) {
        if (columns.n_columns >= Kernel::kSharedFrom) {
            multiply_shared<typename Kernel::Shared>(product, begin, columns, o);
            continue;
        }
        const size_t stride = product.weight_stride;
        const auto* weights = static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(o) * stride;
        const Tile tile{Rows(weights, stride),
                        prefetch_start(weights, stride),
                        columns.groups,
                        columns.n_columns * Kernel::kRecord,
                        product.y + begin * product.y_stride + o,
                        product.y_stride};
        multiply_tile<Kernel>(columns.n_columns, tile, columns.n_values,
                              std::make_integer_sequence<int, Kernel::kSharedFrom - 1>{});
    }
}

inline void multiply(const Product& product, int64_t begin, const Columns& columns, int64_t first, int64_t last) {
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
} // namespace dspark::kernels
