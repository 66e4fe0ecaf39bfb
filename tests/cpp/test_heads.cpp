// Sequential heads and lists of followers without Python, for the sanitizer preset. What the numbers should be is
// checked more widely against numpy in tests/test_sequential_head.py.
#include "check.h"
#include "confidence_head.h"
#include "follower_table.h"
#include "noise.h"
#include "sequential_head.h"
#include "vector_loops.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

using namespace dspark;

namespace {

// bf16 rows: the decoder is injected, so any storage type must do.
void decode_bf16(const void* src, float* dst, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        uint16_t bits = 0;
        std::memcpy(&bits, static_cast<const char*>(src) + 2 * i, sizeof(bits));
        dst[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    }
}

struct Table {
    std::vector<uint16_t> values;
    RowTable view;

    Table(int64_t n_rows, int64_t n_cols, uint64_t seed) {
        for (const float x : noise(static_cast<size_t>(n_rows * n_cols), seed)) {
            values.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16));
        }
        view = {reinterpret_cast<const std::byte*>(values.data()), static_cast<size_t>(n_cols) * 2, n_rows, n_cols,
                &decode_bf16};
    }
};

void test_heads() {
    constexpr int64_t kVocab = 300;
    constexpr int64_t kHidden = 37;
    constexpr int64_t kRank = 11;
    const Table w1(kVocab, kRank, 1);
    const Table w2(kVocab, kRank, 2);
    const Table gate(kRank, kHidden + kRank, 3);
    const Table joint(3 * kRank, 2 * kRank + kHidden, 4);
    std::vector<std::vector<float>> rows;
    std::vector<std::vector<float>> states;
    std::vector<const float*> row_pointers;
    std::vector<const float*> state_pointers;
    for (uint64_t k = 0; k < 7; ++k) {
        row_pointers.push_back(rows.emplace_back(noise(kVocab, 10 + k)).data());
        state_pointers.push_back(states.emplace_back(noise(kHidden, 20 + k)).data());
    }
    for (const auto type :
         {MarkovHeadType::none, MarkovHeadType::vanilla, MarkovHeadType::gated, MarkovHeadType::rnn}) {
        HeadWeights weights;
        weights.type = type;
        weights.n_vocab = kVocab;
        weights.hidden_size = kHidden;
        weights.rank = kRank;
        weights.w1 = w1.view;
        weights.w2 = w2.view;
        weights.gate = gate.view;
        weights.joint = joint.view;
        weights.logit_softcap = 6.0f;
        weights.confidence.emplace(noise(kHidden + kRank, 5), 0.1f, kHidden, kRank);
        TokenCounts counts;
        SamplingOptions options;
        options.frequency_penalty = 0.5f;
        BlockInput input;
        input.base_logits = row_pointers;
        input.hidden = state_pointers;
        input.start = 4;
        input.sampling = &options;
        input.counts = &counts;
        const std::vector<BlockInput> inputs = {input, input};
        std::vector<BlockDraft> full(2);
        std::vector<BlockDraft> candidates(2);
        make_full_head(weights)->draft_blocks(inputs, full);
        const auto head = make_candidate_head(weights, kVocab);
        head->draft_blocks(inputs, candidates);
        CHECK(full[0].tokens == candidates[0].tokens && full[1].tokens == full[0].tokens);
        CHECK(full[0].tokens.size() == 7 && full[0].confidence_logits == candidates[1].confidence_logits);
        for (const auto& entry : counts.entries()) { // drafted tokens were popped again
            CHECK(entry.n_output == 0);
        }
        BlockInput broken = input;
        const std::vector<float> nan_row(kVocab, std::numeric_limits<float>::quiet_NaN());
        row_pointers[3] = nan_row.data();
        CHECK(throws<std::runtime_error>([&] { head->draft_blocks({&broken, 1}, {candidates.data(), 1}); }, "NaN"));
        row_pointers[3] = rows[3].data();
        for (const auto& entry : counts.entries()) { // on the way out of an error too
            CHECK(entry.n_output == 0);
        }
        broken.anchor = kVocab;
        CHECK(
            throws<std::invalid_argument>([&] { head->draft_blocks({&broken, 1}, {candidates.data(), 1}); }, "anchor"));
        CHECK(
            throws<std::invalid_argument>([&] { head->draft_blocks(inputs, {candidates.data(), 1}); }, "drafts must"));
    }
    CHECK(throws<std::invalid_argument>([] { ConfidenceHead({1.0f}, 0.0f, 37, 11); }, "must be 37 or 48, got 1"));
}

