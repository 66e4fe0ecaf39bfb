// The narrow face of llama.cpp: RAII handles whose every llama.cpp status is checked once, here, and becomes an
// exception. Only llama_api*.cpp include its headers. Whatever would abort inside llama.cpp is checked before
// the call. A Model may be shared by threads once loaded; a Context belongs to the thread that steps the engine.
#pragma once

#include "sequential_head.h"
#include "target.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace dspark {

struct ModelOptions {
    int32_t n_gpu_layers = -1; // layers on the GPU; negative: all
    bool use_mmap = true;
    bool check_tensors = false; // scan the weights for invalid values while loading
    bool use_kernels = true;    // our products on the CPU (csrc/kernels); false: ggml's, with repacked weights
};

// What a drafter GGUF says about itself (DESIGN section 3).
struct DrafterInfo {
    int32_t block_size = 0;             // gamma: slots that predict
    std::vector<int32_t> target_layers; // llama.cpp layer inputs = HF layer ids + 1
    int32_t mask_token = -1;
    MarkovHeadType head_type = MarkovHeadType::none;
    int32_t markov_rank = 0;
    bool sample_from_anchor = true; // false: 1 + gamma inputs, slot 0 predicts nothing
    bool is_causal = false;         // attention inside the block
    bool has_confidence = false;
    bool confidence_with_markov = true;
    bool owns_embedding = false; // false: borrowed from the target
    bool owns_output = false;
    int32_t n_vocab_draft = 0; // rows of the drafter's output head (= n_vocab without d2t)
    float logit_softcap = 0.0F;
};

struct TensorBytes { // one tensor of a GGUF file, as it lies there
    std::string name;
    std::string type;
    std::vector<int64_t> shape; // ggml order: row length first
    std::vector<std::byte> data;
    size_t row_bytes = 0;
};

struct DeviceInfo {
    std::string name;
    std::string description;
    std::string kind; // cpu | gpu | igpu | accel
    size_t memory_free_bytes = 0;
    size_t memory_total_bytes = 0;
};

struct BuildInfo {
    std::string version;
    std::string llama_cpp_commit;
    std::string system_info; // CPU features as llama.cpp prints them
    std::vector<DeviceInfo> devices;
    std::vector<std::string> backends;
};

[[nodiscard]] BuildInfo build_info();
[[nodiscard]] int32_t n_math_threads(); // cores this process may use, without hyper-threads
// 0 silent, 1 errors, 2 warnings, 3 info, 4 debug; what llama.cpp logs goes to stderr.
void set_log_level(int level);
// K-quants and mixtures through llama_model_quantize; tensors named in `keep` stay as they are.
void quantize_model(const std::string& source, const std::string& destination, const std::string& type_name,
                    const std::vector<std::string>& keep, int32_t n_threads);

class Model {
  public:
    // Throws ModelLoadError naming the file and the cause.
    [[nodiscard]] static std::shared_ptr<Model> load_target(const std::string& path, const ModelOptions& options);
    // Loads the backbone of a drafter through llama.cpp and holds its heads back. Throws ModelLoadError, and
    // ModelMismatchError with every reason why the two do not fit.
    [[nodiscard]] static std::shared_ptr<Model> load_drafter(const std::string& path, const ModelOptions& options,
                                                             std::shared_ptr<Model> target);
    ~Model();
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    [[nodiscard]] const std::string& path() const;
    [[nodiscard]] std::string architecture() const;
    [[nodiscard]] std::string description() const;
    [[nodiscard]] uint64_t size_bytes() const;
    [[nodiscard]] bool uses_kernels() const; // our products on the CPU
    [[nodiscard]] uint64_t n_params() const;
    [[nodiscard]] int32_t n_vocab() const;
    [[nodiscard]] int32_t n_embd() const;
    [[nodiscard]] int32_t n_layer() const;
    [[nodiscard]] int32_t n_ctx_train() const;
    // Numbers that one token leaves in the KV cache, layers with a sliding window or a recurrent state not counted.
    [[nodiscard]] int64_t kv_values_per_token() const;
    // The highest layer input the graph records; -1: none, and a tap would abort at the first decode.
    [[nodiscard]] int32_t last_tappable_layer() const;
    [[nodiscard]] bool can_tap_layers() const { return last_tappable_layer() >= 0; }
    // Layers with a recurrent state beside or in place of attention. Batches of unequal lengths then take several
    // passes.
    [[nodiscard]] bool has_state() const;
    [[nodiscard]] int64_t state_values() const; // numbers in one recurrent state, all layers
    [[nodiscard]] bool can_roll_back() const;   // rejected rows can be taken out again
    [[nodiscard]] std::vector<std::pair<std::string, std::string>> metadata() const;

