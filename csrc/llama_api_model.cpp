// Loading targets and drafters, and what they know of text.
#include "llama_api_impl.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>

namespace dspark {

namespace {

// ---- rows of weights ----

void copy_f32(const void* source, float* destination, int64_t n) {
    std::memcpy(destination, source, static_cast<size_t>(n) * sizeof(float));
}

RowTable row_table(const TensorBytes& tensor) {
    const ggml_type type = parse_type(tensor.type);
    const ggml_to_float_t decode = type == GGML_TYPE_F32 ? copy_f32 : ggml_get_type_traits(type)->to_float;
    if (decode == nullptr) {
        throw std::runtime_error("cannot read tensor " + tensor.name + ": type " + tensor.type + " cannot be decoded");
    }
    const int64_t n_rows = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
    return {tensor.data.data(), tensor.row_bytes, n_rows, tensor.shape[0],
            reinterpret_cast<void (*)(const void*, float*, int64_t)>(decode)};
}

std::vector<float> to_floats(const TensorBytes& tensor) {
    const RowTable table = row_table(tensor);
    std::vector<float> values(static_cast<size_t>(table.n_rows * table.n_cols));
    for (int64_t row = 0; row < table.n_rows; ++row) {
        table.decode(row, values.data() + row * table.n_cols);
    }
    return values;
}

llama_model_params model_params(const ModelOptions& options) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = options.n_gpu_layers;
    params.load_mode = options.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
    params.check_tensors = options.check_tensors;
    params.progress_callback = [](float, void*) { return true; };
    return params;
}

void adopt(Model::Impl& impl, llama_model* model) {
    impl.model = model;
    impl.vocab = llama_model_get_vocab(model);
}

} // namespace

