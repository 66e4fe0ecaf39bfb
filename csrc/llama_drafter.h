// The real drafter: llama.cpp's dflash backbone on a small context of its own, our sequential head on its outputs.
// Its cache holds context rows of committed tokens only, at most a window of them per sequence. Engine thread only.
#pragma once

#include "drafter.h"
#include "feature_queue.h"
#include "llama_api.h"
#include "llama_target.h"
#include "top_k.h"
#include "worker_pool.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace dspark {

struct DrafterOptions {
    int32_t n_parallel = 1;
    int32_t n_ctx = 4096;  // tokens of one request
    int32_t window = 4096; // context rows kept per request; drafters are trained at this length
    int32_t n_threads = 1;
    int32_t n_threads_batch = 1;
    std::string head = "candidates"; // candidates | full | graph
    int32_t n_candidates = kDefaultCandidates;
    bool flash_attention_off = false;
    // The draft cache is f16 or f32: quantized draft KV ruins acceptance (DESIGN section 4).
    std::string kv_type = "f16";
    // Features that may wait for their injection, all requests together. A row has m * n_embd floats (20 KB for a
    // 0.6B target, 80 KB for 8B), so this holds the whole window of one small model's request and 1,600 rows of a
    // large one: parked requests rarely reach it, and it is small beside the weights.
    size_t queue_bytes = size_t{128} << 20;
    std::shared_ptr<WorkerPool> workers; // null: the heads run on the caller's thread
    bool keep_graphs = true;             // false: llama.cpp's own passes, which give the same bits
};

class LlamaDrafter final : public Drafter {
  public:
    // Taps the target's layers. The target must outlive the drafter: it lends embedding and output head.
    LlamaDrafter(std::shared_ptr<Model> model, LlamaTarget& target, const DrafterOptions& options);

    [[nodiscard]] int32_t block_size() const override { return info_.block_size; }
    [[nodiscard]] bool has_confidence() const override { return info_.has_confidence; }
    void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) override;
    void inject(std::span<const ContextRow> rows) override;
    void begin_recording() override;
    void remove(int32_t sequence, int32_t begin) override;
    [[nodiscard]] bool can_share() const override { return context_.can_share(); }
    void copy(int32_t from, int32_t to, int32_t end) override;
    [[nodiscard]] bool can_shift() const override { return context_.can_shift(); }
    void shift(int32_t sequence, int32_t begin, int32_t n) override;
    [[nodiscard]] int32_t reusable(int32_t sequence, int32_t n) const override;
    [[nodiscard]] int32_t last_position(int32_t sequence) const override;
    [[nodiscard]] int32_t n_waiting(int32_t sequence) const override { return queue_.n_rows(sequence); }
    [[nodiscard]] DrafterTimes take_times() override { return std::exchange(times_, {}); }

    [[nodiscard]] Context& context() { return context_; }

  private:
    [[nodiscard]] int32_t n_inputs() const { return info_.block_size + (info_.sample_from_anchor ? 0 : 1); }
    void draft_heads(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts);
    void decode_blocks(std::span<const DraftTask> tasks);
    void search_rows();
    void run_heads(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts);
    void read_block(size_t index, const DraftTask& task);
    void copy_features(const ContextRow& row, std::span<float> features) const;
    void flush(std::span<const int32_t> sequences);
    void make_room(int32_t sequence);
    void collect_chunk(std::span<const int32_t> sequences);
    void inject_chunk();

    DrafterInfo info_;
    DrafterOptions options_;
    LlamaTarget& target_;
    Context context_;
    // Several where threads share them: each has requests of its own, so what it knows depends on no timing.
    std::vector<std::unique_ptr<SequentialHead>> heads_;
    std::vector<TopSearch> searches_; // one per worker

    std::vector<BatchRow> rows_;
    std::vector<const float*> logits_;             // (n_tasks * block_size) rows of n_vocab
    std::vector<std::span<const Ranked>> largest_; // of those rows, or empty
    std::vector<const float*> hidden_;             // (n_tasks * block_size) rows of n_embd
    std::vector<std::vector<Ranked>> found_;       // what workers found of them
    std::vector<BlockInput> inputs_;
    FeatureQueue queue_;
    bool is_recording_ = false;
    std::vector<const float*> layers_; // inputs of the tapped layers in the target's last pass, (n_rows, n_embd) each
    DrafterTimes times_;
    std::vector<int32_t> drafting_; // sequences of the round's tasks
    // One injection pass.
    std::vector<float> features_; // (n_rows, m * n_embd)
    std::vector<int32_t> positions_;
    std::vector<int32_t> sequences_;
};

} // namespace dspark
