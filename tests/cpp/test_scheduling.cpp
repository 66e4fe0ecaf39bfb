// Scheduling on the engine loses nothing: the counterexample of the paper's appendix A, and the output's law under
// every policy, rule and temperature, requests of different policies side by side. Costs are set, models are toys.
#include "check.h"
#include "cost_measure.h"
#include "engine.h"
#include "errors.h"
#include "toy_models.h"

#include <cmath>
#include <map>
#include <memory>
#include <string>

using namespace dspark;

namespace {

RequestOptions sampling(Verification rule, float temperature, uint64_t seed, int32_t max_tokens) {
    RequestOptions options;
    options.sampling.temperature = temperature;
    options.sampling.seed = seed;
    options.verification = rule;
    options.max_tokens = max_tokens;
    options.ignore_eos = true;
    return options;
}

// With costs, these hold in every step, whatever passes really take.
std::map<uint64_t, std::vector<int32_t>> texts_of(Engine& engine, const CostCurves* costs = nullptr) {
    std::map<uint64_t, std::vector<int32_t>> texts;
    while (engine.has_work()) {
        if (costs != nullptr) {
            engine.set_costs(*costs);
        }
        for (const Event& event : engine.step()) {
            auto& text = texts[event.request_id];
            text.insert(text.end(), event.tokens.begin(), event.tokens.end());
        }
    }
    return texts;
}

// ---- appendix A ----

// p^t = (0.7, 0.3) everywhere.
class CoinTarget final : public dspark::Target {
  public:
    [[nodiscard]] int32_t n_vocab() const override { return 2; }
    [[nodiscard]] bool is_end_of_generation(int32_t) const override { return false; }
    void decode(std::span<const BatchRow> rows) override { last_ = rows.back().position; }
    [[nodiscard]] std::span<const float> logits(int32_t) override { return logits_; }
    void remove(int32_t, int32_t begin) override { last_ = std::min(last_, begin - 1); }
    [[nodiscard]] int32_t last_position(int32_t) const override { return last_; }

  private:
    std::array<float, 2> logits_{std::log(0.7F), std::log(0.3F)};
    int32_t last_ = -1;
};

// p^d = (0.5, 0.5); c_1 = 0.8, c_2 = 0.9 after x_1 = 0 and 0 after x_1 = 1. `anticipates`: c_1 knows x_1 as well, as a
// search over the finished block would: what no drafter does, and no policy may do with c_2.
class CoinDrafter final : public Drafter {
  public:
    explicit CoinDrafter(bool anticipates) : anticipates_(anticipates) {}
    [[nodiscard]] int32_t block_size() const override { return 2; }
    [[nodiscard]] bool has_confidence() const override { return true; }
    void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) override {
        for (size_t i = 0; i < tasks.size(); ++i) {
            const auto start = static_cast<uint64_t>(tasks[i].start);
            drafts[i].probs.assign(2, {});
            drafts[i].tokens.clear();
            for (uint64_t k = 0; k < 2; ++k) {
                drafts[i].probs[k].ids = {0, 1};
                drafts[i].probs[k].probs = {0.5F, 0.5F};
                drafts[i].tokens.push_back(tasks[i].random.draft_sample(start, start + 1 + k) < 0.5 ? 0 : 1);
            }
            const bool is_good = drafts[i].tokens[0] == 0;
            const float second = is_good ? std::log(9.0F) : -20.0F;
            drafts[i].confidence_logits = {anticipates_ ? second : std::log(4.0F), second};
        }
    }
    void inject(std::span<const ContextRow> rows) override { last_ = rows.back().position; }
    void remove(int32_t, int32_t) override { last_ = -1; } // nothing is reused here: always all of it
    [[nodiscard]] int32_t last_position(int32_t) const override { return last_; }

  private:
    bool anticipates_;
    int32_t last_ = -1;
};

struct CoinResult {
    double zeros = 0;    // how often the round's first token is 0
    double verified = 0; // how often its first draft was verified
};

// A fresh engine for every trial, so that nothing is learned from one to the next.
CoinResult toss(const Policy& policy, Verification rule, bool anticipates, int32_t n_trials) {
    CoinResult result;
    for (int32_t trial = 0; trial < n_trials; ++trial) {
        SchedulerOptions scheduler;
        scheduler.policy = policy;
        scheduler.block_size = 2;
        scheduler.costs.verify = {{1, 1.0}, {2, 1 / 0.5}, {3, 1 / 0.45}};
        scheduler.costs.draft = {{1, 0.0}};
        scheduler.calibration = {{rule, 1.0, {1.0, 1.0}, {0.8, 0.9}, {}, {}}};
        Engine engine(std::make_unique<CoinTarget>(), std::make_unique<CoinDrafter>(anticipates),
                      std::make_unique<Scheduler>(scheduler), {});
        (void)engine.submit({0}, sampling(rule, 1.0F, static_cast<uint64_t>(trial), 4));
        (void)engine.step(); // the prompt
        const std::vector<Event> events = engine.step();
        result.zeros += events.at(0).tokens.at(0) == 0 ? 1.0 / n_trials : 0.0;
        result.verified += engine.stats().n_scheduled > 0 ? 1.0 / n_trials : 0.0;
    }
    return result;
}