bool is_tappable(llm_arch architecture) {
    static const std::set<llm_arch> architectures = {
        LLM_ARCH_QWEN3,     LLM_ARCH_QWEN3MOE,   LLM_ARCH_QWEN3NEXT,      LLM_ARCH_QWEN35,     LLM_ARCH_QWEN35MOE,
        LLM_ARCH_LLAMA,     LLM_ARCH_GEMMA4,     LLM_ARCH_LFM2,           LLM_ARCH_LFM2MOE,    LLM_ARCH_OPENAI_MOE,
        LLM_ARCH_DEEPSEEK4, LLM_ARCH_NEMOTRON_H, LLM_ARCH_NEMOTRON_H_MOE, LLM_ARCH_MINIMAX_M2,
    };
    return architectures.contains(architecture);
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

std::shared_ptr<Model> Model::load_target(const std::string& path, const ModelOptions& options) {
    ensure_backend();
    {
        const GgufFile file(path);
        file.check();
        if (file.text("general.architecture") == "dflash") {
            throw ModelLoadError("cannot load " + path + " as a target: it is a drafter");
        }
    }
    auto impl = std::make_unique<Impl>();
    impl->path = path;
    clear_error();
    const AbortGuard guard;
    llama_model* model = llama_model_load_from_file(path.c_str(), model_params(options));
    if (model == nullptr) {
        throw ModelLoadError("cannot load " + path + ": " + take_error("llama.cpp gave no reason"));
    }
    adopt(*impl, model);
    if (!llama_model_has_decoder(model) || llama_model_has_encoder(model) || llama_model_is_diffusion(model)) {
        throw ModelLoadError("cannot load " + path + ": the model does not generate text token by token");
    }
    if (llama_vocab_n_tokens(impl->vocab) < 1 || llama_vocab_type(impl->vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw ModelLoadError("cannot load " + path + ": the file holds no vocabulary");
    }
    return std::shared_ptr<Model>(new Model(std::move(impl)));
}

// ---- drafters ----

namespace {

MarkovHeadType read_head_type(const GgufFile& file) {
    const std::string name = file.text("dflash.markov_head_type");
    if (name.empty() || name == "vanilla") {
        return MarkovHeadType::vanilla;
    }
    if (name == "gated") {
        return MarkovHeadType::gated;
    }
    if (name == "rnn") {
        return MarkovHeadType::rnn;
    }
    throw ModelLoadError("cannot load " + file.path + ": dflash.markov_head_type must be vanilla, gated or rnn, got " +
                         name);
}

constexpr std::array kHeadTensors = {
    "markov_w1.weight",    "markov_w2.weight",  "markov_w2.scale",  "markov_gate.weight", "markov_gate.bias",
    "markov_joint.weight", "markov_joint.bias", "conf_proj.weight", "conf_proj.bias",
};

DrafterInfo read_drafter_info(const GgufFile& file) {
    DrafterInfo info;
    info.block_size = static_cast<int32_t>(file.integer("dflash.block_size", 0));
    info.target_layers = file.integers("dflash.target_layers");
    info.mask_token = static_cast<int32_t>(file.integer("tokenizer.ggml.mask_token_id", -1));
    info.sample_from_anchor = file.boolean("dflash.sample_from_anchor", true);
    info.is_causal = file.boolean("dflash.attention.causal", false);
    info.logit_softcap = file.real("dflash.final_logit_softcapping", 0.0F);
    if (const ggml_tensor* confidence = file.tensor("conf_proj.weight")) {
        info.has_confidence = true;
        // Upstream's converter writes no such key: the width tells whether the head reads the embedding too.
        const bool is_wide = confidence->ne[0] != file.integer("dflash.embedding_length", 0);
        info.confidence_with_markov = file.boolean("dflash.confidence_with_markov", is_wide);
    }
    info.owns_embedding = file.tensor("token_embd.weight") != nullptr;
    info.owns_output = file.tensor("output.weight") != nullptr;
    if (const ggml_tensor* w1 = file.tensor("markov_w1.weight")) {
        info.head_type = read_head_type(file);
        info.markov_rank = static_cast<int32_t>(w1->ne[0]);
    }
    if (const ggml_tensor* d2t = file.tensor("d2t")) {
        info.n_vocab_draft = static_cast<int32_t>(d2t->ne[0]);
    }
    return info;
}

std::string shape_text(const ggml_tensor* tensor) {
    std::string text = "[";
    for (int i = 0; i < ggml_n_dims(tensor); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(tensor->ne[i]);
    }
    return text + "]";
}

// Everything about a drafter file that llama.cpp or the heads would trip over, collected in one go.
class DrafterCheck {
  public:
    DrafterCheck(const GgufFile& file, const DrafterInfo& info, const Model& target)
        : file_(file), info_(info), target_(target) {}

    std::vector<std::string> run() {
        check_header();
        check_pair();
        check_heads();
        return reasons_;
    }

  private:
    void require(bool holds, const std::string& reason) {
        if (!holds) {
            reasons_.push_back(reason);
        }
    }

    void require_shape(const std::string& name, std::array<int64_t, 2> shape, bool optional = false) {
        const ggml_tensor* tensor = file_.tensor(name);
        if (tensor == nullptr) {
            require(optional, "tensor " + name + " is missing");
            return;
        }
        require(tensor->ne[0] == shape[0] && tensor->ne[1] == shape[1] && tensor->ne[2] == 1 && tensor->ne[3] == 1,
                "tensor " + name + " must have shape [" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) +
                    "], got " + shape_text(tensor));
    }

    void check_header() {
        require(info_.block_size >= 1 && info_.block_size <= 256,
                "dflash.block_size must be in 1 .. 256, got " + std::to_string(info_.block_size));
        require(!info_.target_layers.empty() && info_.target_layers.size() <= 64,
                "dflash.target_layers must name 1 to 64 layers, got " + std::to_string(info_.target_layers.size()));
        for (const int32_t layer : info_.target_layers) {
            require(layer >= 0 && layer <= target_.n_layer(), "dflash.target_layers must lie in 0 .. " +
                                                                  std::to_string(target_.n_layer()) +
                                                                  " for this target, got " + std::to_string(layer));
        }
        require(file_.tensor("selector_hidden.weight") == nullptr, "DFlash 2 selector drafters are not supported");
        require(file_.integer("dflash.hyper_connection_count", 0) == 0, "DeepSeek-V4 drafters are not supported");
    }

    void check_pair() {
        const int64_t n_embd = file_.integer("dflash.embedding_length", 0);
        require(n_embd == target_.n_embd(), "hidden sizes must be equal: drafter " + std::to_string(n_embd) +
                                                ", target " + std::to_string(target_.n_embd()));
        require(info_.mask_token >= 0 && info_.mask_token < target_.n_vocab(),
                "tokenizer.ggml.mask_token_id must be in [0, " + std::to_string(target_.n_vocab()) + "), got " +
                    std::to_string(info_.mask_token));
        require(target_.can_tap_layers(),
                "the target's architecture " + target_.architecture() + " does not expose its layers");
        require(target_.can_roll_back(), "the target's architecture " + target_.architecture() +
                                             " keeps a recurrent state that rejected tokens cannot be taken out of");
    }

    void check_heads() {
        const int64_t d = target_.n_embd();
        const int64_t r = info_.markov_rank;
        const int64_t n_vocab = target_.n_vocab();
        const int64_t n_draft = info_.n_vocab_draft > 0 ? info_.n_vocab_draft : n_vocab;
        require(n_draft <= n_vocab, "d2t must not be longer than the vocabulary, got " + std::to_string(n_draft));
        require(info_.n_vocab_draft == 0 || info_.owns_output,
                "a reduced draft vocabulary needs its own output.weight");
        require_shape("token_embd.weight", {d, n_vocab}, true);
        require_shape("output.weight", {d, n_draft}, true);
        require_shape("fc.weight", {d * static_cast<int64_t>(info_.target_layers.size()), d});
        require(file_.tensor("markov_w2.weight") == nullptr || info_.head_type != MarkovHeadType::none,
                "tensor markov_w1.weight is missing");
        if (info_.head_type != MarkovHeadType::none) {
            require_shape("markov_w1.weight", {r, n_vocab});
            require_shape("markov_w2.weight", {r, n_draft});
            require(file_.tensor("markov_w2.scale") == nullptr, "scaled markov_w2 is not supported");
        }
        if (info_.head_type == MarkovHeadType::gated) {
            require_shape("markov_gate.weight", {d + r, r});
            require_shape("markov_gate.bias", {r, 1}, true);
        }
        if (info_.head_type == MarkovHeadType::rnn) {
            require_shape("markov_joint.weight", {2 * r + d, 3 * r});
            require_shape("markov_joint.bias", {3 * r, 1}, true);
        }
        require_shape("conf_proj.weight", {info_.confidence_with_markov ? d + r : d, 1}, true);
        require_shape("conf_proj.bias", {1, 1}, true);
    }

    const GgufFile& file_;
    const DrafterInfo& info_;
    const Model& target_;
    std::vector<std::string> reasons_;
};

std::string join(const std::vector<std::string>& reasons) {
    std::string text;
    for (const std::string& reason : reasons) {
        text += (text.empty() ? "" : "; ") + reason;
    }
    return text;
}

// llama.cpp takes a lone token_embd for the output head too, which is right for tied targets only: then both are
// borrowed from the target instead (the drafter's are frozen copies of the target's).
bool must_borrow_embedding(const GgufFile& file, const Model& target) {
    if (file.tensor("token_embd.weight") == nullptr || file.tensor("output.weight") != nullptr) {
        return false;
    }
    const GgufFile target_file(target.path());
    return target_file.tensor("output.weight") != nullptr;
}

std::vector<int64_t> read_d2t(const GgufFile& file, int64_t n_vocab) {
    if (file.tensor("d2t") == nullptr) {
        return {};
    }
    const TensorBytes bytes = file.read("d2t");
    if (bytes.type != "i64") {
        throw ModelLoadError("cannot load " + file.path + ": d2t must be of type i64, got " + bytes.type);
    }
    std::vector<int64_t> map(bytes.data.size() / sizeof(int64_t));
    std::memcpy(map.data(), bytes.data.data(), bytes.data.size());
    std::set<int64_t> seen;
    for (const int64_t id : map) {
        if (id < 0 || id >= n_vocab || !seen.insert(id).second) {
            throw ModelLoadError("cannot load " + file.path + ": d2t must hold distinct ids below " +
                                 std::to_string(n_vocab) + ", got " + std::to_string(id));
        }
    }
    return map;
}

void read_heads(const GgufFile& file, Model::Impl& impl, const Model& target) {
    for (const char* name : kHeadTensors) {
        if (file.tensor(name) != nullptr) {
            impl.head_tensors.emplace(name, file.read(name));
        }
    }
    auto table = [&](const char* name) {
        const auto found = impl.head_tensors.find(name);
        return found == impl.head_tensors.end() ? RowTable{} : row_table(found->second);
    };
    auto values = [&](const char* name) {
        const auto found = impl.head_tensors.find(name);
        return found == impl.head_tensors.end() ? std::vector<float>{} : to_floats(found->second);
    };
    HeadWeights& heads = impl.heads;
    heads.type = impl.info.head_type;
    heads.n_vocab = target.n_vocab();
    heads.hidden_size = target.n_embd();
    heads.rank = impl.info.markov_rank;
    heads.w1 = table("markov_w1.weight");
    heads.w2 = table("markov_w2.weight");
    heads.gate = table("markov_gate.weight");
    heads.gate_bias = values("markov_gate.bias");
    heads.joint = table("markov_joint.weight");
    heads.joint_bias = values("markov_joint.bias");
    heads.d2t = read_d2t(file, target.n_vocab());
    heads.logit_softcap = impl.info.logit_softcap;
    if (impl.info.has_confidence) {
        const std::vector<float> bias = values("conf_proj.bias");
        heads.confidence.emplace(values("conf_proj.weight"), bias.empty() ? 0.0F : bias[0], heads.hidden_size,
                                 heads.rank);
    }
    validate_weights(heads);
}

// The way llama_model_load_from_file goes, with the head tensors taken out of the loader's list first: mmap, repacking
// and offload stay as they are, and the graph leaves out its greedy Markov chain.
llama_model* load_backbone(const GgufFile& file, const ModelOptions& options, Model::Impl& impl,
                           bool borrow_embedding) {
    llama_model_params params = model_params(options);
    params.devices = impl.devices.data();
    std::vector<std::string> splits;
    llama_model_loader loader(nullptr, nullptr, nullptr, file.path, splits, nullptr, params.load_mode,
                              params.check_tensors, params.no_alloc, params.load_mtp, nullptr, nullptr);
    std::vector<std::string> held(kHeadTensors.begin(), kHeadTensors.end());
    if (borrow_embedding) {
        held.emplace_back("token_embd.weight");
    }
    for (const std::string& name : held) {
        loader.n_tensors -= static_cast<int>(loader.weights_map.erase(name));
    }
    std::unique_ptr<llama_model> model(llama_model_create(loader, params));
    auto* base = dynamic_cast<llama_model_base*>(model.get());
    if (base == nullptr) {
        throw std::runtime_error("llama.cpp cannot build this architecture");
    }
    for (size_t i = 0; i + 1 < impl.devices.size(); ++i) {
        base->devices.push_back({false, impl.devices[i]});
    }
    base->load_hparams(loader);
    base->load_vocab(loader);
    base->load_stats(loader);
    if (!base->load_tensors(loader)) {
        throw std::runtime_error("loading was interrupted");
    }
    return model.release();
}

} // namespace

std::shared_ptr<Model> Model::load_drafter(const std::string& path, const ModelOptions& options,
                                           std::shared_ptr<Model> target) {
    ensure_backend();
    if (target->is_drafter()) {
        throw ModelMismatchError("cannot draft for " + target->path() + ": it is a drafter itself");
    }
    const GgufFile file(path);
    file.check();
    const std::string architecture = file.text("general.architecture");
    if (architecture != "dflash") {
        throw ModelLoadError("cannot load " + path + " as a drafter: its architecture must be dflash, got " +
                             architecture);
    }
    auto impl = std::make_unique<Impl>();
    impl->path = path;
    impl->target = std::move(target);
    const Model& owner = *impl->target;
    impl->info = read_drafter_info(file);
    if (const auto reasons = DrafterCheck(file, impl->info, owner).run(); !reasons.empty()) {
        throw ModelMismatchError("cannot draft with " + path + ": " + join(reasons));
    }
    for (int32_t i = 0; i < llama_model_n_devices(owner.impl().model); ++i) {
        impl->devices.push_back(llama_model_get_device(owner.impl().model, i));
    }
    impl->devices.push_back(nullptr);
    const bool borrow_embedding = must_borrow_embedding(file, owner);
    impl->info.owns_embedding = impl->info.owns_embedding && !borrow_embedding;
    if (impl->info.n_vocab_draft == 0) {
        impl->info.n_vocab_draft = owner.n_vocab();
    }
    clear_error();
    const AbortGuard guard;
    try {
        adopt(*impl, load_backbone(file, options, *impl, borrow_embedding));
        read_heads(file, *impl, owner);
    } catch (const ModelLoadError&) {
        throw; // names the file already
    } catch (const std::exception& error) {
        throw ModelLoadError("cannot load " + path + ": " + error.what());
    }
    if (llama_vocab_n_tokens(impl->vocab) != owner.n_vocab()) {
        throw ModelMismatchError("cannot draft with " + path + ": vocabularies must be equal: drafter " +
                                 std::to_string(llama_vocab_n_tokens(impl->vocab)) + ", target " +
                                 std::to_string(owner.n_vocab()));
    }
    return std::shared_ptr<Model>(new Model(std::move(impl)));
}

bool Model::is_drafter() const { return impl_->target != nullptr; }

const DrafterInfo& Model::drafter_info() const {
    if (!is_drafter()) {
        throw std::invalid_argument("drafter_info needs a drafter, got the target " + impl_->path);
    }
    return impl_->info;
}

const HeadWeights& Model::head_weights() const { return impl_->heads; }

std::string Model::output_device() const {
    ggml_backend_dev_t device = impl_->model->dev_output();
    const bool is_cpu = device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU;
    return is_cpu ? "" : ggml_backend_dev_name(device);
}

// ---- facts ----

const std::string& Model::path() const { return impl_->path; }
std::string Model::architecture() const { return llm_arch_name(impl_->model->arch); }
uint64_t Model::size_bytes() const { return llama_model_size(impl_->model); }
uint64_t Model::n_params() const { return llama_model_n_params(impl_->model); }
int32_t Model::n_vocab() const { return llama_vocab_n_tokens(impl_->vocab); }
int32_t Model::n_embd() const { return llama_model_n_embd(impl_->model); }
int32_t Model::n_layer() const { return llama_model_n_layer(impl_->model); }
int32_t Model::n_ctx_train() const { return llama_model_n_ctx_train(impl_->model); }
int64_t Model::kv_values_per_token() const {
    const llama_hparams& hparams = impl_->model->hparams;
    int64_t n = 0;
    for (uint32_t layer = 0; layer < hparams.n_layer(); ++layer) {
        if (!hparams.is_swa(layer) && !hparams.is_recr(layer)) {
            n += hparams.n_embd_k_gqa(layer) + hparams.n_embd_v_gqa(layer);
        }
    }
    return n;
}

bool Model::can_tap_layers() const { return is_tappable(impl_->model->arch); }

bool Model::can_roll_back() const {
    return !llama_model_is_recurrent(impl_->model) && !llama_model_is_hybrid(impl_->model);
}

std::string Model::description() const {
    std::array<char, 128> buffer{};
    llama_model_desc(impl_->model, buffer.data(), buffer.size());
    return buffer.data();
}

std::vector<std::pair<std::string, std::string>> Model::metadata() const {
    std::vector<std::pair<std::string, std::string>> entries;
    for (const auto& [key, value] : impl_->model->gguf_kv) {
        entries.emplace_back(key, value);
    }
    return entries;
}

// ---- text ----

std::vector<int32_t> Model::tokenize(const std::string& text, bool add_special, bool parse_special) const {
    if (text.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max() - 16)) {
        throw std::invalid_argument("text must be shorter than 2 GiB, got " + std::to_string(text.size()) + " bytes");
    }
    const auto n_bytes = static_cast<int32_t>(text.size());
    std::vector<int32_t> tokens(text.size() + 8);
    int32_t n = llama_tokenize(impl_->vocab, text.data(), n_bytes, tokens.data(), static_cast<int32_t>(tokens.size()),
                               add_special, parse_special);
    if (n < 0) {
        tokens.resize(static_cast<size_t>(-static_cast<int64_t>(n)));
        n = llama_tokenize(impl_->vocab, text.data(), n_bytes, tokens.data(), static_cast<int32_t>(tokens.size()),
                           add_special, parse_special);
    }
    tokens.resize(static_cast<size_t>(std::max(n, 0)));
    return tokens;
}

