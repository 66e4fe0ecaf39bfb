// Random streams, distributions, selection, counts and the verification rules without Python, for the sanitizer preset:
// the paths, sizes and ends that memory errors like. What the numbers should be is checked more widely against numpy in
// tests/test_{sampling,acceptance}.py.
#include "acceptance.h"
#include "check.h"
#include "noise.h"
#include "random.h"
#include "sampling.h"

#include <array>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

using namespace dspark;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

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

} // namespace

int main() {
    test_random();
    test_distributions();
    test_selection();
    test_counts();
    test_verification();
    return check_summary();
}
