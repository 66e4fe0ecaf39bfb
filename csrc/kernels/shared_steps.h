// Many columns: a step of a strip (256 weights of kLanes rows) is unpacked once, into the L1 cache, and serves all
// tiles before the next step. strips.h tells from how many columns on this pays.
#pragma once

#include "kernels/isa.h"
#include "kernels/tiles.h"

#include <utility>

namespace dspark::kernels {
namespace {

// Asks for part `i` of n_parts of the next tile's values. They come from the L2 cache: a step of 128 columns does not
// fit into L1, and the records of a tile are too many streams for the hardware.
template <int n_groups, int n_parts> [[gnu::always_inline]] inline void prefetch_values(const int32_t* x, int i) {
    constexpr int kGroups = n_groups / n_parts;
    const int32_t* next = x + n_groups + i * kGroups;
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; g += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(next + g), _MM_HINT_T0);
    }
}

// Asks for the next strip's weights in small parts between the products of this one: all of a step's at once are more
// misses than a core can have outstanding, and it waits for them. One Zen 5 core, 16 columns from memory, GMAC/s, at
// once and in parts: Q4_K 173 and 281, Q5_K 130 and 252, Q6_K 111 and 232.
class Ahead {
  public:
    // n_bytes: of a step; in n_parts.
    Ahead(const uint8_t* next, size_t n_bytes, size_t n_parts)
        : next_(next), end_(next), n_bytes_(n_bytes), n_lines_((n_bytes + kLine * n_parts - 1) / (kLine * n_parts)) {}
    void begin_step() {
        next_ = end_;
        end_ += n_bytes_;
    }
    [[gnu::always_inline]] void ask_part() {
        for (size_t i = 0; i < n_lines_ && next_ < end_; ++i, next_ += kLine) {
            prefetch_lines(next_, kLine);
        }
    }

  private:
    const uint8_t* next_;
    const uint8_t* end_;
    size_t n_bytes_;
    size_t n_lines_;
};

// A step of a K-quant: the weights in the order of their values, so that sub-blocks are a loop.
template <typename Format> struct SharedSuper {
    static constexpr int kRecord = record_groups(super_layout<Format>());
    static constexpr size_t kBytes = sizeof(typename Format::Block);
    static constexpr int kSubBlocks = kChunks * kChunkVectors / Format::kVectors;
    SuperHead head;
    Ints q[kChunks * kChunkVectors];

    void unpack(Rows& rows, int64_t) {
        unpack_head(Format{}, rows, head);
        unpack_part<0>(rows);
        unpack_part<1>(rows);
        unpack_part<2>(rows);
        unpack_part<3>(rows);
        rows.advance(kBytes);
    }

    template <int chunk> [[gnu::always_inline]] void unpack_part(const Rows& rows) {
        Ints part[kChunkVectors];
        unpack_chunk<chunk>(Format{}, rows, head, part);
#pragma GCC unroll 16
        for (int i = 0; i < kChunkVectors; ++i) {
            q[Format::sub_block(chunk, i / Format::kVectors) * Format::kVectors + i % Format::kVectors] = part[i];
        }
    }

    template <int N> [[gnu::always_inline]] void multiply(const int32_t* x, int64_t, Ahead& ahead, Floats* acc) const {
        Ints total[N];
        for (Ints& one : total) {
            one = zero_ints();
        }
#pragma GCC unroll 1
        for (int s = 0, first = 0; s < kSubBlocks; ++s, first += Format::kVectors) {
            ahead.ask_part();
            prefetch_values<N * kRecord, kSubBlocks>(x, s);
            multiply_sub_block<Format, N>(q + first, head.scale[s], x + first, total);
        }
        finish_super<Format, N>(head, x, total, acc);
    }
};

template <typename Format> struct SharedBlocks {
    static constexpr int kRecord = record_groups(ColumnLayout::bytes);
    static constexpr int kBlocks = static_cast<int>(kSuperBlockSize / kBlockSize);
    static constexpr size_t kBytes = kBlocks * sizeof(typename Format::Block);
    static constexpr int kSubBlocks = kBlocks;
    Floats d[kBlocks];
    Ints q[kBlocks][kBlockVectors];

    void unpack(Rows& rows, int64_t n_blocks) {
        for (int64_t b = 0; b < n_blocks; ++b) {
            kernels::unpack(Format{}, rows, q[b]);
            d[b] = gather_halves(rows, 0);
            rows.advance(sizeof(typename Format::Block));
        }
    }

    template <int N>
    [[gnu::always_inline]] void multiply(const int32_t* x, int64_t n_blocks, Ahead& ahead, Floats* acc) const {
        for (int b = 0; b < n_blocks; ++b) {
            ahead.ask_part();
            prefetch_values<N * kRecord, kBlocks>(x, b);
            multiply_block<Format, N>(q[b], d[b], x + b * kBlockRecord, acc);
        }
    }
};

// sums[c] += the step's part of a tile of N columns.
template <typename Step, int N>
void add_shared(const Step& step, const int32_t* x, int64_t n_blocks, Ahead& ahead, Floats* sums) {
    Floats acc[N];
    for (int c = 0; c < N; ++c) {
        acc[c] = sums[c];
    }
    step.template multiply<N>(x, n_blocks, ahead, acc);
    for (int c = 0; c < N; ++c) {
        sums[c] = acc[c];
    }
}

template <typename Step, int... widths>
inline void add_shared(int width, const Step& step, const int32_t* x, int64_t n_blocks, Ahead& ahead, Floats* sums,
                       std::integer_sequence<int, widths...>) {
    ((width == widths + 1 ? add_shared<Step, widths + 1>(step, x, n_blocks, ahead, sums) : void()), ...);
}

// kLanes outputs, from o on, of all columns.
template <typename Step>
void multiply_shared(const Product& product, int64_t begin, const Columns& columns, int64_t o) {
    const uint8_t* weights =
        static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(o) * product.weight_stride;
    Rows rows(weights, product.weight_stride);
    Ahead ahead(prefetch_start(weights, product.weight_stride), kLanes * Step::kBytes,
                static_cast<size_t>(columns.n_tiles * Step::kSubBlocks));
    const int32_t* x = columns.groups;
    Floats sums[kMaxColumns];
    for (int c = 0; c < columns.n_columns; ++c) {
        sums[c] = zero_floats();
    }
    Step step;
    for (int64_t n_left = columns.n_values; n_left > 0;
         n_left -= kSuperBlockSize, x += columns.n_columns * Step::kRecord) {
        const int64_t n_blocks = (n_left < kSuperBlockSize ? n_left : kSuperBlockSize) / kBlockSize;
        step.unpack(rows, n_blocks);
        ahead.begin_step();
        for (int i = 0; i < columns.n_tiles; ++i) {
            const int column = columns.tile_begin(i), width = columns.tile_begin(i + 1) - column;
            add_shared(width, step, x + column * Step::kRecord, n_blocks, ahead, sums + column,
                       std::make_integer_sequence<int, kTileColumns>{});
        }
    }
    for (int c = 0; c < columns.n_columns; ++c) {
        store(product.y + (begin + c) * product.y_stride + o, sums[c]);
    }
}

} // namespace
} // namespace dspark::kernels
