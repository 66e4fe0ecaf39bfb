// The pure mathematics without Python, for the sanitizer preset: the paths, sizes and ends that memory errors like.
// What the numbers should be is checked more widely against numpy in
// tests/test_{sampling,acceptance,sequential_head}.py.
#include "acceptance.h"
#include "check.h"
#include "confidence_head.h"
#include "follower_table.h"
#include "random.h"
#include "sampling.h"
#include "sequential_head.h"
#include "top_k.h"
#include "vector_loops.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

using namespace dspark;

namespace {

template <class Error, class F> bool throws(F f, const std::string& message) {
    try {
        f();
    } catch (const Error& error) {
        return std::string(error.what()).find(message) != std::string::npos;
    }
    return false;
}

constexpr float kInf = std::numeric_limits<float>::infinity();

// Deterministic noise, roughly normal.
std::vector<float> noise(size_t n, uint64_t seed) {
    const RandomStream random(seed);
    std::vector<float> out(n);
    for (size_t i = 0; i < n; ++i) {
        double sum = -6.0;
        for (uint64_t k = 0; k < 12; ++k) {
            sum += random.draft_sample(i - k, i);
        }
        out[i] = static_cast<float>(sum);
    }
    return out;
}

double sum_of(const Distribution& d) {
    double sum = 0.0;
    for (const float p : d.probs) {
        sum += static_cast<double>(p);
    }
    return sum;
}

bool is_ascending(const std::vector<int32_t>& ids) {
    for (size_t i = 1; i < ids.size(); ++i) {
        if (ids[i - 1] >= ids[i]) {
            return false;
        }
    }
    return true;
}

void test_random() {
    const RandomStream::Block zero = RandomStream::philox({0, 0, 0, 0}, 0);
    CHECK(zero == RandomStream::Block{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
    const RandomStream random(42);
    std::set<double> seen;
    double mean = 0.0;
    for (uint64_t position = 1; position <= 1000; ++position) {
        for (const double u :
             {random.target_sample(position), random.residual(position), random.draft_sample(position - 1, position),
              random.accept_test(position - 1, position)}) {
            CHECK(u >= 0.0 && u < 1.0);
            seen.insert(u);
            mean += u / 4000.0;
        }
    }
    CHECK(seen.size() == 4000);
    CHECK(std::fabs(mean - 0.5) < 0.02); // standard error 0.0046
}

void test_distributions() {
    DistributionBuilder builder;
    Distribution out;
    const TokenCounts none;
    for (const size_t n :
         {1u, 2u, 15u, 16u, 17u, 1023u, 1024u, 1025u, 5000u, 8u}) { // growing and shrinking: stale buffers
        const auto logits = noise(n, n);
        for (const Truncation truncation :
             {Truncation{}, Truncation{0.0f}, Truncation{1.0f, 3}, Truncation{0.7f, 0, 0.9f},
              Truncation{1.5f, 0, 1.0f, 0.1f}, Truncation{1.0f, 5000, 0.5f, 0.01f}}) {
            builder.truncated_distribution(logits, truncation, out);
            CHECK(out.ids.size() == out.probs.size() && !out.ids.empty());
            CHECK(is_ascending(out.ids) && out.ids.front() >= 0 && static_cast<size_t>(out.ids.back()) < n);
            CHECK(std::fabs(sum_of(out) - 1.0) < 1e-5);
            for (const double u : {0.0, 0.5, 0x1.fffffffffffffp-1}) {
                CHECK(out.prob(sample(out, u)) > 0.0f);
            }
            CHECK(out.prob(-1) == 0.0f && out.prob(static_cast<int32_t>(n)) == 0.0f);
        }
    }
    SamplingOptions options;
    options.logit_bias = {{7, 100.0f}};
    CHECK(builder.argmax_token(noise(8, 3), options, none) == 7);
    const std::vector<float> forbidden(40, -kInf);
    CHECK(throws<std::runtime_error>([&] { builder.truncated_distribution(forbidden, {}, out); }, "finite value"));
    const std::vector<float> bad = {0.0f, std::numeric_limits<float>::quiet_NaN()};
    CHECK(throws<std::runtime_error>([&] { builder.truncated_distribution(bad, {}, out); }, "NaN"));
    CHECK(throws<std::runtime_error>([&] { builder.truncated_distribution({}, {}, out); }, "finite value"));
    CHECK(throws<std::runtime_error>([&] { (void)sample({}, 0.5); }, "positive probability"));
}

void test_selection() {
    DistributionBuilder builder;
    Candidates out;
    auto logits = noise(20000, 9);
    logits[19999] = 50.0f;
    logits[3] = 50.0f;
    builder.select_top_k(logits, 64, out);
    CHECK(out.ids.size() == 64 && out.ids[0] == 3 && out.ids[1] == 19999);
    builder.select_top_k(logits, 30000, out);
    CHECK(out.ids.size() == 20000);
    builder.select_top_k(logits, 0, out);
    CHECK(out.ids.empty());
    const std::vector<float> ties(3000, 1.0f);
    builder.select_top_k(ties, 10, out);
    CHECK(out.ids.front() == 0 && out.ids.back() == 9);
    builder.select_candidates(logits, 64, out);
    CHECK(out.ids.size() == 64 && is_ascending(out.ids) && out.ids[0] == 3 && out.ids.back() == 19999);
    // Sums that overflow are no infinite logits; real ones are found in every place.
    std::vector<float> huge(130, 3e38f);
    builder.select_candidates(huge, 5, out);
    CHECK(out.ids.size() == 5 && out.ids.back() == 4);
    for (const size_t at : {0u, 63u, 64u, 127u, 128u, 129u}) {
        for (const float bad : {kInf, std::numeric_limits<float>::quiet_NaN()}) {
            std::vector<float> row(130, -kInf);
            row[1] = 0.0f;
            row[at] = bad;
            CHECK(throws<std::runtime_error>([&] { builder.select_candidates(row, 5, out); }, "NaN or +inf"));
        }
    }
    CHECK(throws<std::invalid_argument>([&] { (void)top_logprobs(ties, 3000, 1); }, "below n_vocab 3000"));
    CHECK(std::fabs(top_logprobs(ties, 5, 2).chosen + std::log(3000.0f)) < 1e-5f);
}

// Against a plain sort: ties, -inf, extremes, lengths around the groups' ends.
void test_top_rows() {
    for (const size_t n : {1, 63, 64, 65, 300, 4097, 40000}) {
        for (const float step : {1e3F, 1.0F, 1e-6F}) { // all tied, many, none
            std::vector<float> row = noise(n, n);
            std::ranges::transform(row, row.begin(), [&](float value) { return step * std::round(value / step); });
            for (size_t i = 0; i < n; i += 7) {
                row[i] = i % 2 == 0 ? -kInf : std::numeric_limits<float>::lowest();
            }
            row[n - 1] = std::numeric_limits<float>::max();
            row[n / 2] = -0.0F;
            std::vector<Ranked> sorted;
            for (size_t i = 0; i < n; ++i) {
                if (row[i] > -kInf) {
                    sorted.push_back({row[i], static_cast<int32_t>(i)});
                }
            }
            std::sort(sorted.begin(), sorted.end(), ranks_before);
            for (const int32_t k : {1, 16, 64, 256, 5000}) {
                std::vector<Ranked> expected(sorted.begin(),
                                             sorted.begin() + std::min<std::ptrdiff_t>(k, std::ssize(sorted)));
                std::ranges::sort(expected, {}, &Ranked::id);
                TopSearch search;
                CHECK(search.scan(row));
                CHECK(search.largest() == sorted.front().weight);
                const std::span<const Ranked> found = search.top(k);
                const auto is_same = [](const Ranked& a, const Ranked& b) {
                    return a.id == b.id && a.weight == b.weight;
                };
                CHECK(std::ranges::equal(found, expected, is_same));
            }
        }
    }
}

void test_top_rows_by_parts() {
    constexpr int64_t kRows = 5;
    constexpr int64_t kValues = 700;
    constexpr int64_t kStride = 720;
    constexpr int32_t kTop = 20;
    std::vector<float> rows = noise(kRows * kStride, 3);
    rows[3 * kStride + 11] = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(rows.begin() + 4 * kStride, kValues, -kInf);
    rows[4 * kStride + 5] = 1.0F;
    TopSearch search;
    std::array<int64_t, kValues> reduced{};
    for (size_t i = 0; i < reduced.size(); ++i) {
        reduced[i] = 3 * static_cast<int64_t>(i) + 1;
    }
    for (const int n_parts : {1, 2, 3, 9}) {
        const int64_t* names = n_parts % 2 == 0 ? reduced.data() : nullptr;
        std::vector<Ranked> out(kRows * (kTop + 1), {-7.0F, -7});
        for (int part = 0; part < n_parts; ++part) {
            top_rows({rows.data(), kStride, kRows, kValues, kTop, names, out.data()}, part, n_parts);
        }
        for (int64_t row = 0; row < kRows; ++row) {
            const Ranked* of_row = out.data() + row * (kTop + 1);
            const bool is_valid = search.scan(std::span(rows).subspan(static_cast<size_t>(row * kStride), kValues));
            CHECK(is_valid == (row != 3));
            CHECK(of_row->id == (row == 3 ? -1 : row == 4 ? 1 : kTop));
            const std::span<const Ranked> found = is_valid ? search.top(kTop) : std::span<const Ranked>{};
            for (size_t i = 0; i < found.size(); ++i) {
                const int32_t id = names == nullptr ? found[i].id : 3 * found[i].id + 1;
                CHECK(of_row[1 + i].id == id && of_row[1 + i].weight == found[i].weight);
            }
        }
    }
}

void test_kth_largest() {
    std::vector<int32_t> scratch;
    for (const size_t n : {1, 2, 15, 16, 100, 1000}) {
        for (const float step : {100.0F, 1.0F, 1e-6F}) { // all tied, many, none
            std::vector<float> x = noise(n, 5);
            std::ranges::transform(x, x.begin(), [&](float value) { return step * std::round(value / step); });
            x[n / 2] = -kInf;
            x[n / 3] = -0.0F;
            std::vector<float> sorted = x;
            std::sort(sorted.rbegin(), sorted.rend());
            for (size_t k = 1; k <= n; k += 1 + n / 7) {
                CHECK(kth_largest(x, k, scratch) == sorted[k - 1]);
            }
            CHECK(kth_largest(x, n, scratch) == sorted[n - 1]);
        }
    }
    CHECK(kth_largest(std::vector<float>(40, -kInf), 7, scratch) == -kInf);
}

void test_counts() {
    TokenCounts counts;
    counts.push_prompt(3);
    counts.push_output(3);
    counts.push_output(900000);
    counts.pop_output(900000);
    CHECK(counts.entries().size() == 2 && counts.find(3)->n_prompt == 1 && counts.find(3)->n_output == 1);
    CHECK(counts.find(4) == nullptr && counts.find(900000)->n_output == 0);
    CHECK(throws<std::logic_error>([&] { counts.pop_output(900000); }, "900000"));
    SamplingOptions options;
    options.presence_penalty = 1.0f;
    std::vector<float> logits(8, 1.0f); // 900000 lies outside and must be left alone
    adjust_logits(logits, options, counts);
    CHECK(logits[3] == 0.0f && logits[4] == 1.0f);
    CHECK(adjust_logit(1.0f, 3, options, counts) == 0.0f && adjust_logit(1.0f, 5, options, counts) == 1.0f);
}

// Every rule, with rows in ascending order, at most once, and a result within the prefix.
void test_verification() {
    constexpr int32_t kVocab = 8;
    DistributionBuilder builder;
    std::array<int64_t, kVocab> counts{};
    Distribution first;
    for (uint64_t seed = 0; seed < 3000; ++seed) {
        for (const auto rule : {Verification::exact, Verification::rejection, Verification::block}) {
            const size_t n = seed % 5;
            std::vector<Distribution> draft(n);
            std::vector<Distribution> target(n + 1);
            std::vector<int32_t> tokens;
            const RandomStream random(seed);
            for (size_t k = 0; k < n; ++k) {
                builder.truncated_distribution(noise(kVocab, 100 + k), {1.0f, 5}, draft[k]);
                tokens.push_back(sample(draft[k], random.draft_sample(10, 11 + k)));
            }
            for (size_t k = 0; k <= n; ++k) {
                builder.truncated_distribution(noise(kVocab, 200 + k), {1.0f, 6}, target[k]);
            }
            int32_t next_row = 0;
            const auto result = verify(rule, {tokens, draft, 10, random}, [&](int32_t row) -> const Distribution& {
                CHECK(row == next_row++);
                return target[static_cast<size_t>(row)];
            });
            const auto accepted = static_cast<size_t>(result.n_accepted);
            CHECK(accepted <= n && next_row > result.n_accepted);
            CHECK(target[accepted].prob(result.next_token) > 0.0f);
            first = target[0];
            counts[static_cast<size_t>(accepted > 0 ? tokens[0] : result.next_token)] += 1;
        }
    }
    for (int32_t id = 0; id < kVocab; ++id) { // 9000 draws: four standard errors are at most 0.021
        const double share = static_cast<double>(counts[static_cast<size_t>(id)]) / 9000.0;
        CHECK(std::fabs(share - static_cast<double>(first.prob(id))) < 0.021);
    }
    const std::vector<int32_t> foreign = {7};
    Distribution certain;
    certain.assign_single(2);
    const std::vector<Distribution> draft = {certain};
    const auto row = [&](int32_t) -> const Distribution& { return certain; };
    CHECK(throws<std::invalid_argument>([&] { (void)verify(Verification::block, {foreign, draft}, row); }, "token 7"));
    CHECK(throws<std::invalid_argument>([&] { (void)verify(Verification::rejection, {foreign, {}}, row); },
                                        "got 0 for 1"));
    CHECK(verify_exact(foreign, [](int32_t) { return 7; }).n_accepted == 1);
}

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
    test_random();
    test_distributions();
    test_selection();
    test_kth_largest();
    test_top_rows();
    test_top_rows_by_parts();
    test_counts();
    test_verification();
    test_heads();
    test_followers();
    test_followers_of_frequent_tokens();
    return check_summary();
}
