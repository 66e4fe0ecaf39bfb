// One column of quantized weights, along the rows in streams: parts of the outputs far from each other. Hardware
// prefetchers follow each of them, and together they keep more misses outstanding than one can. Zen 4, one thread,
// GB/s: one stream 16 to 22, two 19, four 23, eight 21, sixteen 16 to 19; four rows of 2 KB side by side 10, with
// prefetches 18. Prefetches take slots that misses need, so where hardware keeps up by itself, it is left alone.
//
// What a strip's rows leave, integers, is added up while others are read: memory would idle otherwise, since
// prefetchers are not far ahead.
#pragma once

#include "kernels/columns.h"
#include "kernels/kernels.h"
#include "kernels/lanes.h"

namespace dspark::kernels {
namespace {

inline constexpr int kStreams = 4, kStreamRows = kLanes / kStreams;
inline constexpr size_t kStreamAhead = 2048; // bytes that prefetches are ahead; 1024 up to a fifth slower, 4096 as fast
// Up to so many bytes kept of a strip hardware follows 4 streams better without prefetches; beyond, the L1 cache loses
// what is kept, and those misses take the slots of others. Measured; 16 lanes always prefetch.
inline constexpr size_t kMostKept = kLanes == 8 ? 12 << 10 : 0;
// Sums of two strips, so that one's can be added up evenly along the next; or of one, added up along its own last rows:
// half as much to keep, which is worth more with 8 lanes (up to 1.4 times as fast), not with 16 (0.95 to 1.05).
inline constexpr int kKeptStrips = kLanes == 8 ? 1 : 2;
// Of all rows, then the next ones. Long, since what is prefetched of a row lies in the next piece where one ends.
inline constexpr int kPieceChunks = 64;

// kLanes rows, kStreamRows of each stream. Lane kStreams r + i is row r of stream i.
struct StreamRows {
    const uint8_t* stream[kStreams];
    size_t stride;
    bool has_prefetches;

    StreamRows(const uint8_t* first, size_t bytes, size_t stream_bytes, bool with_prefetches)
        : stride(bytes), has_prefetches(with_prefetches) {
        for (size_t i = 0; i < kStreams; ++i) {
            stream[i] = first + i * stream_bytes;
        }
    }
    [[gnu::always_inline]] const uint8_t* at(int i, int r, int offset) const {
        return stream[i] + offset + static_cast<size_t>(r) * stride;
    }
    // Asks for what comes kStreamAhead bytes behind n_bytes of a row.
    template <size_t n_bytes> [[gnu::always_inline]] void ask_ahead(const uint8_t* bytes) const {
        if (has_prefetches) {
            const uint8_t* next = bytes + kStreamAhead;
            prefetch<n_bytes>(next);
        }
    }
};

// The outputs of a strip; y: of row 0 of the first stream.
struct StreamOutputs {
    float* y;
    int64_t y_stream;

