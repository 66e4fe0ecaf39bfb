#include "cost_measure.h"

#include "cost_sweep.h"
#include "random.h"
#include "request.h"
#include "step_costs.h"
#include "thread_choice.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

namespace dspark {

namespace {

constexpr int32_t kPromptRows = 8; // what every sequence holds before a pass is timed
constexpr int32_t kFewRepeats = 7; // more while a third of the budget is not spent
constexpr int32_t kMostRepeats = 15;
constexpr double kShortChunk = 30;  // ms: a chunk up to here is timed twice
constexpr int32_t kLeastCells = 64; // that show what attention adds to a pass that is not long
constexpr double kSmallPass = 5;    // ms: up to here what lies around a pass shows in its time

class Measurement {
  public:
    Measurement(Target& target, Drafter* drafter, const MeasureOptions& options)
        : target_(target), drafter_(drafter), options_(options) {}

    // A context too small to hold a prompt and a block has nothing to schedule either.
    CostCurves run() {
        const int32_t n_cells = options_.n_cells * options_.n_sequences;
        options_.n_rows = std::min({options_.n_rows, options_.n_batch, n_cells - options_.n_sequences * kPromptRows});
        if (options_.n_rows < 2 || options_.n_cells <= 2 * kPromptRows) {
            return {};
        }
        try {
            options_.is_look ? look() : measure();
        } catch (...) {
            clear();
            throw;
        }
        clear();
        return std::move(curves_);
    }

  private:
    // As the engine runs them: what a pass costs depends on the one before. A drafter's pass leaves other weights in
    // the processor's caches, and a batch of another shape has its graph built anew.
    void measure() {
        begin_sequences(options_.n_sequences);
        settle(verify_sizes());
        const double budget = options_.budget_ms;
        std::vector<Sweep> sweeps{{request_sizes(), budget * 0.15, [&](int32_t n) { return time_plain(n); }},
                                  {verify_sizes(), budget * (drafter_ != nullptr ? 0.55 : 0.6),
                                   [&](int32_t n) { return time_behind_draft(n); }}};
        if (drafter_ != nullptr) {
            sweeps.push_back({request_sizes(), budget * 0.7, [&](int32_t n) { return time_draft(n); }});
        }
        run_in_turns(sweeps, sweeps.back().end_ms);
        curves_.plain = sweeps[0].points();
        curves_.verify = sweeps[1].points();
        curves_.draft = drafter_ != nullptr ? sweeps[2].points() : CostPoints();
        measure_empty();
        measure_prefill(budget * 0.9);
        measure_context();
        settle_shapes();
    }

    // Of one sequence, whatever the sizes: filling many of a large model takes longer than what is looked at.
    void look() {
        const int32_t n_round =
            std::min(options_.n_rows, drafter_ != nullptr ? 1 + drafter_->block_size() : kPromptRows);
        std::vector<int32_t> rows{n_round};
        for (const int32_t n : {std::max(1, n_round / 2), options_.n_rows}) {
            if (n != n_round) {
                rows.push_back(n);
            }
        }
        begin_sequences(1);
        settle(std::array{1, n_round});
        const double end = options_.budget_ms;
        std::vector<Sweep> sweeps{{{1}, end, [&](int32_t) { return time_plain(1); }},
                                  {rows, end, [&](int32_t n) { return time_behind_draft(n); }, /* n_always */ 1}};
        if (drafter_ != nullptr) {
            sweeps.push_back({{1}, end, [&](int32_t) { return time_draft(1); }});
        }
        run_in_turns(sweeps, end);
        curves_.plain = sweeps[0].least();
        curves_.verify = sweeps[1].least();
        curves_.draft = drafter_ != nullptr ? sweeps[2].least() : CostPoints();
        settle_shapes();
    }

    void begin_sequences(int32_t n) {
        if (drafter_ != nullptr) {
            drafter_->begin_recording();
        }
        fill_sequences(n);
    }

