#include "cost_table.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace dspark {

namespace {

constexpr int32_t kTrustedSamples = 3; // a size nobody measured at load counts from here on
constexpr int32_t kLoadWeight = 3;     // samples that the value from load counts for
constexpr int32_t kGuessWeight = 2;    // samples that the interpolated value counts for: outliers alone teach nothing
constexpr double kCliff = 1.5;         // times as dear as the next larger size: no noise
constexpr double kLeastBase = 0.5;     // of a pass, whatever its context is said to add
constexpr double kLeastBody = 0.5;     // of a pass that reads prompts, whatever its outputs are said to take
constexpr double kPlainFades = 64; // passes of the other kind in which what is unusual fades to 1 / e (in logarithms)
constexpr double kDraftedFades = 100;
constexpr double kDraftedApart = 1.5; // ratio of drafted passes to that of plain ones that is not unusual yet
constexpr double kFollows = 0.8;      // of a slowdown of plain passes, in logarithms, is drafted ones' too
constexpr double kTooDear = 1.5;      // times what one pass took: no noise either
constexpr int32_t kMostWeight = 8;    // passes that a size counts for beside its neighbours, the value from load for 1

// What two ratios agree on: the one nearer to 1, or 1 where one says faster and the other slower.
double common_change(double a, double b) { return std::clamp(1.0, std::min(a, b), std::max(a, b)); }

double ratio_of(double ms, double expected_ms) { return std::clamp(ms / expected_ms, 0.05, 20.0); }

CostPoints scale(CostPoints points, double factor) {
    for (auto& [size, ms] : points) {
        ms *= factor;
    }
    return points;
}

} // namespace

void CostCurves::validate() const {
    for (const auto& [name, points] :
         {std::pair("verify", &verify), std::pair("plain", &plain), std::pair("prefill", &prefill),
          std::pair("draft", &draft), std::pair("inject", &inject)}) {
        int32_t last = 0;
        for (const auto& [size, ms] : *points) {
            if (size <= last || !std::isfinite(ms) || ms < 0) {
                throw std::invalid_argument(std::string("cost curve ") + name +
                                            " must have ascending sizes from 1 and times of 0 ms or more, got " +
                                            std::to_string(ms) + " ms at " + std::to_string(size));
            }
            last = size;
        }
    }
    for (const double slope : {verify_ms_per_row_cell, draft_ms_per_block_cell}) {
        if (!std::isfinite(slope) || slope < 0) {
            throw std::invalid_argument("costs of context must be 0 or more, got " + std::to_string(slope));
        }
    }
}

int32_t context_bucket(int32_t n_cells) {
    int32_t bucket = 0;
    for (int64_t end = kBaseCells; n_cells > end; end *= 2) {
        ++bucket;
    }
    return bucket;
}

// ---- one curve ----

CostCurve::CostCurve(const CostPoints& measured) {
    for (const auto& [size, ms] : measured) {
        Point& point = points_[size];
        for (int32_t i = 0; i < kLoadWeight; ++i) {
            point.samples.push(ms);
        }
        point.is_trusted = true;
    }
    refresh();
}

bool CostCurve::knows(int32_t size) const {
    const auto found = points_.find(size);
    return found != points_.end() && found->second.is_trusted;
}

bool CostCurve::is_disproved(int32_t size, double ms) const { return kTooDear * ms < at(size); }

// A pass is hardly ever dearer than a larger one: smaller sizes that nobody has timed since load were measured in a bad
// moment. Where they are dearer all the same they will be run, and show it.
void CostCurve::bound(int32_t size, double ms) {
    bool has_changed = false;
    for (auto& [smaller, point] : points_) {
        if (smaller <= size && point.n_seen == 0 && point.samples.median() > ms) {
            point.samples.clear();
            point.samples.push(ms);
            has_changed = true;
        }
    }
    if (has_changed) { // every drafted pass comes here, and hardly any changes anything
        refresh();
    }
}

void CostCurve::observe(int32_t size, double ms) {
    if (is_disproved(size, ms)) {
        bound(size - 1, ms);
        points_[size].samples.clear();
        points_[size].is_trusted = true;
    }
    const auto [found, is_new] = points_.try_emplace(size);
    Point& point = found->second;
    if (is_new && !known_.empty()) {
        for (int32_t i = 0; i < kGuessWeight; ++i) {
            point.samples.push(at(size));
        }
    }
    point.samples.push(ms);
    ++point.n_seen;
    point.is_trusted = point.is_trusted || point.n_seen >= kTrustedSamples;
    refresh();
}

