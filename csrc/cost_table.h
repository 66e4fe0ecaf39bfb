// What a forward pass costs on this machine: T_verify(B), T_prefill(P), T_draft(R), measured at load, corrected by the
// steps that were really timed. Owns: the curves. Must not know: models, requests, clocks. Engine thread only.
//
// Curves stay jagged: a size that was timed has its own value, cliffs included; sizes in between are
// interpolated, sizes beyond continue the last slope. Four disturbances are told apart:
//   - noise: every size keeps its last samples and answers with their median, shared where sizes contradict each other;
//     it only adds, so one pass that takes far less than its price proves the price too dear;
//   - a machine that is slower now (load, heat): the median ratio of recent passes to their estimate scales all sizes;
//     of a drafted step as far as draft and target agree on it, or it would be a size's error;
//     a sample waits until as many ratios after it as before it are known, so that a size does not take the change of
//     the whole machine for its own;
//   - what slows plain steps down need not slow drafted ones as much: a busy neighbour takes memory bandwidth, which
//     passes of one row live on, and a caller's work between steps is the same however long a step is. So each of the
//     two has a ratio of its own. Both may hide that a size is priced wrong beside the others, so plain decoding is
//     never priced above what its last passes of that size took;
//   - context: attention costs per cell, further rows a share of the first (kRowShare); sizes seen in a context bucket
//     have values of their own there.
#pragma once

#include "estimates.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace dspark {

using CostPoints = std::vector<std::pair<int32_t, double>>; // (size, ms), ascending sizes

// All in milliseconds, with next to nothing in the cache.
struct CostCurves {
    CostPoints verify;                 // rows, each with logits, behind a draft
    CostPoints plain;                  // rows of plain decoding: pass after pass of one shape; empty: as verify
    CostPoints prefill;                // rows without logits
    CostPoints draft;                  // blocks drafted in one pass, sequential head included
    CostPoints inject;                 // context rows written into the drafter's cache before a draft
    double verify_ms_per_row_cell = 0; // what attention adds for one row, per cell in use; 0: not measured
    double draft_ms_per_block_cell = 0;

    // Throws std::invalid_argument: sizes must ascend from 1, times be finite and 0 or more.
    void validate() const;
};

class CostCurve {
  public:
    CostCurve() = default;
    explicit CostCurve(const CostPoints& measured);

    [[nodiscard]] double at(int32_t size) const; // 0 when nothing is known
    [[nodiscard]] bool knows(int32_t size) const;
    void observe(int32_t size, double ms);
    // A pass of more work than `size` took so long: neither this size nor smaller ones take longer.
    void bound(int32_t size, double ms);
    // Whether a pass that took so long shows that its size is priced too dear.
    [[nodiscard]] bool is_disproved(int32_t size, double ms) const;
    [[nodiscard]] const CostPoints& points() const { return known_; } // the sizes that can be trusted

  private:
    struct Point {
        MedianRing samples;
        int32_t n_seen = 0;
        bool is_trusted = false; // measured at load, or seen often enough
    };
    struct Pool { // sizes that answer alike
        double ms;
        double weight;
        size_t begin; // the first one, as an index of known_
    };
    void refresh();
    void pool(Pool added);

    std::map<int32_t, Point> points_;
    std::vector<Pool> pools_; // scratch
    CostPoints known_;        // medians of the trusted ones, read several times a step
};

inline constexpr int32_t kBaseCells = 512; // cells of bucket 0; every further bucket doubles
[[nodiscard]] int32_t context_bucket(int32_t n_cells);

// Of what attention costs one row, each further row adds this: rows share what is read and converted of the cache. Of
// the 0.6B shape at 1k to 4k cells on two Zen 4 cores, which memory holds up, 8 rows cost 2.6 to 3.1 times as much as
// one (0.22 to 0.3); where memory is no limit 4.8 times (0.54), 6.3 at 8B (0.76). A price that is too low is corrected
// by the drafts that it leads to; one that is too high never is.
inline constexpr double kRowShare = 1.0 / 3;

// Cells in use, of all sequences together. A row reads those of its own sequence.
struct ContextLoad {
    int32_t n_cells = 0;
    int32_t n_sequences = 1;
};

// What a context adds to a pass, in units of what a cell adds to one row; `share`: as kRowShare. Rows, and
// cells, are taken to be spread evenly over the sequences.
[[nodiscard]] constexpr double context_size(int32_t n_rows, const ContextLoad& context, double share) {
    const int32_t n_first = std::min(n_rows, context.n_sequences);
    return (n_first + share * (n_rows - n_first)) / context.n_sequences * context.n_cells;
}

// What a cell adds to a pass of one row: measured at load, if a context deep enough could be filled; then the median
// of what passes showed. Plain and drafted passes share one: plain steps tell what verifying costs in a deep context
// even where nothing is drafted because it is taken for too dear.
class ContextSlope {
  public:
    ContextSlope() = default;
    explicit ContextSlope(double measured_ms) : ms_(measured_ms), is_measured_(measured_ms > 0) {}

    [[nodiscard]] double ms() const { return ms_; }
    void observe(double ms);

