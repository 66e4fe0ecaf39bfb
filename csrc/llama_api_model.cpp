// Loading targets, and what a model knows of itself and of text. Drafters: llama_api_drafter.cpp.
#include "kernels/kernels.h"
#include "llama_api_impl.h"

#include <array>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>

namespace dspark {

llama_model_params model_params(const ModelOptions& options) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = options.n_gpu_layers;
    params.load_mode = options.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
    params.check_tensors = options.check_tensors;
    // Repacked weights never reach our kernels.
    params.use_extra_bufts = !options.use_kernels || kernels::instruction_set() == "none";
    params.progress_callback = [](float, void*) { return true; };
    return params;
}

void adopt(Model::Impl& impl, llama_model* model) {
    impl.model = model;
    impl.vocab = llama_model_get_vocab(model);
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

std::shared_ptr<Model> Model::load_target(const std::string& path, const ModelOptions& options) {
    ensure_backend();
    llama_model_params params = model_params(options);
    {
        const GgufFile file(path);
        file.check();
        const std::string architecture = file.text("general.architecture");
        if (architecture == "dflash") {
            throw ModelLoadError("cannot load " + path + " as a target: it is a drafter");
        }
        // Products with chosen experts never reach our kernels: those weights are better off repacked.
        params.use_extra_bufts |= file.integer(architecture + ".expert_count", 0) > 0;
    }
    auto impl = std::make_unique<Impl>();
    impl->path = path;
    impl->use_kernels = options.use_kernels;
    clear_error();
    const AbortGuard guard;
    llama_model* model = llama_model_load_from_file(path.c_str(), params);
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
bool Model::uses_kernels() const { return impl_->use_kernels && kernels::instruction_set() != "none"; }
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

bool Model::has_state() const { return llama_model_is_recurrent(impl_->model) || llama_model_is_hybrid(impl_->model); }

int64_t Model::state_values() const {
    const llama_hparams& hparams = impl_->model->hparams;
    int64_t n = 0;
    for (uint32_t layer = 0; layer < hparams.n_layer(); ++layer) {
        n += hparams.is_recr(layer) ? hparams.n_embd_r() + hparams.n_embd_s() : 0;
    }
    return n;
}

bool Model::can_roll_back() const { return !has_state() || llm_arch_supports_rs_rollback(impl_->model->arch); }

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