void CostCurve::refresh() {
    known_.clear();
    pools_.clear();
    for (const auto& [size, point] : points_) {
        if (point.is_trusted) {
            pool({point.samples.median(), 1.0 + std::min(point.n_seen, kMostWeight), known_.size()});
            known_.emplace_back(size, pools_.back().ms);
            std::for_each(known_.begin() + static_cast<std::ptrdiff_t>(pools_.back().begin), known_.end(),
                          [&](auto& known) { known.second = pools_.back().ms; });
        }
    }
}

// A pass is hardly ever cheaper than a smaller one: where medians say so they are mostly noise, and the sizes from the
// dear one to the cheap one answer with their mean, weighted by how often each was seen (pool adjacent violators).
// Cliffs stay, those upwards and those where other kernels begin, as on GPUs.
void CostCurve::pool(Pool added) {
    const auto is_noise = [](double dear_ms, double cheap_ms) {
        return dear_ms > cheap_ms && dear_ms < kCliff * cheap_ms;
    };
    for (; !pools_.empty() && is_noise(pools_.back().ms, added.ms); pools_.pop_back()) {
        const Pool& last = pools_.back();
        const double weight = last.weight + added.weight;
        added = {(last.ms * last.weight + added.ms * added.weight) / weight, weight, last.begin};
    }
    pools_.push_back(added);
}

double CostCurve::at(int32_t size) const {
    const CostPoints& known = known_;
    if (known.empty() || size <= 0) {
        return 0;
    }
    const auto above = std::lower_bound(known.begin(), known.end(), size,
                                        [](const auto& point, int32_t wanted) { return point.first < wanted; });
    if (above != known.end() && (above->first == size || above == known.begin())) {
        return above->second; // a smaller pass than any known: no cheaper
    }
    if (above != known.end()) {
        const auto below = above - 1;
        const double share = static_cast<double>(size - below->first) / (above->first - below->first);
        return below->second + share * (above->second - below->second);
    }
    const auto& [last_size, last_ms] = known.back();
    if (known.size() == 1) {
        return last_ms;
    }
    const auto& [first_size, first_ms] = known.front(); // one step back may be a cliff: take the whole curve's slope
    const double slope = std::max(0.0, (last_ms - first_ms) / (last_size - first_size));
    return last_ms + slope * (size - last_size);
}

// ---- contexts ----

void ContextSlope::observe(double ms) {
    seen_.push(ms);
    if (!is_measured_ || seen_.size() >= kTrustedSamples) {
        ms_ = seen_.median();
    }
}

double ContextCost::at(int32_t size, const ContextLoad& context, const ContextSlope& slope) const {
    const auto own = buckets_.find(context_bucket(context.n_cells));
    if (own != buckets_.end() && own->second.knows(size)) {
        return own->second.at(size);
    }
    return base_.at(size) + slope.ms() * context_size(size, context, share_);
}

bool ContextCost::knows(int32_t size, const ContextLoad& context) const {
    const int32_t bucket = context_bucket(context.n_cells);
    if (bucket == 0) {
        return base_.knows(size);
    }
    const auto own = buckets_.find(bucket);
    return own != buckets_.end() && own->second.knows(size);
}

void ContextCost::observe(int32_t size, const ContextLoad& context, double ms, ContextSlope& slope) {
    const int32_t bucket = context_bucket(context.n_cells);
    if (bucket == 0) {
        const double added_ms = slope.ms() * context_size(size, context, share_);
        base_.observe(size, std::max(ms - added_ms, kLeastBase * ms));
        return;
    }
    buckets_[bucket].observe(size, ms);
    if (base_.is_disproved(size, ms)) { // a context only adds
        base_.observe(size, ms);
    }
    if (base_.knows(size)) {
        slope.observe(std::max(0.0, ms - base_.at(size)) / context_size(size, context, share_));
    }
}

void ContextCost::bound(int32_t size, const ContextLoad& context, double ms) {
    const auto own = buckets_.find(context_bucket(context.n_cells));
    if (own != buckets_.end()) {
        own->second.bound(size, ms);
    }
    base_.bound(size, ms); // a context only adds
}

// ---- the table ----