    // Text. All of it is thread-safe.
    [[nodiscard]] std::vector<int32_t> tokenize(const std::string& text, bool add_special, bool parse_special) const;
    [[nodiscard]] std::string token_to_piece(int32_t token, bool special) const; // bytes, perhaps not whole UTF-8
    [[nodiscard]] std::string detokenize(std::span<const int32_t> tokens, bool special) const;
    [[nodiscard]] bool is_end_of_generation(int32_t token) const;
    [[nodiscard]] bool is_control(int32_t token) const;
    [[nodiscard]] int32_t bos_token() const; // -1: none
    [[nodiscard]] int32_t eos_token() const;
    [[nodiscard]] bool adds_bos() const;
    [[nodiscard]] std::optional<std::string> chat_template() const;
    // messages_json, tools_json: OpenAI's shapes. Returns the prompt.
    [[nodiscard]] std::string apply_chat_template(const std::string& messages_json, const std::string& tools_json,
                                                  const std::string& template_override, bool add_generation_prompt,
                                                  bool enable_thinking) const;

    [[nodiscard]] bool is_drafter() const;
    // Drafters only.
    [[nodiscard]] const DrafterInfo& drafter_info() const;
    [[nodiscard]] const HeadWeights& head_weights() const; // valid while the model lives
    [[nodiscard]] std::string output_device() const;       // where the output layer lies; empty: the CPU

    struct Impl;
    [[nodiscard]] Impl& impl() const { return *impl_; }

  private:
    explicit Model(std::unique_ptr<Impl> impl);
    std::unique_ptr<Impl> impl_;
};

struct ContextOptions {
    int32_t n_cells = 0;  // cells of the KV cache, shared by all sequences
    int32_t n_batch = 0;  // most rows of one decode
    int32_t n_ubatch = 0; // rows of one forward pass
    int32_t n_sequences = 1;
    int32_t n_outputs = 0;  // most rows with logits in one decode
    int32_t n_rollback = 0; // recurrent states kept behind the newest, per sequence; attention needs none
    int32_t n_threads = 0;
    int32_t n_threads_batch = 0;
    bool embeddings = false; // also return the state before the output head
    bool is_causal = true;
    std::string kv_type = "f16"; // f32 | f16 | bf16 | q8_0 | q4_0
    bool flash_attention_off = false;
    bool offload_kv = true;
    int32_t n_kept_rows = 0; // passes of at most so many rows keep their graphs by shape (llama_kept_graphs.h)
};

class Context {
  public:
    // `other` lends embedding and output head to a drafter; it must outlive this context.
    Context(std::shared_ptr<Model> model, const ContextOptions& options, Context* other = nullptr);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    // Each throws DecodeError; the rows of the call are then in no sequence.
    void decode_tokens(std::span<const BatchRow> rows);
    // features (n_rows, n_features): injects drafter context (DESIGN section 2, injection). With `outputs`, embedding()
    // then yields H_ctx; it costs a logit buffer of n_rows * V floats, so only tests ask for it.
    void decode_features(std::span<const float> features, std::span<const int32_t> positions,
                         std::span<const int32_t> sequences, bool outputs = false);
    // Passes from now on look for the k largest logits of each row where they can; 0: they do not.
    void search_logits(int32_t k);
    // Views of the last decode, indexed by batch row; dead after the next decode.
    [[nodiscard]] std::span<const float> logits(int32_t row);              // (n_vocab)
    [[nodiscard]] std::span<const float> embedding(int32_t row);           // (n_embd)
    [[nodiscard]] std::span<const float> layer_input(int32_t layer) const; // (n_rows, n_embd)
    // Ids and logits as TopSearch::top() gives them; empty where none were looked for, or the row holds what it
    // refuses.
    [[nodiscard]] std::span<const Ranked> largest_logits(int32_t row);
    void tap_layer(int32_t layer);

    void remove(int32_t sequence, int32_t begin, int32_t end); // cells at positions [begin, end); end < 0: all after
    // Cells of `from` at positions [begin, end) belong to `to` as well.
    void copy(int32_t from, int32_t to, int32_t begin, int32_t end);
    [[nodiscard]] bool can_share() const; // a plain attention cache: neither a state nor a sliding window
    // Removes positions [begin, begin + n) and moves the later cells n to the front: their keys are rotated anew.
    void shift(int32_t sequence, int32_t begin, int32_t n);
    [[nodiscard]] bool can_shift() const;
    [[nodiscard]] int32_t max_rollback() const; // positions that remove() can take from the end of a sequence
    void clear();
    [[nodiscard]] int32_t last_position(int32_t sequence) const; // -1: empty
    [[nodiscard]] int32_t first_position(int32_t sequence) const;
    void synchronize();
    [[nodiscard]] size_t memory_bytes() const; // context and compute buffers on all devices, without kept graphs
    // Of the graphs that are kept, which come while it is used; any thread may look. Null: none ever.
    [[nodiscard]] std::shared_ptr<const std::atomic<size_t>> kept_bytes() const;
    [[nodiscard]] int64_t n_graphs_built() const; // of those that are kept
    [[nodiscard]] const Model& model() const { return *model_; }

    struct Impl;
    [[nodiscard]] Impl& impl() const { return *impl_; }

  private:
    void own_cells(int32_t sequence);

    std::shared_ptr<Model> model_;
    std::unique_ptr<Impl> impl_;
};

} // namespace dspark