std::string Model::token_to_piece(int32_t token, bool special) const {
    if (token < 0 || token >= n_vocab()) {
        throw std::invalid_argument("token must be in [0, " + std::to_string(n_vocab()) + "), got " +
                                    std::to_string(token));
    }
    std::string piece(64, '\0');
    int32_t n = llama_token_to_piece(impl_->vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    if (n < 0) {
        piece.resize(static_cast<size_t>(-n));
        n = llama_token_to_piece(impl_->vocab, token, piece.data(), static_cast<int32_t>(piece.size()), 0, special);
    }
    piece.resize(static_cast<size_t>(std::max(n, 0)));
    return piece;
}

std::string Model::detokenize(std::span<const int32_t> tokens, bool special) const {
    std::string text;
    for (const int32_t token : tokens) {
        text += token_to_piece(token, special);
    }
    return text;
}

bool Model::is_end_of_generation(int32_t token) const { return llama_vocab_is_eog(impl_->vocab, token); }

bool Model::is_control(int32_t token) const {
    return token >= 0 && token < n_vocab() && llama_vocab_is_control(impl_->vocab, token);
}

int32_t Model::bos_token() const { return llama_vocab_bos(impl_->vocab); }
int32_t Model::eos_token() const { return llama_vocab_eos(impl_->vocab); }
bool Model::adds_bos() const { return llama_vocab_get_add_bos(impl_->vocab); }

std::optional<std::string> Model::chat_template() const {
    const char* text = llama_model_chat_template(impl_->model, nullptr);
    return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

std::string Model::apply_chat_template(const std::string& messages_json, const std::string& tools_json,
                                       const std::string& template_override, bool add_generation_prompt,
                                       bool enable_thinking) const {
    if (template_override.empty() && !chat_template()) {
        throw std::invalid_argument("cannot apply a chat template: " + impl_->path + " holds none");
    }
    const std::lock_guard lock(impl_->templates_mutex);
    try {
        auto& templates = impl_->templates[template_override];
        if (!templates) {
            templates = common_chat_templates_init(impl_->model, template_override);
        }
        common_chat_templates_inputs inputs;
        inputs.messages = common_chat_msgs_parse_oaicompat(common_json::parse(messages_json));
        if (!tools_json.empty()) {
            inputs.tools = common_chat_tools_parse_oaicompat(common_json::parse(tools_json));
        }
        inputs.add_generation_prompt = add_generation_prompt;
        inputs.enable_thinking = enable_thinking;
        return common_chat_templates_apply(templates.get(), inputs).prompt;
    } catch (const std::exception& error) {
        throw std::invalid_argument(std::string("cannot apply the chat template: ") + error.what());
    }
}

} // namespace dspark