CostTable::CostTable(const CostCurves& measured)
    : verify_(measured.verify, kRowShare), plain_(measured.plain, kRowShare), prefill_(measured.prefill, kRowShare),
      draft_(measured.draft, 1.0), verify_slope_(measured.verify_ms_per_row_cell),
      prefill_slope_(measured.verify_ms_per_row_cell), draft_slope_(measured.draft_ms_per_block_cell),
      inject_(measured.inject) {}

double CostTable::undisturbed_verify_ms(const PassShape& pass) const {
    if (pass.is_plain() && !plain_.is_empty()) {
        return plain_.at(pass.n_rows, pass.context, verify_slope_);
    }
    if (pass.n_prefill_rows == 0) {
        return verify_.at(pass.n_rows, pass.context, verify_slope_);
    }
    return prefill_.at(pass.n_rows + pass.n_prefill_rows, pass.context, prefill_slope_) + output_ms(pass);
}

// What rows with logits add is the output head: T_verify less a pass of as many rows without it.
double CostTable::output_ms(const PassShape& pass) const {
    return pass.n_rows == 0 ? 0.0
                            : std::max(0.0, verify_.at(pass.n_rows, pass.context, verify_slope_) -
                                                prefill_.at(pass.n_rows, pass.context, verify_slope_));
}

double CostTable::verify_ms(const PassShape& pass) const {
    const double ms = undisturbed_verify_ms(pass) * slowdown(is_drafted(pass));
    return pass.is_plain() ? std::min(ms, plain_bound_ms(pass)) : ms;
}

double CostTable::plain_bound_ms(const PassShape& pass) const {
    const auto seen = plain_seen_.find(pass.n_rows);
    if (seen == plain_seen_.end() || seen->second.size() < kMinRatios) {
        return std::numeric_limits<double>::infinity();
    }
    return seen->second.median() * context_factor(pass);
}

// What the context makes of a plain pass.
double CostTable::context_factor(const PassShape& pass) const {
    const double base_ms = plain_.at(pass.n_rows, {0, pass.context.n_sequences}, verify_slope_);
    return base_ms > 0 ? plain_.at(pass.n_rows, pass.context, verify_slope_) / base_ms : 1;
}

void CostTable::observe_settling(const PassShape& pass, double ms) {
    plain_seen_[pass.n_rows].push(ms / context_factor(pass));
}

double CostTable::draft_ms(int32_t n_blocks, const ContextLoad& context) const {
    return draft_.at(n_blocks, context, draft_slope_) * slowdown(true);
}

bool CostTable::knows(const PassShape& pass) const {
    if (pass.is_plain()) {
        return plain_.knows(pass.n_rows, pass.context);
    }
    return pass.n_prefill_rows == 0 ? verify_.knows(pass.n_rows, pass.context)
                                    : prefill_.knows(pass.n_rows + pass.n_prefill_rows, pass.context);
}

void CostTable::observe_verify(const PassShape& pass, double ms) {
    const double expected_ms = undisturbed_verify_ms(pass);
    // An interpolated size says more of the curve than of the machine, unless the draft agrees; what holds prompts up
    // says nothing of others.
    if (pass.n_prefill_rows == 0 && (knows(pass) || draft_ratio_ > 0) && expected_ms > 0) {
        const double ratio = ratio_of(ms, expected_ms);
        const bool is_common = is_drafted(pass) && draft_ratio_ > 0;
        Ratios& own = is_drafted(pass) ? drafted_ratios_ : plain_ratios_;
        own.ring.push(is_common ? common_change(ratio, draft_ratio_) : ratio);
        own.last_pass = n_passes_ + 1;
        const Ratios& other = is_drafted(pass) ? plain_ratios_ : drafted_ratios_;
        own.other = is_known(other) ? other.ring.median() : own.ring.median();
    }
    if (pass.is_plain()) {
        observe_settling(pass, ms);
    }
    draft_ratio_ = 0;
    held_.push_back({pass, 0, ms, ++n_passes_});
    plain_slowdown_ = find_slowdown(false);
    drafted_slowdown_ = find_slowdown(true);
    learn_held();
}

double CostTable::inject_ms(int32_t n_rows) const { return inject_.at(n_rows) * slowdown(true); }