void test_counterexample_of_appendix_a() {
    constexpr int32_t kTrials = 4000;
    const double tolerance = 4.5 * std::sqrt(0.7 * 0.3 / kTrials);
    for (const Verification rule : {Verification::exact, Verification::rejection, Verification::block}) {
        for (const char* name :
             {"off", "fixed:1", "fixed:2", "threshold:0.5", "threshold:0.85", "algorithm1", "adaptive"}) {
            const CoinResult result = toss(parse_policy(name), rule, false, kTrials);
            CHECK(std::abs(result.zeros - 0.7) < tolerance);
            if (std::string(name) == "adaptive") { // does speculate; all of c_2 is looked at only where that is free
                CHECK(rule == Verification::exact ? std::abs(result.verified - 0.5) < 0.05 : result.verified > 0.999);
            }
        }
    }
    for (const Verification rule : {Verification::rejection, Verification::block}) {
        const CoinResult naive = toss(parse_policy("threshold:0.5"), rule, true, kTrials);
        CHECK(std::abs(naive.zeros - 0.85) < tolerance);
    }
}

// ---- the law of the output ----

// Confidences that depend on the token before, as a real head's do.
class ConfidentDrafter final : public Drafter {
  public:
    [[nodiscard]] int32_t block_size() const override { return toy_.block_size(); }
    [[nodiscard]] bool has_confidence() const override { return true; }
    void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) override {
        toy_.draft(tasks, drafts);
        for (size_t i = 0; i < tasks.size(); ++i) {
            int32_t before = tasks[i].anchor;
            for (const int32_t token : drafts[i].tokens) {
                drafts[i].confidence_logits.push_back(before % 2 == 0 ? 2.5F : -1.0F);
                before = token;
            }
        }
    }
    void inject(std::span<const ContextRow> rows) override { toy_.inject(rows); }
    void remove(int32_t sequence, int32_t begin) override { toy_.remove(sequence, begin); }
    [[nodiscard]] int32_t last_position(int32_t sequence) const override { return toy_.last_position(sequence); }

  private:
    toy::Drafter toy_{4};
};

std::array<double, toy::kVocab> softmax(const toy::Logits& logits, double temperature) {
    std::array<double, toy::kVocab> law{};
    double sum = 0;
    for (size_t i = 0; i < law.size(); ++i) {
        law[i] = std::exp(static_cast<double>(logits[i]) / temperature);
        sum += law[i];
    }
    for (double& p : law) {
        p /= sum;
    }
    return law;
}

constexpr int32_t kPrompt = 3;
constexpr size_t kPairs = static_cast<size_t>(toy::kVocab) * toy::kVocab;

// Law of the second and third token after the prompt.
std::array<double, kPairs> law_of_pairs(double temperature) {
    std::array<double, kPairs> law{};
    const auto first = softmax(toy::table(0, kPrompt, 0), temperature);
    for (int32_t a = 0; a < toy::kVocab; ++a) {
        const auto second = softmax(toy::table(kPrompt, a, 0), temperature);
        for (int32_t b = 0; b < toy::kVocab; ++b) {
            const auto third = softmax(toy::table(a, b, 0), temperature);
            for (int32_t c = 0; c < toy::kVocab; ++c) {
                law[static_cast<size_t>(b * toy::kVocab + c)] +=
                    first[static_cast<size_t>(a)] * second[static_cast<size_t>(b)] * third[static_cast<size_t>(c)];
            }
        }
    }
    return law;
}

// Chi-square as standard normal deviations (Wilson and Hilferty); cells expected less than 5 times are one.
double deviation(const std::array<int32_t, kPairs>& counts, const std::array<double, kPairs>& law, int32_t n) {
    double chi = 0;
    double rest_expected = 0;
    double rest = 0;
    int32_t n_cells = 0;
    const auto add = [&](double count, double expected) {
        chi += (count - expected) * (count - expected) / expected;
        ++n_cells;
    };
    for (size_t i = 0; i < kPairs; ++i) {
        if (law[i] * n < 5) {
            rest += counts[i];
            rest_expected += law[i] * n;
        } else {
            add(counts[i], law[i] * n);
        }
    }
    if (rest_expected > 0) {
        add(rest, rest_expected);
    }
    const double freedom = n_cells - 1;
    return (std::cbrt(chi / freedom) - (1 - 2 / (9 * freedom))) / std::sqrt(2 / (9 * freedom));
}

constexpr const char* kPolicies[] = {"off", "fixed:3", "threshold:0.6", "algorithm1", "adaptive"};

std::unique_ptr<Engine> make_toy_engine() {
    SchedulerOptions scheduler;
    scheduler.block_size = 4;
    EngineOptions options;
    options.n_parallel = 5;
    options.n_batch = 32;
    return std::make_unique<Engine>(std::make_unique<toy::Target>(), std::make_unique<ConfidentDrafter>(),
                                    std::make_unique<Scheduler>(scheduler), options);
}