    float& of_lane(int lane) const { return y[lane % kStreams * y_stream + lane / kStreams]; }
    Floats load() const {
        float lanes[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            lanes[i] = of_lane(i);
        }
        return load_floats(lanes);
    }
    void put(Floats acc) const {
        float lanes[kLanes];
        store(lanes, acc);
        for (int i = 0; i < kLanes; ++i) {
            of_lane(i) = lanes[i];
        }
    }
};

// Lane i of part b: the sum over part b of v[i].
[[gnu::always_inline]] inline Ints sum_quads(const Ints (&v)[kStreams]) {
    const Ints a = add_ints(interleave_low(v[0], v[1]), interleave_high(v[0], v[1]));
    const Ints b = add_ints(interleave_low(v[2], v[3]), interleave_high(v[2], v[3]));
    return add_ints(interleave_low_pairs(a, b), interleave_high_pairs(a, b));
}

// Up to kPieceChunks chunks of 256 values of all rows. Column tells how a chunk is multiplied:
//   kBytes                          of a row
//   kLayout                         of the column's records
//   Values                          a record as the weights meet it, by set(record)
//   Sums                            what rows leave of a chunk
//   sum(rows, r, at, values, sums)  row r of each stream, whose chunk begins at `at`
//   add(sums, record, acc)          acc + the chunk's part of the outputs
template <typename Column> class StreamPiece {
    static constexpr int kRecord = record_groups(Column::kLayout);

    // Beside each other: arrays of their own would lie whole pages apart, where stores look like those that loads wait
    // for.
    struct Chunk {
        typename Column::Values values;
        typename Column::Sums sums[kKeptStrips];
    };

  public:
    static constexpr size_t kKept = sizeof(Chunk) + kRecord * sizeof(int32_t); // bytes of a chunk that all rows need

    StreamPiece(const int32_t* x, int n_chunks) : x_(x), n_chunks_(n_chunks) {
        for (int c = 0; c < n_chunks; ++c) {
            chunks_[c].values.set(x + c * kRecord);
        }
    }

    // acc + a strip's outputs, where one strip is kept: a chunk is added behind the next one's last row.
    Floats add_strip(const StreamRows& rows, Floats acc) {
        for (int r = 0; r < kStreamRows; ++r) {
            for (int c = 0; c < n_chunks_; ++c) {
                sum_chunk(rows, r, c);
                if (r == kStreamRows - 1 && c > 0) {
                    acc = add_chunk(c - 1, 0, acc);
                }
            }
        }
        return add_chunk(n_chunks_ - 1, 0, acc);
    }

    // Where two are: the rows of a strip, while the one before, if there is one, is added to acc.
    Floats sum(const StreamRows& rows, bool has_before, Floats acc) {
        now_ = 1 - now_;
        int n_steps = 0, n_added = 0;
        for (int r = 0; r < kStreamRows; ++r) {
            for (int c = 0; c < n_chunks_; ++c) {
                sum_chunk(rows, r, c);
                if (++n_steps % kStreamRows == 0 && has_before) {
                    acc = add_chunk(n_added++, 1 - now_, acc);
                }
            }
        }
        return acc;
    }

    // The last strip.
    Floats add(Floats acc) const {
        for (int c = 0; c < n_chunks_; ++c) {
            acc = add_chunk(c, now_, acc);
        }
        return acc;
    }

  private:
    [[gnu::always_inline]] void sum_chunk(const StreamRows& rows, int r, int c) {
        Column::sum(rows, r, c * Column::kBytes, chunks_[c].values, chunks_[c].sums[now_]);
    }
    Floats add_chunk(int c, int strip, Floats acc) const {
        return Column::add(chunks_[c].sums[strip], x_ + c * kRecord, acc);
    }

    const int32_t* x_;
    int n_chunks_;
    Chunk chunks_[kPieceChunks];
    int now_ = 0; // whose sums are those of the strip that is read
};

// Some outputs, whole strips, of one column, whose length is whole chunks.
template <typename Column>
void multiply_in_streams(const Product& product, float* y, const Columns& columns, Outputs outputs) {
    const size_t stride = product.weight_stride;
    const int64_t n_of_stream = (outputs.last - outputs.first) / kStreams,
                  n_chunks = columns.n_values / kSuperBlockSize;
    const auto* weights = static_cast<const uint8_t*>(product.weights) + static_cast<size_t>(outputs.first) * stride;
    y += outputs.first;
    const bool has_prefetches =
        kMostKept == 0 || static_cast<size_t>(n_chunks) * StreamPiece<Column>::kKept > kMostKept;
    for (int64_t begin = 0; begin < n_chunks; begin += kPieceChunks) {
        const int64_t n = n_chunks - begin < kPieceChunks ? n_chunks - begin : kPieceChunks;
        StreamPiece<Column> piece(columns.groups + begin * record_groups(Column::kLayout), static_cast<int>(n));
        const auto acc_of = [&](int64_t row) {
            return begin == 0 ? zero_floats() : StreamOutputs{y + row, n_of_stream}.load();
        };
        for (int64_t row = 0; row < n_of_stream; row += kStreamRows) {
            const uint8_t* first = weights + static_cast<size_t>(row) * stride + begin * Column::kBytes;
            const StreamRows rows(first, stride, static_cast<size_t>(n_of_stream) * stride, has_prefetches);
            const int64_t before = row - kStreamRows;
            if constexpr (kKeptStrips == 1) {
                StreamOutputs{y + row, n_of_stream}.put(piece.add_strip(rows, acc_of(row)));
            } else if (before < 0) {
                piece.sum(rows, false, zero_floats());
            } else {
                StreamOutputs{y + before, n_of_stream}.put(piece.sum(rows, true, acc_of(before)));
            }
        }
        if (kKeptStrips == 2 && n_of_stream > 0) {
            const int64_t last = n_of_stream - kStreamRows;
            StreamOutputs{y + last, n_of_stream}.put(piece.add(acc_of(last)));
        }
    }
}

} // namespace
} // namespace dspark::kernels