    // One round of each after the other, so that a slow second of the machine is one of all curves: they are compared.
    void run_in_turns(std::span<Sweep> sweeps, double end_ms) {
        for (Sweep& sweep : sweeps) {
            run_first(sweep);
        }
        for (int32_t repeat = 1; repeat < kMostRepeats && elapsed_ms() < end_ms; ++repeat) {
            if (repeat >= kFewRepeats && elapsed_ms() > options_.budget_ms / 3) {
                return;
            }
            for (Sweep& sweep : sweeps) {
                for (size_t i = 0; i < sweep.samples.size() && (i < sweep.n_always || elapsed_ms() < end_ms); ++i) {
                    sweep.samples[i].push_back(sweep.time(sweep.sizes[i]));
                }
            }
        }
    }

    // A size that takes far more than the one before makes expect is timed again: what a GPU does once for a size
    // (kernels loaded, memory grown) took 40 ms of a pass of 12.
    void run_first(Sweep& sweep) {
        constexpr double kSuspicious = 1.25;
        for (size_t i = 0; i < sweep.sizes.size() && (i < sweep.n_always || elapsed_ms() <= sweep.end_ms); ++i) {
            double ms = sweep.time(sweep.sizes[i]);
            if (i > 0 && ms > kSuspicious * sweep.samples.back().front() * sweep.sizes[i] / sweep.sizes[i - 1]) {
                ms = std::min(ms, sweep.time(sweep.sizes[i]));
            }
            sweep.samples.push_back({ms});
        }
    }

    [[nodiscard]] double elapsed_ms() const { return milliseconds_since(begin_); }

    // Every size up to 16, where kernels change; then steps of a quarter to a third.
    [[nodiscard]] std::vector<int32_t> verify_sizes() const {
        std::vector<int32_t> sizes;
        for (int32_t n = 1; n < options_.n_rows; n += n < 16 ? 1 : std::max(4, n / 4)) {
            sizes.push_back(n);
        }
        sizes.push_back(options_.n_rows);
        return sizes;
    }

    [[nodiscard]] std::vector<int32_t> request_sizes() const {
        std::vector<int32_t> sizes;
        for (int32_t n = 1; n < options_.n_sequences; n += std::max(1, n / 2)) {
            sizes.push_back(n);
        }
        sizes.push_back(options_.n_sequences);
        return sizes;
    }

    [[nodiscard]] int32_t random_token() {
        return static_cast<int32_t>(random_.target_sample(n_drawn_++) * target_.n_vocab());
    }

    void clear() {
        for (int32_t sequence = 0; sequence < options_.n_sequences; ++sequence) {
            target_.remove(sequence, 0);
            if (drafter_ != nullptr) {
                drafter_->forget(sequence);
            }
        }
    }

    void add_rows(int32_t sequence, int32_t begin, int32_t n, bool output) {
        for (int32_t i = 0; i < n; ++i) {
            rows_.push_back({random_token(), begin + i, sequence, output});
        }
    }

    // Returns the target's time.
    double decode_and_inject() {
        const auto begin = Clock::now();
        target_.decode(rows_);
        const double ms = milliseconds_since(begin);
        if (drafter_ != nullptr) {
            context_.clear();
            for (size_t i = 0; i < rows_.size(); ++i) {
                context_.push_back({static_cast<int32_t>(i), rows_[i].position, rows_[i].sequence});
            }
            drafter_->inject(context_);
        }
        return ms;
    }

    void fill_sequences(int32_t n) {
        const int32_t n_prompt = std::min(kPromptRows, options_.n_batch);
        clear();
        for (int32_t sequence = 0; sequence < n; ++sequence) {
            rows_.clear();
            add_rows(sequence, 0, n_prompt, false);
            (void)decode_and_inject();
        }
        end_ = n_prompt;
        n_filled_ = n;
    }

    double time_rows(int32_t n, bool output) {
        rows_.clear();
        add_rows(0, end_, n, output);
        const auto begin = Clock::now();
        target_.decode(rows_);
        const double ms = milliseconds_since(begin);
        if (n <= target_.max_rollback()) {
            target_.remove(0, end_);
        } else {
            fill_sequences(n_filled_); // a recurrent state that cannot go back so far
        }
        return ms;
    }