// Lists made row by row, and by a product of many rows at once, against a sort of all B; more rows than one product
// has.
void test_followers() {
    constexpr int64_t kVocab = 2500;
    constexpr int64_t kRows = 2300;
    constexpr int64_t kRank = 8;
    constexpr int32_t kFollowers = 16;
    const Table w1(kVocab, kRank, 1);
    const Table w2(kRows, kRank, 2);
    HeadWeights weights;
    weights.type = MarkovHeadType::vanilla;
    weights.n_vocab = kVocab;
    weights.rank = kRank;
    weights.w1 = w1.view;
    weights.w2 = w2.view;
    for (int64_t row = 0; row < kRows; ++row) {
        weights.d2t.push_back(kVocab - 1 - row);
    }
    static int32_t n_products = 0;
    HeadWeights fast = weights;
    fast.w2.dot_rows = [](const RowTable& table, const std::byte* rows, int64_t n_rows, const float* x,
                          int64_t n_vectors, float* y) {
        ++n_products;
        for (int64_t v = 0; v < n_vectors; ++v) {
            for (int64_t i = 0; i < n_rows; ++i) {
                std::vector<float> row(static_cast<size_t>(table.n_cols));
                table.decode_row(rows + static_cast<size_t>(i) * table.row_bytes, row.data(), table.n_cols);
                y[v * n_rows + i] = dot(row.data(), x + v * table.n_cols, row.size());
            }
        }
        return true;
    };
    const FollowerTable by_rows(weights, kFollowers);
    const FollowerTable by_products(fast, kFollowers);
    CHECK(n_products > 2);
    std::vector<float> embedding(kRank);
    std::vector<float> row(kRank);
    for (const int32_t token : {0, 1, 1023, 1024, 2499}) {
        w1.view.decode(token, embedding.data());
        std::vector<std::pair<float, int32_t>> biases;
        for (int64_t r = 0; r < kRows; ++r) {
            w2.view.decode(r, row.data());
            biases.emplace_back(-dot(row.data(), embedding.data(), kRank), kVocab - 1 - r);
        }
        std::sort(biases.begin(), biases.end());
        std::vector<int32_t> expected;
        for (int32_t i = 0; i < kFollowers; ++i) {
            expected.push_back(biases[static_cast<size_t>(i)].second);
        }
        std::sort(expected.begin(), expected.end());
        for (const FollowerTable* table : {&by_rows, &by_products}) {
            const std::span<const int32_t> found = table->find(token);
            CHECK(std::equal(found.begin(), found.end(), expected.begin(), expected.end()));
        }
    }
}

// Lists that take longer than the constructor may are made for tokens met again and again, not for passers-by.
void test_followers_of_frequent_tokens() {
    constexpr int64_t kVocab = 25000;
    constexpr int64_t kRank = 4096;
    static const std::vector<float> row(kRank, 0.5F);
    HeadWeights weights;
    weights.type = MarkovHeadType::vanilla;
    weights.n_vocab = kVocab;
    weights.rank = kRank;
    weights.w1 = {reinterpret_cast<const std::byte*>(row.data()), 0, kVocab, kRank, // every row the same one
                  [](const void* source, float* out, int64_t n) {
                      std::memcpy(out, source, static_cast<size_t>(n) * sizeof(float));
                  }};
    weights.w2 = weights.w1;
    weights.w2.dot_rows = [](const RowTable&, const std::byte*, int64_t n_rows, const float*, int64_t n_vectors,
                             float* y) {
        for (int64_t v = 0; v < n_vectors; ++v) {
            for (int64_t i = 0; i < n_rows; ++i) {
                y[v * n_rows + i] = static_cast<float>(i % 7);
            }
        }
        return true;
    };
    FollowerTable table(weights, 16);
    CHECK(table.knows(0) && !table.knows(20000) && table.find(20000).empty());
    const auto meet = [&](int32_t token, int32_t n_blocks) {
        for (int32_t i = 0; i < n_blocks; ++i) {
            table.want(token);
            table.end_block();
        }
    };
    meet(20001, 2);
    for (int32_t other = 10000; other < 10200; ++other) {
        meet(other, 1);
    }
    CHECK(!table.knows(20001) && !table.knows(10000)); // 25,000 rows: two meetings are not enough
    meet(20001, 1);
    CHECK(!table.knows(20001)); // 102 million weights: 256 blocks between
    meet(20002, 60);
    CHECK(table.knows(20001) && table.knows(20002) && !table.knows(10000));
    const std::span<const int32_t> found = table.find(20001);
    CHECK(found.size() == 16 && std::ranges::is_sorted(found) && found[0] == 6 && found[1] == 13);
}

} // namespace

int main() {
    test_heads();
    test_followers();
    test_followers_of_frequent_tokens();
    return check_summary();
}
