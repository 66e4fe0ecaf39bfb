// The engine: many requests over one target and one drafter. Each step is admit, draft, schedule, verify, commit: one
// draft batch, one target batch, one injection. Owns: requests, sequences, the step. Must not know: llama.cpp, Python,
// text. Threads: step() belongs to one thread at a time; submit, cancel and the read-outs may be called from any.
#pragma once

#include "drafter.h"
#include "prefix_cache.h"
#include "request.h"
#include "round_decider.h"
#include "scheduler.h"
#include "synthetic_acceptance.h"
#include "target.h"
#include "worker_pool.h"

#include <atomic>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace dspark {

struct EngineOptions {
    int32_t n_ctx = 4096;    // most tokens of one request, prompt and output together
    int32_t n_parallel = 1;  // requests that run at the same time
    int32_t n_batch = 512;   // most rows of one target pass; at least n_parallel * (1 + block_size)
    int32_t max_queue = 512; // requests that may wait
    // Most rows of prompts in a pass while anyone decodes; nobody decoding: all of n_batch.
    int32_t prefill_chunk = 64;
    // A finished request leaves its cells in both caches for a later one that begins alike; where cells cannot be
    // shared or cut (a recurrent state, a sliding window), for one that goes on where it ended.
    bool prefix_reuse = true;

    SyntheticOptions synthetic; // for timing alone
};

// What the steps of a turn did for one request. The last event of a request, and only that one, has a finish reason.
struct Event {
    uint64_t request_id = 0;
    std::vector<int32_t> tokens;       // committed, without an end-of-generation token
    std::vector<bool> drafted;         // per token: an accepted draft (true) or the target's own (false)
    std::vector<TopLogprobs> logprobs; // per token when asked for
    std::vector<RoundRecord> rounds;   // its decode rounds, when the request is traced
    FinishReason finish_reason = FinishReason::none;
    std::string error; // with FinishReason::error
    RequestStats stats;
};

struct EngineStats { // totals since construction
    int64_t n_steps = 0;
    int64_t n_prefill_steps = 0; // of those, with rows of prompts; others' rounds may be part of them
    int64_t n_prefill_tokens = 0;
    int64_t n_reused = 0; // prompt tokens found in the caches instead
    int64_t n_drafted = 0;
    int64_t n_scheduled = 0;
    int64_t n_accepted = 0;
    int64_t n_committed = 0;
    int64_t n_parked = 0; // decode rounds that the scheduler left plain
    int64_t n_probes = 0;
    double prefill_ms = 0; // steps with rows of prompts; what follows is of all others
    double draft_ms = 0;   // drafting without injection, the head included
    double head_ms = 0;    // of draft_ms: the sequential head
    double verify_ms = 0;  // the target's passes
    double inject_ms = 0;  // keeping context rows, and the passes that inject them
    double sample_ms = 0;  // of host_ms: verification, sampling, log-probabilities
    double host_ms = 0;    // a step less draft, verify and inject
};

struct CachePosition {
    uint64_t request_id;
    int32_t target; // last position in the target's cache
    int32_t draft;  // last position that the drafter holds, -1: none (no drafter, or nothing kept for this request)
};

class Engine {
  public:
    // `drafter` may be null: plain decoding. `workers` too: all of a step's own work is done by who steps.
    Engine(std::unique_ptr<Target> target, std::unique_ptr<Drafter> drafter, std::unique_ptr<Scheduler> scheduler,
           const EngineOptions& options, std::shared_ptr<WorkerPool> workers = nullptr);
    ~Engine();

    // Returns the request's id. Throws std::invalid_argument, ContextFullError, QueueFullError, EngineClosedError.
    uint64_t submit(std::vector<int32_t> prompt, RequestOptions options);
    // Takes effect within one step, in the queue and during prefill too. False: no such request is waiting or running.
    bool cancel(uint64_t request_id);
    // Runs one step. A failed pass ends the requests in it with FinishReason::error; the engine lives on.
    [[nodiscard]] std::vector<Event> step();
    // As many steps as begin within budget_ms, at least one; what they did for a request is one event. Ends early when
    // a request got its first token or its last: somebody waits for those.
    [[nodiscard]] std::vector<Event> turn(double budget_ms);
    // Waits for a running step, then frees the caches. Requests end without a further event. Idempotent.
    void close();

    [[nodiscard]] bool has_work() const;
    [[nodiscard]] bool is_closed() const { return is_closed_.load(); }
    [[nodiscard]] int32_t n_running() const;
    [[nodiscard]] int32_t n_queued() const;
    [[nodiscard]] EngineStats stats() const;
    [[nodiscard]] std::vector<CachePosition> cache_positions() const; // between steps
    [[nodiscard]] const EngineOptions& options() const { return options_; }
    [[nodiscard]] bool can_shift() const { return is_shifting_; } // requests may ask for a context shift

    // Times passes of all sizes the engine can reach, for at most budget_ms, and gives them to the scheduler. Only
    // while nothing runs. Throws DSparkError otherwise, EngineClosedError.
    CostCurves measure_costs(double budget_ms);
    // A few sizes, see MeasureOptions; the scheduler keeps what it has.
    CostCurves look_at_costs(double budget_ms);
    // The curves with what was learned since; waits for a running step.
    [[nodiscard]] CostCurves costs() const;
    void set_costs(const CostCurves& curves);
    // Recent committed tokens per time against plain decoding (estimated from the costs), at least 1.
    [[nodiscard]] double speedup() const;