CostCurves jagged_costs() {
    return {{{1, 20.0}, {2, 22.0}, {5, 24.0}, {6, 29.0}, {9, 30.0}, {25, 60.0}},
            {{1, 19.0}, {5, 23.0}},
            {{1, 20.0}},
            {{1, 1.0}, {5, 2.0}},
            {},
            0,
            0};
}

// Requests of all policies take turns, so that every one decodes beside the others. Costs are set anew in every step:
// what toys really take would make every draft look dear.
void check_law(Verification rule, float temperature) {
    constexpr int32_t kRequests = 1500; // a policy
    constexpr size_t kKinds = std::size(kPolicies);
    auto engine = make_toy_engine();
    std::array<std::array<int32_t, kPairs>, kKinds> counts{};
    std::map<uint64_t, size_t> kinds;
    const CostCurves costs = jagged_costs();
    for (int32_t begin = 0; begin < kRequests; begin += 50) {
        for (int32_t i = begin; i < begin + 50; ++i) {
            for (size_t kind = 0; kind < kKinds; ++kind) {
                auto options = sampling(rule, temperature, static_cast<uint64_t>(i) * kKinds + kind, 6);
                options.policy = parse_policy(kPolicies[kind]);
                kinds[engine->submit({kPrompt}, options)] = kind;
            }
        }
        for (const auto& [id, text] : texts_of(*engine, &costs)) {
            CHECK(text.size() == 6);
            counts[kinds[id]][static_cast<size_t>(text[1] * toy::kVocab + text[2])] += 1;
        }
    }
    for (size_t kind = 0; kind < kKinds; ++kind) {
        CHECK(deviation(counts[kind], law_of_pairs(temperature), kRequests) < 4.5);
    }
    CHECK(deviation(counts[0], law_of_pairs(temperature * 2), kRequests) > 4.5); // sees another law
    CHECK(engine->stats().n_accepted > kRequests / 2);
}

void test_no_policy_changes_the_law() {
    for (const Verification rule : {Verification::exact, Verification::rejection, Verification::block}) {
        for (const float temperature : {0.6F, 1.0F}) {
            check_law(rule, temperature);
        }
    }
}

void test_no_policy_changes_greedy_text() {
    for (const Verification rule : {Verification::exact, Verification::rejection, Verification::block}) {
        auto engine = make_toy_engine();
        engine->set_costs(jagged_costs());
        for (const char* name : kPolicies) {
            auto options = sampling(rule, 0.0F, 0, 40);
            options.policy = parse_policy(name);
            (void)engine->submit({1, 2}, options);
        }
        const auto texts = texts_of(*engine);
        for (const auto& [id, text] : texts) {
            CHECK(text == texts.begin()->second);
        }
    }
}

// ---- measuring ----

void test_measuring_leaves_caches_empty() {
    for (const int32_t n_batch : {2, 64}) {
        toy::Target target;
        toy::Drafter drafter(4);
        MeasureOptions options{2, 10, n_batch, 128, 50};
        const CostCurves curves = measure_costs(target, &drafter, options);
        curves.validate();
        CHECK(curves.verify.size() == static_cast<size_t>(std::min(10, n_batch)));
        CHECK(curves.draft.size() == 2);
        for (const int32_t sequence : {0, 1}) {
            CHECK(target.last_position(sequence) == -1);
            CHECK(drafter.last_position(sequence) == -1);
        }
    }
}

// Fails after some passes.
class FailingTarget final : public dspark::Target {
  public:
    explicit FailingTarget(int32_t n_passes) : n_left_(n_passes) {}
    [[nodiscard]] int32_t n_vocab() const override { return toy_.n_vocab(); }
    [[nodiscard]] bool is_end_of_generation(int32_t token) const override { return toy_.is_end_of_generation(token); }
    void decode(std::span<const BatchRow> rows) override {
        toy_.fail_next = n_left_-- == 0;
        toy_.decode(rows);
    }
    [[nodiscard]] std::span<const float> logits(int32_t row) override { return toy_.logits(row); }
    void remove(int32_t sequence, int32_t begin) override { toy_.remove(sequence, begin); }
    [[nodiscard]] int32_t last_position(int32_t sequence) const override { return toy_.last_position(sequence); }

  private:
    toy::Target toy_;
    int32_t n_left_;
};

void test_a_failed_measurement_leaves_caches_empty() {
    for (const int32_t n_passes : {1, 5, 20}) {
        FailingTarget target(n_passes);
        toy::Drafter drafter(4);
        CHECK_THROWS(measure_costs(target, &drafter, {2, 10, 64, 128, 50}), DecodeError);
        CHECK(target.last_position(0) == -1);
        CHECK(drafter.last_position(0) == -1);
    }
}

} // namespace

int main() {
    test_counterexample_of_appendix_a();
    test_no_policy_changes_the_law();
    test_no_policy_changes_greedy_text();
    test_measuring_leaves_caches_empty();
    test_a_failed_measurement_leaves_caches_empty();
    return check_summary();
}
