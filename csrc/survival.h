// How likely drafted tokens are to survive verification: calibrated confidence where the drafter has a confidence head,
// acceptance seen so far where it has none, and what older rounds lead to expect in both cases.
// Owns: calibration, acceptance statistics. Must not know: costs, policies, models. Engine thread only.
#pragma once

#include "acceptance.h"

#include <cstdint>
#include <map>
#include <span>
#include <unordered_map>
#include <vector>

namespace dspark {

inline constexpr size_t kMapPoints = 11;

// What `dspark calibrate` fitted for one verification rule at one sampling temperature (DESIGN section 2, calibration).
struct CalibrationEntry {
    Verification rule = Verification::exact;
    double temperature = 0;
    std::vector<double> sts;        // (block_size,) T_k, divides the confidence logit of slot k; empty: none fitted
    std::vector<double> acceptance; // (block_size,) P(slot k accepted | the slots before it were); empty: unknown
    std::vector<double> offsets;    // (block_size,) b_k: c_k = sigmoid(logit_k / T_k + b_k); empty: 0
    // (block_size, kMapPoints) M_k at 0, 0.1, .. 1, linear between: the survival of the first k tokens is
    // a_k = min(a_{k-1}, M_k(a_{k-1} c_k)); empty: a_{k-1} c_k.
    std::vector<double> maps;
};

// Whose tokens they are: acceptance differs by rule and temperature as much as by text.
struct SurvivalKey {
    uint64_t request_id = 0;
    Verification rule = Verification::exact;
    double temperature = 0;
};

class SurvivalEstimator {
  public:
    // Throws std::invalid_argument when an entry does not fit block_size or holds a value out of range.
    SurvivalEstimator(int32_t block_size, std::vector<CalibrationEntry> calibration);

    // (block_size,) conditional survival of each slot, from older rounds.
    void expect(const SurvivalKey& key, std::span<double> rates);
    // (block_size,) a_k / a_{k-1} from this round's confidence logits: c_k = sigmoid(s * (logit_k / T_k + b_k) + d_k),
    // T_k and b_k calibrated, s and d learned, then the survival maps; without logits, expect(). Rate k
    // depends on logits 0 .. k alone.
    void read_confidence(const SurvivalKey& key, std::span<const float> logits, std::span<double> rates);
    // A drafted round: slots 0 .. prefix_len - 1 were sent, n_accepted of them stood. The slot after them, when all
    // stood, counts half, with what its confidence says: else a request whose confidences are too low to verify
    // anything would go on expecting what it expected before.
    void observe(const SurvivalKey& key, std::span<const float> logits, int32_t prefix_len, int32_t n_accepted);
    // A round that did not draft: what earlier ones of this request showed fades.
    void fade(uint64_t request_id);
    void forget(uint64_t request_id) { requests_.erase(request_id); }
    [[nodiscard]] size_t n_requests() const { return requests_.size(); } // not forgotten yet

  private:
    struct Rate { // decayed counts of one slot
        double n_tried = 0;
        double n_accepted = 0;
    };
    // What is learned of one number: its value, and the variance that is left. What a round shows moves it by its
    // share of the doubt, so first rounds count for much (a Kalman filter whose numbers are taken as independent).
    struct Belief {
        double value = 0;
        double variance = 0;
    };
    struct Correction { // of the calibrated logit
        Belief slope;
        Belief shift;               // of all slots
        std::vector<Belief> shifts; // of each
    };
    struct Band { // one rule and temperature range
        const CalibrationEntry* calibration = nullptr;
        std::vector<Rate> rates;
        std::vector<double> expected; // from these; empty: to be found anew
        Correction correction;
    };
    struct RequestState {
        double ease = 0; // of what it is expected to accept
        Belief shift;    // of its confidences
    };

    [[nodiscard]] Band& band_of(const SurvivalKey& key);
    [[nodiscard]] const CalibrationEntry* nearest_entry(const SurvivalKey& key) const;
    void map_survivals(const Band& band, std::span<double> rates) const;
    [[nodiscard]] double scaled_logit(const Band& band, std::span<const float> logits, size_t slot) const;
    [[nodiscard]] static double corrected(const Correction& correction, double own_shift, double logit, size_t slot);
    static void learn(Correction& correction, Belief& own_shift, double logit, size_t slot, bool is_accepted);
    void expect_band(Band& band, std::span<double> rates) const;

    size_t block_size_;
    std::vector<CalibrationEntry> calibration_;
    std::map<std::pair<int, int>, Band> bands_;
    std::unordered_map<uint64_t, RequestState> requests_;
    std::vector<double> confidence_; // scratch of observe
    std::vector<double> expected_;   // scratch of observe
};

} // namespace dspark