  private:
    double ms_ = 0;
    bool is_measured_ = false;
    MedianRing seen_;
};

// One kind of pass over sizes and contexts; `share`: as kRowShare.
class ContextCost {
  public:
    ContextCost() = default;
    ContextCost(const CostPoints& measured, double share) : base_(measured), share_(share) {}

    [[nodiscard]] double at(int32_t size, const ContextLoad& context, const ContextSlope& slope) const;
    [[nodiscard]] bool knows(int32_t size, const ContextLoad& context) const;
    [[nodiscard]] bool is_empty() const { return base_.points().empty() && buckets_.empty(); }
    void observe(int32_t size, const ContextLoad& context, double ms, ContextSlope& slope);
    void bound(int32_t size, const ContextLoad& context, double ms);
    [[nodiscard]] const CostPoints& points() const { return base_.points(); }

  private:
    CostCurve base_;
    std::map<int32_t, CostCurve> buckets_; // by context_bucket(), 0 left out: that is base_
    double share_ = 1;
};

// The shape of one target pass.
struct PassShape {
    int32_t n_rows = 0;         // with logits
    int32_t n_prefill_rows = 0; // without
    ContextLoad context;        // before it
    bool is_repeat = false;     // rows with logits alone, and the pass before it had the same shape
    bool is_behind_draft = false;

    [[nodiscard]] bool is_plain() const { return is_repeat && !is_behind_draft; } // as plain decoding goes on
};

class CostTable {
  public:
    CostTable() = default; // knows nothing: every pass is free until one was timed
    explicit CostTable(const CostCurves& measured);

    [[nodiscard]] double verify_ms(const PassShape& pass) const;
    [[nodiscard]] bool knows_plain() const { return !plain_.is_empty(); }
    [[nodiscard]] double draft_ms(int32_t n_blocks, const ContextLoad& context) const;
    [[nodiscard]] double inject_ms(int32_t n_rows) const;

    // Of a step: the draft first.
    void observe_draft(int32_t n_blocks, const ContextLoad& context, double ms);
    void observe_verify(const PassShape& pass, double ms);
    void observe_inject(int32_t n_rows, double ms);
    // A plain pass that has not settled yet: plain decoding takes no longer than that.
    void observe_settling(const PassShape& pass, double ms);

    // The curves with what was learned, at the speed of load time, or of now where that is faster.
    [[nodiscard]] CostCurves curves() const;
    // Of drafted steps, or of plain ones.
    [[nodiscard]] double slowdown(bool is_of_draft) const { return is_of_draft ? drafted_slowdown_ : plain_slowdown_; }

  private:
    static constexpr int32_t kMinRatios = 5;
    static constexpr int64_t kHeldPasses = 4; // half a ring of ratios
    struct Timed {                            // a target pass, or a draft when n_blocks > 0
        PassShape pass;
        int32_t n_blocks;
        double ms;
        int64_t index; // of the target pass, or of that behind the draft
    };
    struct Ratios { // of recent passes of a kind to their estimates
        MedianRing ring;
        int64_t last_pass = 0;
        double other = 1; // of the other kind, then
    };
    [[nodiscard]] double find_slowdown(bool is_of_draft) const;
    [[nodiscard]] static bool is_known(const Ratios& ratios) { return ratios.ring.size() >= kMinRatios; }
    [[nodiscard]] double share_left(const Ratios& own, double n_passes) const;
    [[nodiscard]] double followed(const Ratios& own, const Ratios& other) const;
    [[nodiscard]] double faded(const Ratios& own, double ratio, double usual, double n_passes) const;
    void learn_held();
    [[nodiscard]] double gain_of_now(bool is_of_draft) const;
    [[nodiscard]] double undisturbed_verify_ms(const PassShape& pass) const;
    [[nodiscard]] double output_ms(const PassShape& pass) const;
    [[nodiscard]] double plain_bound_ms(const PassShape& pass) const;
    [[nodiscard]] double context_factor(const PassShape& pass) const;
    [[nodiscard]] static bool is_drafted(const PassShape& pass) { return !pass.is_plain() && pass.n_prefill_rows == 0; }
    [[nodiscard]] bool knows(const PassShape& pass) const;

    ContextCost verify_;
    ContextCost plain_;
    ContextCost prefill_;
    ContextCost draft_;
    ContextSlope verify_slope_; // of the first two
    ContextSlope prefill_slope_;
    ContextSlope draft_slope_;
    CostCurve inject_;
    // [n_rows]: the last plain passes, their context taken out. A price above what they took is never found out while
    // drafts go on, and one below it by the next plain steps: so plain decoding is not priced above them.
    std::map<int32_t, MedianRing> plain_seen_;
    Ratios plain_ratios_;
    Ratios drafted_ratios_;
    double plain_slowdown_ = 1; // by these, read for every size
    double drafted_slowdown_ = 1;
    double draft_ratio_ = 0; // of this step's draft; 0: none, or of a size that nobody knows
    std::deque<Timed> held_;
    int64_t n_passes_ = 0;
};

} // namespace dspark