    // Buffers and caches warm, and as many threads at work as short passes are fastest with (thread_choice.h).
    void settle(std::span<const int32_t> sizes) {
        constexpr int32_t kPasses = 16;
        for (const int32_t n : sizes) {
            for (int32_t i = 0; i < kPasses && n <= ThreadChoice::kMostRows; ++i) {
                if (time_rows(n, true) > ThreadChoice::kShortMs) {
                    return;
                }
            }
        }
    }

    // The first pass of a shape builds a graph and writes memory that nobody has written: half a millisecond, as much
    // as such a pass of a small model takes. No request should pay for it, nor look as if its drafts did not.
    void settle_shapes() {
        constexpr int32_t kMostRows = 32; // of graphs that are kept (llama_kept_graphs.h)
        fill_sequences(1);
        const int32_t n_most = std::min({options_.n_rows, kMostRows, options_.n_cells - end_ - kPromptRows});
        double last_ms = 0;
        for (int32_t n = 1; n <= n_most && last_ms < kSmallPass; ++n) {
            last_ms = time_rows(n, true);
            if (drafter_ != nullptr) {
                inject_once(n);
            }
        }
    }

    void inject_once(int32_t n) {
        (void)time_injection(n);
        end_ -= n;
        if (n <= target_.max_rollback()) {
            target_.remove(0, end_);
            drafter_->remove(0, end_);
        } else {
            fill_sequences(1);
        }
    }

    double time_plain(int32_t n) {
        const int32_t n_before = time_rows(n, true) < kSmallPass ? kSettling : 1;
        for (int32_t i = 1; i < n_before; ++i) {
            (void)time_rows(n, true);
        }
        return time_rows(n, true);
    }

    double time_behind_draft(int32_t n) {
        if (drafter_ != nullptr) {
            draft_blocks(1);
        }
        return time_rows(n, true);
    }

    // Behind a target's pass and the injection of what it gave, which is not counted.
    double time_draft(int32_t n) {
        rows_.clear();
        for (int32_t sequence = 0; sequence < n; ++sequence) {
            add_rows(sequence, end_, 1, false);
        }
        (void)decode_and_inject();
        ++end_;
        (void)drafter_->take_times();
        const double ms = draft_blocks(n) - drafter_->take_times().inject_ms;
        --end_;
        for (int32_t sequence = 0; sequence < n; ++sequence) {
            target_.remove(sequence, end_);
            drafter_->remove(sequence, end_);
        }
        return ms;
    }

    double draft_blocks(int32_t n) {
        std::vector<DraftTask> tasks;
        for (int32_t sequence = 0; sequence < n; ++sequence) {
            DraftTask task;
            task.sequence = sequence;
            task.anchor = random_token();
            task.start = end_;
            tasks.push_back(task);
        }
        drafts_.resize(tasks.size());
        const auto begin = Clock::now();
        drafter_->draft(tasks, drafts_);
        return milliseconds_since(begin);
    }

    // A draft first injects what waits: here n rows, which stay.
    double time_injection(int32_t n) {
        rows_.clear();
        add_rows(0, end_, n, false);
        (void)decode_and_inject();
        end_ += n;
        (void)drafter_->take_times();
        (void)draft_blocks(1);
        return drafter_->take_times().inject_ms;
    }

    void measure_injection(double end_ms) {
        (void)draft_blocks(1);
        for (const int32_t n : {1, 2, 4, 8, 32, 128}) {
            if (end_ + n >= options_.n_cells || n > options_.n_batch || (n > 1 && elapsed_ms() > end_ms)) {
                return;
            }
            std::array<double, 3> samples{};
            for (double& ms : samples) {
                ms = time_injection(n);
                if (end_ + n >= options_.n_cells || elapsed_ms() > end_ms) {
                    return;
                }
            }
            std::sort(samples.begin(), samples.end());
            curves_.inject.emplace_back(n, samples[1]);
        }
    }