// Only with target passes do drafts tell the machine's speed.
void CostTable::observe_draft(int32_t n_blocks, const ContextLoad& context, double ms) {
    const double expected_ms = draft_.at(n_blocks, context, draft_slope_);
    draft_ratio_ = draft_.knows(n_blocks, context) && expected_ms > 0 ? ratio_of(ms, expected_ms) : 0;
    held_.push_back({{0, 0, context}, n_blocks, ms, n_passes_ + 1});
}

void CostTable::learn_held() {
    for (; !held_.empty() && n_passes_ - held_.front().index >= kHeldPasses; held_.pop_front()) {
        const Timed& timed = held_.front();
        const PassShape& pass = timed.pass;
        const double undisturbed_ms = timed.ms / slowdown(timed.n_blocks > 0 || is_drafted(pass));
        if (timed.n_blocks > 0) {
            draft_.observe(timed.n_blocks, pass.context, undisturbed_ms, draft_slope_);
        } else if (pass.is_plain()) {
            plain_.observe(pass.n_rows, pass.context, undisturbed_ms, verify_slope_);
        } else if (pass.n_prefill_rows == 0) {
            verify_.observe(pass.n_rows, pass.context, undisturbed_ms, verify_slope_);
            plain_.bound(pass.n_rows, pass.context, timed.ms / slowdown(false));
        } else {
            const double body_ms = std::max(undisturbed_ms - output_ms(pass), kLeastBody * undisturbed_ms);
            prefill_.observe(pass.n_rows + pass.n_prefill_rows, pass.context, body_ms, prefill_slope_);
        }
    }
}

// Row counts of long waits differ from draft to draft: kept by powers of two, or every count would be a size of its
// own.
void CostTable::observe_inject(int32_t n_rows, double ms) {
    int32_t size = n_rows;
    if (n_rows > 16) {
        for (size = 16; 2 * size <= n_rows;) {
            size *= 2;
        }
        ms *= static_cast<double>(size) / n_rows;
    }
    inject_.observe(size, ms / slowdown(true));
}

CostCurves CostTable::curves() const {
    const double drafted = gain_of_now(true);
    return {scale(verify_.points(), drafted),
            scale(plain_.points(), gain_of_now(false)),
            prefill_.points(),
            scale(draft_.points(), drafted),
            scale(inject_.points(), drafted),
            verify_slope_.ms(),
            draft_slope_.ms()};
}

// What is timed faster than all of load was measured in a bad moment, and its curve is off as a whole.
double CostTable::gain_of_now(bool is_of_draft) const {
    const MedianRing& own = (is_of_draft ? drafted_ratios_ : plain_ratios_).ring;
    return own.size() >= kMinRatios ? std::min(1.0, own.median()) : 1.0;
}

// Each kind by its own passes: whichever is priced too low is run, and shows it. A kind that was not timed yet is taken
// to be half as slow as the other one, in logarithms.
double CostTable::find_slowdown(bool is_of_draft) const {
    const Ratios& own = is_of_draft ? drafted_ratios_ : plain_ratios_;
    const Ratios& other = is_of_draft ? plain_ratios_ : drafted_ratios_;
    if (!is_known(own)) {
        return is_known(other) ? std::sqrt(other.ring.median()) : 1;
    }
    if (!is_known(other)) {
        return own.ring.median();
    }
    if (!is_of_draft) {
        return faded(own, own.ring.median(), other.ring.median(), kPlainFades);
    }
    return faded(own, followed(own, other), other.ring.median() * kDraftedApart, kDraftedFades);
}

// While no drafts are run a slowdown of plain passes counts for them too, or their rows would look free beside it.
double CostTable::followed(const Ratios& own, const Ratios& other) const {
    const double change = std::pow(other.ring.median() / own.other, kFollows * (1 - share_left(own, kDraftedFades)));
    return own.ring.median() * std::max(1.0, change);
}

// Of what a kind's last passes showed, after passes of the other kind.
double CostTable::share_left(const Ratios& own, double n_passes) const {
    return std::exp(static_cast<double>(own.last_pass - n_passes_) / n_passes);
}

// A slow moment of plain steps makes drafts look cheap, and then nothing would show that it is over, or the other way
// round. So a ratio above what is usual beside the other kind's fades while only the other kind is run.
double CostTable::faded(const Ratios& own, double ratio, double usual, double n_passes) const {
    return ratio <= usual ? ratio : usual * std::pow(ratio / usual, share_left(own, n_passes));
}

} // namespace dspark