  private:
    // One running request in this step: its rows in the target's batch, and what was drafted for it.
    struct Lane {
        Request* request = nullptr;
        bool is_prefill = false;
        bool is_drafting = false;
        int32_t most = 0;       // longest prefix its limits allow
        int32_t prefix_len = 0; // drafted tokens sent to the target
        int32_t first_row = 0;
        int32_t n_rows = 0;
        int32_t n_committed = 0; // tokens that its round added
        size_t draft = 0;        // index into drafts_
        size_t proposal = 0;     // index into proposals_, when it decodes
    };

    struct Decision { // about a lane's rows
        VerifyResult result;
        std::exception_ptr error;
    };

    void run_step();
    void admit();
    void draft();
    void schedule();
    void verify();
    void commit();

    void take_cancelled();
    void take_queued();
    void open_lanes();
    [[nodiscard]] int32_t tokens_left(const Request& request) const;
    [[nodiscard]] int32_t most_drafts(const Request& request) const;
    void propose();
    [[nodiscard]] StepLoad step_load() const;
    void learn(double total_ms);
    void add_decode_rows(Lane& lane);
    [[nodiscard]] int32_t prefill_room(int32_t n_decode_rows) const;
    void add_prompts();
    void add_prefill_rows(Lane& lane, int32_t n_rows);
    void commit_prefill(Lane& lane);
    void commit_round(Lane& lane, const Decision& decision);
    void record_decision(const Lane& lane);
    void decide_rounds();
    void find_likeliest();
    [[nodiscard]] VerifyResult decide(const Lane& lane, RoundDecider& decider) const;
    void set_synthetic_confidences();
    [[nodiscard]] int32_t accepted_text(const Lane& lane, int32_t n_accepted) const;
    void append(Lane& lane, const VerifyResult& result);
    void trace_round(const Lane& lane, const VerifyResult& result);
    [[nodiscard]] const Policy& policy_of(const Request& request) const;
    [[nodiscard]] bool keeps_context(const Request& request) const;
    void keep_context(const Lane& lane, int32_t n_rows);
    void inject();
    void shift_full();
    void shift(Request& request);
    void finish(Request& request, FinishReason reason, const std::string& error = {});
    [[nodiscard]] int32_t reusable(const Request& request, int32_t sequence, std::span<const int32_t> tokens) const;
    [[nodiscard]] bool can_share() const { return target_->can_share() && (!drafter_ || drafter_->can_share()); }
    [[nodiscard]] std::pair<int32_t, int32_t> longest_prefix(const Request& request) const;
    void place(Request& request);
    void cut(int32_t sequence, int32_t begin);
    void release(Request& request, bool is_clean);
    void drop_idle();
    void fail_step(const std::string& error);
    void tell_stats();
    void record_step(double total_ms);
    [[nodiscard]] double plain_step_ms() const;
    [[nodiscard]] CostCurves time_passes(double budget_ms, bool is_look);
    Event& event_of(const Request& request);

    EngineOptions options_;
    std::unique_ptr<Target> target_;
    std::unique_ptr<Drafter> drafter_;
    std::unique_ptr<Scheduler> scheduler_;
    std::optional<SyntheticAcceptance> synthetic_;

    mutable std::mutex inbox_mutex_; // guards the four below
    std::deque<std::unique_ptr<Request>> queue_;
    std::unordered_set<uint64_t> cancelled_;
    std::unordered_set<uint64_t> alive_;
    uint64_t next_id_ = 1;

    mutable std::mutex step_mutex_; // held through a step
    std::atomic<bool> is_closed_{false};
    std::atomic<int32_t> n_running_{0};
    std::vector<std::unique_ptr<Request>> running_;
    PrefixCache sequences_;
    bool is_shifting_ = false;
    size_t n_turns_ = 0; // passes with prompts: whose turn it is when rows are fewer than prompts

    // The step's own: cleared at its start, capacity kept.
    std::vector<Lane> lanes_;
    std::vector<Proposal> proposals_;
    std::vector<int32_t> prefix_len_;
    std::vector<DraftTask> tasks_;
    std::vector<BlockDraft> drafts_;
    std::vector<BatchRow> rows_;
    std::vector<ContextRow> context_rows_;
    std::vector<Event> events_;                      // of this turn
    bool is_awaited_ = false;                        // so the turn ends with this step
    std::vector<size_t> deciding_;                   // lanes with a decode round
    std::vector<Decision> decisions_;                // by lane
    std::vector<std::span<const float>> row_logits_; // by batch row, of those that are read
    std::vector<int32_t> likeliest_;                 // by batch row; -1: not looked for
    std::vector<size_t> searched_rows_;              // batch rows of which the likeliest token is all that is read
    StepLoad load_;
    std::optional<Clock::time_point> last_step_end_; // empty: nothing was running then
    double pause_ms_ = 0;                            // between the last step and this one, the caller's work
    std::shared_ptr<WorkerPool> workers_;
    std::vector<RoundDecider> deciders_; // one per worker
    EngineStats step_;                   // figures of this step alone
    EngineStats stats_;                  // totals, guarded by inbox_mutex_
};

} // namespace dspark