    // All sizes in place, behind a short prompt: what a context adds is measured apart.
    void measure_prefill(double end_ms) {
        fill_sequences(1);
        std::vector<int32_t> sizes{1, 2, 4, 8};
        std::erase_if(sizes, [&](int32_t n) { return n > options_.n_batch; });
        Sweep sweep{sizes, end_ms, [&](int32_t n) { return time_rows(n, false); }};
        run_in_turns({&sweep, 1}, end_ms);
        curves_.prefill = sweep.points();
        if (drafter_ != nullptr) {
            measure_injection(end_ms);
            fill_sequences(1);
        }
        int32_t n_chunk = 0;
        double last_ms = curves_.prefill.back().second;
        for (int32_t n = 16; n <= options_.n_batch; n *= 2) {
            if (end_ + n >= options_.n_cells || elapsed_ms() + 2 * last_ms > end_ms) {
                break;
            }
            n_chunk = n;
            last_ms = time_rows(n, false);
            if (last_ms < kShortChunk) { // the first one of a size writes memory that nobody has written yet
                last_ms = std::min(last_ms, time_rows(n, false));
            }
            curves_.prefill.emplace_back(n, last_ms);
        }
        while (n_chunk > 0 && end_ <= 2 * kBaseCells && end_ + n_chunk < options_.n_cells &&
               elapsed_ms() + 2 * last_ms <= end_ms) {
            rows_.clear();
            add_rows(0, end_, n_chunk, false);
            last_ms = decode_and_inject();
            end_ += n_chunk;
        }
    }

    // What a few rows and a block take behind the context there is.
    struct Depth {
        int32_t n_cells = 0;
        double verify_ms = 0;
        double draft_ms = 0;
    };

    Depth time_depth() {
        Depth depth{end_, lower_quartile([&] { return time_behind_draft(context_point().first); }), 0};
        if (drafter_ != nullptr && !curves_.draft.empty()) {
            (void)draft_blocks(1); // injects what was queued
            depth.draft_ms = lower_quartile([&] { return time_draft(1); });
        }
        return depth;
    }

    [[nodiscard]] std::pair<int32_t, double> context_point() const {
        return curves_.verify[std::min<size_t>(3, curves_.verify.size() - 1)];
    }

    // A context that adds little shows only beside passes that are timed as those behind it are: one after the other.
    void measure_empty() {
        if (curves_.verify.empty()) {
            return;
        }
        fill_sequences(1);
        const bool is_short = context_point().second < kLongPass && context_point().first <= target_.max_rollback();
        shallow_ = is_short ? time_depth()
                            : Depth{0, context_point().second, curves_.draft.empty() ? 0 : curves_.draft[0].second};
    }

    void measure_context() {
        if (curves_.verify.empty()) {
            return;
        }
        const auto [n_rows, base_ms] = context_point();
        const bool is_short = end_ < (base_ms < kLongPass ? kLeastCells : kBaseCells + 1);
        if (is_short || n_rows > target_.max_rollback()) {
            return; // attention is less than noise, or the context is lost with the first pass
        }
        const Depth deep = time_depth();
        const ContextLoad added{deep.n_cells - shallow_.n_cells};
        curves_.verify_ms_per_row_cell =
            std::max(0.0, deep.verify_ms - shallow_.verify_ms) / context_size(n_rows, added, kRowShare);
        curves_.draft_ms_per_block_cell =
            std::max(0.0, deep.draft_ms - shallow_.draft_ms) / context_size(1, added, 1.0);
    }

    Target& target_;
    Drafter* drafter_;
    MeasureOptions options_;
    Clock::time_point begin_ = Clock::now();
    CostCurves curves_;
    Depth shallow_;
    RandomStream random_{1};
    uint64_t n_drawn_ = 0;
    int32_t end_ = 0;      // positions that every filled sequence holds; sequence 0 may hold more
    int32_t n_filled_ = 0; // sequences
    std::vector<BatchRow> rows_;
    std::vector<ContextRow> context_;
    std::vector<BlockDraft> drafts_;
};

} // namespace

CostCurves measure_costs(Target& target, Drafter* drafter, const MeasureOptions& options) {
    return Measurement(target, drafter, options).run();
}

} // namespace dspark
