#include "survival.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

namespace dspark {

namespace {

// Nothing known of a drafter: published ones accept 0.7 to 0.9 of first tokens and no less of later ones. Weak, so that
// a few rounds decide.
constexpr double kPriorRate = 0.8;
constexpr double kPriorRounds = 2;
constexpr double kCalibratedRounds = 20; // rounds that a rate measured by `dspark calibrate` counts for
constexpr double kBandDecay = 0.99;      // remembers about 100 rounds of all requests
// How much easier than most a request's text is, in logits, by stochastic gradient. On the demo pair's texts, traced
// with whole blocks: the squared error of the expected length is 5 % below that of decayed counts per slot, which also
// expected a fifth of a token too much; and drafting where it is above its break-even makes 1 to 2 % more.
constexpr double kEaseStep = 0.25;
constexpr double kEaseDecay = 0.95;   // a drafted round: text changes its nature
constexpr double kParkedDecay = 0.96; // a round without a draft: parked for long, it is as others are
constexpr double kUnseenWeight = 0.5; // of a slot whose confidence is all that is known
constexpr double kTiedRounds = 2;     // rounds that the slot before counts for, where a slot was hardly ever reached

constexpr double kMostLogit = 8; // of a confidence: beyond it nothing more is said, but gradients explode
constexpr double kMostShift = 4;
constexpr double kMostRate = 0.995;
constexpr double kMostSlope = 3;
// Of the correction of confidences: the variance before anything was seen, and what a round adds to what is left of it.
struct Drift {
    double most;
    double added;
};
constexpr Drift kSlopeDrift{0.05, 1e-4};
constexpr Drift kShiftDrift{0.5, 1e-3};
constexpr Drift kSlotDrift{0.1, 2e-4};
constexpr Drift kRequestDrift{0.2, 3e-3};
constexpr double kSlotWeight = 0.5; // the slots of a round share its luck: each says less than a round of its own

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

double shifted(double rate, double shift) {
    const double bounded = std::clamp(rate, 1 - kMostRate, kMostRate);
    return sigmoid(std::log(bounded / (1 - bounded)) + shift);
}

int temperature_range(double temperature) {
    if (temperature <= 0) {
        return 0;
    }
    return temperature <= 0.5 ? 1 : temperature <= 0.85 ? 2 : temperature <= 1.15 ? 3 : 4;
}

// What was measured elsewhere counts the less, the less likely it makes what was seen here: exp(-n KL(seen || prior))
// is the likelihood of the counts under the prior over the largest they can have. A drafter that fits nothing shows
// after two or three rounds in place of twenty.
double weight_of_calibration(double prior, double n_tried, double n_accepted) {
    if (n_tried <= 0) {
        return kCalibratedRounds;
    }
    const auto part = [](double seen, double expected) {
        return seen > 0 ? seen * std::log(seen / std::clamp(expected, 0.01, 1.0)) : 0.0;
    };
    const double seen = std::clamp(n_accepted / n_tried, 0.0, 1.0);
    const double divergence = std::max(0.0, part(seen, prior) + part(1 - seen, 1 - prior));
    return kPriorRounds + (kCalibratedRounds - kPriorRounds) * std::exp(-n_tried * divergence);
}

void check_entry(const CalibrationEntry& entry, size_t block_size) {
    auto require = [](bool holds, const std::string& message) {
        if (!holds) {
            throw std::invalid_argument(message);
        }
    };
    for (const auto& [name, values] : {std::pair("sts", &entry.sts), std::pair("acceptance", &entry.acceptance),
                                       std::pair("offsets", &entry.offsets)}) {
        require(values->empty() || values->size() == block_size,
                std::string("calibration ") + name + " must hold block_size = " + std::to_string(block_size) +
                    " values, got " + std::to_string(values->size()));
    }
    require(std::isfinite(entry.temperature) && entry.temperature >= 0,
            "calibration temperature must be 0 or more, got " + std::to_string(entry.temperature));
    for (const double value : entry.sts) {
        require(std::isfinite(value) && value > 0, "calibration sts must be above 0, got " + std::to_string(value));
    }
    for (const double value : entry.acceptance) {
        require(value >= 0 && value <= 1, "calibration acceptance must be in [0, 1], got " + std::to_string(value));
    }
    require(entry.maps.empty() || entry.maps.size() == block_size * kMapPoints,
            "calibration maps must hold block_size x 11 = " + std::to_string(block_size * kMapPoints) +
                " values, got " + std::to_string(entry.maps.size()));
    for (size_t i = 0; i < entry.maps.size(); ++i) {
        const bool is_ascending = i % kMapPoints == 0 || entry.maps[i - 1] <= entry.maps[i];
        require(entry.maps[i] >= 0 && entry.maps[i] <= 1 && is_ascending,
                "calibration maps must be in [0, 1] and never fall, got " + std::to_string(entry.maps[i]));
    }
    for (const double value : entry.offsets) {
        require(std::isfinite(value), "calibration offsets must be finite, got " + std::to_string(value));
    }
}

} // namespace

SurvivalEstimator::SurvivalEstimator(int32_t block_size, std::vector<CalibrationEntry> calibration)
    : block_size_(static_cast<size_t>(block_size)), calibration_(std::move(calibration)) {
    for (const CalibrationEntry& entry : calibration_) {
        check_entry(entry, block_size_);
    }
}

// The entry of the same rule with the nearest temperature; any other rule's when that one was never fitted.
const CalibrationEntry* SurvivalEstimator::nearest_entry(const SurvivalKey& key) const {
    const CalibrationEntry* best = nullptr;
    double best_distance = 0;
    for (const CalibrationEntry& entry : calibration_) {
        const double distance = std::abs(entry.temperature - key.temperature) + (entry.rule == key.rule ? 0.0 : 1e6);
        if (best == nullptr || distance < best_distance) {
            best = &entry;
            best_distance = distance;
        }
    }
    return best;
}

SurvivalEstimator::Band& SurvivalEstimator::band_of(const SurvivalKey& key) {
    const auto [found, is_new] = bands_.try_emplace({static_cast<int>(key.rule), temperature_range(key.temperature)});
    Band& band = found->second;
    if (is_new) {
        band.calibration = nearest_entry(key);
        band.rates.resize(block_size_);
        band.correction = {{1, kSlopeDrift.most}, {0, kShiftDrift.most}, {}};
        band.correction.shifts.resize(block_size_, {0, kSlotDrift.most});
    }
    return band;
}

// Each slot leans on its prior, a slot that was hardly ever reached on the one before it.
void SurvivalEstimator::expect_band(Band& band, std::span<double> rates) const {
    if (!band.expected.empty()) {
        std::ranges::copy(band.expected, rates.begin());
        return;
    }
    const bool is_calibrated = band.calibration != nullptr && !band.calibration->acceptance.empty();
    for (size_t k = 0; k < rates.size(); ++k) {
        const double prior = is_calibrated ? band.calibration->acceptance[k] : k == 0 ? kPriorRate : rates[k - 1];
        const Rate& rate = band.rates[k];
        const double weight = is_calibrated ? weight_of_calibration(prior, rate.n_tried, rate.n_accepted)
                              : k == 0      ? kPriorRounds
                                            : kTiedRounds;
        rates[k] = (rate.n_accepted + weight * prior) / (rate.n_tried + weight);
    }
    band.expected.assign(rates.begin(), rates.end());
}

void SurvivalEstimator::expect(const SurvivalKey& key, std::span<double> rates) {
    expect_band(band_of(key), rates);
    const auto request = requests_.find(key.request_id);
    if (request == requests_.end()) {
        return;
    }
    for (double& rate : rates) {
        rate = shifted(rate, request->second.ease);
    }
}

double SurvivalEstimator::scaled_logit(const Band& band, std::span<const float> logits, size_t slot) const {
    const auto value = [&](std::vector<double> CalibrationEntry::* values, double fallback) {
        const bool is_fitted = band.calibration != nullptr && !(band.calibration->*values).empty();
        return is_fitted ? (band.calibration->*values)[slot] : fallback;
    };
    const double logit = logits[slot] / value(&CalibrationEntry::sts, 1) + value(&CalibrationEntry::offsets, 0);
    return std::isnan(logit) ? 0.0 : std::clamp(logit, -kMostLogit, kMostLogit);
}

void SurvivalEstimator::read_confidence(const SurvivalKey& key, std::span<const float> logits,
                                        std::span<double> rates) {
    if (logits.empty()) {
        expect(key, rates);
        return;
    }
    const Band& band = band_of(key);
    const auto request = requests_.find(key.request_id);
    const double own_shift = request == requests_.end() ? 0.0 : request->second.shift.value;
    for (size_t k = 0; k < rates.size(); ++k) {
        rates[k] = corrected(band.correction, own_shift, scaled_logit(band, logits, k), k);
    }
    if (band.calibration != nullptr && !band.calibration->maps.empty()) {
        map_survivals(band, rates);
    }
}

double SurvivalEstimator::corrected(const Correction& correction, double own_shift, double logit, size_t slot) {
    return sigmoid(correction.slope.value * logit + correction.shift.value + correction.shifts[slot].value + own_shift);
}

void SurvivalEstimator::learn(Correction& correction, Belief& own_shift, double logit, size_t slot, bool is_accepted) {
    struct Part {
        Belief& belief;
        double feature;
        double least;
        double most;
    };
    const std::array<Part, 4> parts{{{correction.slope, logit, 0, kMostSlope},
                                     {correction.shift, 1, -kMostShift, kMostShift},
                                     {correction.shifts[slot], 1, -kMostShift, kMostShift},
                                     {own_shift, 1, -kMostShift, kMostShift}}};
    const double expected = corrected(correction, own_shift.value, logit, slot);
    const double information = kSlotWeight * expected * (1 - expected);
    double variance = 0; // of the logit
    for (const Part& part : parts) {
        variance += part.feature * part.feature * part.belief.variance;
    }
    const double share = 1 / (1 + information * variance);
    const double error = kSlotWeight * ((is_accepted ? 1.0 : 0.0) - expected);
    for (const Part& part : parts) {
        const double covariance = part.belief.variance * part.feature; // with the logit
        const double value = part.belief.value + covariance * share * error;
        part.belief = {std::clamp(value, part.least, part.most),
                       part.belief.variance - covariance * covariance * information * share};
    }
}

// Conditional rates in, and out: their products go through the maps.
void SurvivalEstimator::map_survivals(const Band& band, std::span<double> rates) const {
    double before = 1;
    for (size_t k = 0; k < rates.size() && before > 0; ++k) {
        const double* map = band.calibration->maps.data() + k * kMapPoints;
        const double place = before * rates[k] * static_cast<double>(kMapPoints - 1);
        const size_t left = std::min(static_cast<size_t>(place), kMapPoints - 2);
        const double mapped = map[left] + (place - static_cast<double>(left)) * (map[left + 1] - map[left]);
        const double survival = std::min(before, mapped);
        rates[k] = survival / before;
        before = survival;
    }
}

void SurvivalEstimator::fade(uint64_t request_id) {
    const auto request = requests_.find(request_id);
    if (request == requests_.end()) {
        return;
    }
    request->second.ease *= kParkedDecay;
}

void SurvivalEstimator::observe(const SurvivalKey& key, std::span<const float> logits, int32_t prefix_len,
                                int32_t n_accepted) {
    Band& band = band_of(key);
    expected_.resize(block_size_);
    expect(key, expected_);
    band.expected.clear();
    RequestState& request =
        requests_.try_emplace(key.request_id, RequestState{0, {0, kRequestDrift.most}}).first->second;
    double gradient = 0;
    const auto count = [&](size_t k, double weight, double accepted) {
        Rate& rate = band.rates[k];
        rate.n_tried = rate.n_tried * kBandDecay + weight;
        rate.n_accepted = rate.n_accepted * kBandDecay + weight * accepted;
        gradient += weight * (accepted - expected_[k]);
    };
    const int32_t n_tried = std::min(prefix_len, n_accepted + 1); // slots whose own fate was seen
    for (int32_t k = 0; k < n_tried; ++k) {
        count(static_cast<size_t>(k), 1, k < n_accepted ? 1 : 0);
    }
    if (n_accepted == prefix_len && static_cast<size_t>(prefix_len) < block_size_ && !logits.empty()) {
        confidence_.resize(block_size_);
        read_confidence(key, logits, confidence_);
        count(static_cast<size_t>(prefix_len), kUnseenWeight, confidence_[static_cast<size_t>(prefix_len)]);
    }
    request.ease = std::clamp(kEaseDecay * request.ease + kEaseStep * gradient, -kMostShift, kMostShift);
    if (logits.empty()) {
        return;
    }
    const auto drift = [](Belief& belief, const Drift& by) {
        belief.variance = std::min(by.most, belief.variance + by.added);
    };
    drift(band.correction.slope, kSlopeDrift);
    drift(band.correction.shift, kShiftDrift);
    for (Belief& shift : band.correction.shifts) {
        drift(shift, kSlotDrift);
    }
    drift(request.shift, kRequestDrift);
    for (int32_t k = 0; k < n_tried; ++k) {
        const auto slot = static_cast<size_t>(k);
        learn(band.correction, request.shift, scaled_logit(band, logits, slot), slot, k < n_accepted);
    }
}

} // namespace dspark
