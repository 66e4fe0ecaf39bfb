// Masked requests on toy models: no forbidden token ever, the law that masked_sampling.h states whatever is drafted,
// the same greedy text with and without drafts.
#include "check.h"
#include "engine.h"
#include "toy_models.h"

#include <cmath>
#include <map>
#include <memory>
#include <stdexcept>

using namespace dspark;

namespace {

// Forbids every token that makes a multiple of 3 with the one before it.
class SumMask final : public TokenMask {
  public:
    explicit SumMask(int32_t last) : path_{last} {}
    [[nodiscard]] std::unique_ptr<TokenMask> clone() const override { return std::make_unique<SumMask>(path_.back()); }
    void check(std::span<const int32_t> ids, std::span<uint8_t> is_allowed) const override {
        for (size_t i = 0; i < ids.size(); ++i) {
            is_allowed[i] = allows(path_.back(), ids[i]) ? 1 : 0;
        }
    }
    void push(int32_t token) override { path_.push_back(checked(token)); }
    void pop() override { path_.pop_back(); }
    void commit(int32_t token) override {
        if (path_.size() != 1) {
            throw std::logic_error("commit must find nothing pushed");
        }
        path_.back() = checked(token);
    }
    static bool allows(int32_t last, int32_t token) { return (last + token) % 3 != 0; }

  private:
    [[nodiscard]] int32_t checked(int32_t token) const {
        if (!allows(path_.back(), token)) {
            throw std::logic_error("a forbidden token must not be pushed");
        }
        return token;
    }
    std::vector<int32_t> path_;
};

const std::vector<int32_t> kPrompt = {2, 5};

RequestOptions masked_options(float temperature, int32_t top_k, uint64_t seed, int32_t max_tokens) {
    RequestOptions options;
    options.max_tokens = max_tokens;
    options.ignore_eos = true;
    options.sampling.temperature = temperature;
    options.sampling.top_k = top_k;
    options.sampling.seed = seed;
    options.mask = std::make_shared<SumMask>(kPrompt.back());
    return options;
}

std::map<uint64_t, std::vector<int32_t>> run_all(int32_t draft_length, const std::vector<RequestOptions>& requests) {
    EngineOptions options;
    options.n_parallel = 8;
    options.max_queue = static_cast<int32_t>(requests.size());
    std::unique_ptr<toy::Drafter> drafter = draft_length > 0 ? std::make_unique<toy::Drafter>(4) : nullptr;
    SchedulerOptions scheduler;
    scheduler.policy = {Policy::Kind::fixed, draft_length, 0};
    scheduler.block_size = drafter ? 4 : 0;
    Engine engine(std::make_unique<toy::Target>(), std::move(drafter), std::make_unique<Scheduler>(scheduler), options);
    for (const RequestOptions& request : requests) {
        (void)engine.submit(kPrompt, request);
    }
    std::map<uint64_t, std::vector<int32_t>> texts;
    while (engine.has_work()) {
        for (const Event& event : engine.step()) {
            CHECK(event.error.empty());
            std::vector<int32_t>& text = texts[event.request_id];
            text.insert(text.end(), event.tokens.begin(), event.tokens.end());
        }
    }
    return texts;
}

// The stated law, computed over the whole table: truncate, take the forbidden out, renormalise; with nothing left,
// truncate what is allowed.
std::array<double, toy::kVocab> law(int32_t before, int32_t last, float temperature, int32_t top_k) {
    toy::Logits logits = toy::table(before, last, 0.0F);
    DistributionBuilder builder;
    Distribution d;
    std::array<double, toy::kVocab> probs{};
    double mass = 0;
    for (int attempt = 0; attempt < 2 && mass <= 0; ++attempt) {
        builder.truncated_distribution(logits, Truncation{temperature, top_k, 1.0F, 0.0F}, d);
        for (int32_t token = 0; token < toy::kVocab; ++token) {
            probs[static_cast<size_t>(token)] = SumMask::allows(last, token) ? static_cast<double>(d.prob(token)) : 0.0;
            mass += probs[static_cast<size_t>(token)];
            if (!SumMask::allows(last, token)) {
                logits[static_cast<size_t>(token)] = -INFINITY;
            }
        }
    }
    for (double& prob : probs) {
        prob /= mass;
    }
    return probs;
}

double law_chi_square(int32_t draft_length, float temperature, int32_t top_k, int32_t n_requests) {
    std::vector<RequestOptions> requests;
    for (int32_t i = 0; i < n_requests; ++i) {
        requests.push_back(masked_options(temperature, top_k, static_cast<uint64_t>(i) * 7919 + 13, 3 + i % 3));
    }
    std::map<std::array<int32_t, 3>, double> counts;
    for (const auto& [id, text] : run_all(draft_length, requests)) {
        counts[{text[0], text[1], text[2]}] += 1;
    }
    double chi = 0;
    double pooled = 0;
    double pooled_count = 0;
    int degrees = -1;
    double seen = 0;
    for (int32_t cell = 0; cell < 512; ++cell) {
        const int32_t a = cell / 64;
        const int32_t b = cell / 8 % 8;
        const int32_t c = cell % 8;
        const double prob = law(2, 5, temperature, top_k)[static_cast<size_t>(a)] *
                            law(5, a, temperature, top_k)[static_cast<size_t>(b)] *
                            law(a, b, temperature, top_k)[static_cast<size_t>(c)];
        const auto found = counts.find({a, b, c});
        const double count = found == counts.end() ? 0 : found->second;
        CHECK(prob > 0 || count == 0);
        seen += prob > 0 ? count : 0;
        const double expected = n_requests * prob;
        if (expected < 10) {
            pooled += expected;
            pooled_count += count;
            continue;
        }
        chi += (count - expected) * (count - expected) / expected;
        ++degrees;
    }
    if (pooled > 1) {
        chi += (pooled_count - pooled) * (pooled_count - pooled) / pooled;
        ++degrees;
    }
    CHECK(seen == n_requests);
    // A single cell must hold everything; else about standard normal for many degrees of freedom.
    return degrees < 1 ? chi : (chi - degrees) / std::sqrt(2.0 * degrees);
}

void test_text_follows_the_masked_law() {
    for (const int32_t draft_length : {0, 4}) {
        for (const int32_t top_k : {0, 4, 3, 2}) {
            // About standard normal: 4.5 is passed by chance once in 10^5 runs, and the seeds are fixed.
            CHECK(law_chi_square(draft_length, 1.3F, top_k, 20000) < 4.5);
        }
    }
}

void test_greedy_text_keeps_to_the_mask() {
    const auto plain = run_all(0, {masked_options(0, 0, 1, 40)});
    const auto drafted = run_all(4, {masked_options(0, 0, 1, 40)});
    CHECK(plain == drafted);
    int32_t last = kPrompt.back();
    for (const int32_t token : plain.begin()->second) {
        CHECK(SumMask::allows(last, token));
        last = token;
    }
}

void test_masked_requests_are_verified_exactly() {
    RequestOptions options = masked_options(1, 0, 1, 4);
    CHECK(options.rule() == Verification::exact);
    options.verification = Verification::block;
    CHECK_THROWS(options.validate(), std::invalid_argument);
}

} // namespace

int main() {
    test_text_follows_the_masked_law();
    test_greedy_text_keeps_to_the_mask();
    test_masked_requests_are_verified_exactly();
    return check_summary();
}
