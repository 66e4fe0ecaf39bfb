// Loading drafters: what their file says, whether they fit their target, the backbone through llama.cpp, the heads not.
#include "kernels/kernels.h"
#include "llama_api_impl.h"
#include "vector_loops.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>

namespace dspark {

// By stored id: Hugging Face's + 1. Read from the pinned tree's models; dspark_cpp.convert.pair has the same list.
int32_t Model::last_tappable_layer() const {
    static const std::set<std::string> tappable = {
        "bailingmoe3", "deepseek4",    "gemma4",   "gpt-oss",     "hunyuan-dense",  "hunyuan_vl",
        "lfm2",        "lfm2moe",      "llama",    "llama-embed", "mimo2",          "minimax-01",
        "minimax-m2",  "muse-glimmer", "nanbeige", "nemotron_h",  "nemotron_h_moe", "qwen3",
        "qwen35",      "qwen35moe",    "qwen3moe", "qwen3next",   "qwen4exp",
    };
    // These also record the last layer's output.
    static const std::set<std::string> whole = {"deepseek4", "mimo2", "nemotron_h", "nemotron_h_moe"};
    const std::string name = architecture();
    if (!tappable.contains(name)) {
        return -1;
    }
    return n_layer() - (whole.contains(name) ? 0 : 1);
}

namespace {

// ---- rows of weights ----

void copy_f32(const void* source, float* destination, int64_t n) {
    std::memcpy(destination, source, static_cast<size_t>(n) * sizeof(float));
}

// Our kernels on one thread.
template <kernels::WeightType type>
bool dot_rows(const RowTable& table, const std::byte* rows, int64_t n_rows, const float* x, int64_t n_vectors,
              float* y) {
    kernels::Product product;
    product.type = type;
    product.n_outputs = n_rows;
    product.n_values = table.n_cols;
    product.n_columns = n_vectors;
    product.weights = rows;
    product.weight_stride = table.row_bytes;
    product.x = x;
    product.x_stride = table.n_cols;
    product.y = y;
    product.y_stride = n_rows;
    return kernels::multiply(product);
}

auto find_dot_rows(ggml_type type) -> decltype(RowTable::dot_rows) {
    using enum kernels::WeightType;
    switch (type) {
    case GGML_TYPE_Q8_0:
        return dot_rows<q8_0>;
    case GGML_TYPE_F16:
        return dot_rows<f16>;
    case GGML_TYPE_BF16:
        return dot_rows<bf16>;
    default:
        return nullptr;
    }
}

RowTable row_table(const TensorBytes& tensor) {
    const ggml_type type = parse_type(tensor.type);
    // ggml's own conversion of f16 goes value by value here; candidates read two thousand rows a block.
    const ggml_to_float_t decode = type == GGML_TYPE_F32   ? copy_f32
                                   : type == GGML_TYPE_F16 ? decode_f16
                                                           : ggml_get_type_traits(type)->to_float;
    if (decode == nullptr) {
        throw std::runtime_error("cannot read tensor " + tensor.name + ": type " + tensor.type + " cannot be decoded");
    }
    const int64_t n_rows = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
    return {tensor.data.data(),
            tensor.row_bytes,
            n_rows,
            tensor.shape[0],
            reinterpret_cast<void (*)(const void*, float*, int64_t)>(decode),
            type == GGML_TYPE_F16 ? dot_f16 : nullptr,
            find_dot_rows(type)};
}

std::vector<float> to_floats(const TensorBytes& tensor) {
    const RowTable table = row_table(tensor);
    std::vector<float> values(static_cast<size_t>(table.n_rows * table.n_cols));
    for (int64_t row = 0; row < table.n_rows; ++row) {
        table.decode(row, values.data() + row * table.n_cols);
    }
    return values;
}

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
        const int32_t last = std::max(0, target_.last_tappable_layer());
        for (const int32_t layer : info_.target_layers) {
            require(layer >= 0 && layer <= last, "dflash.target_layers must lie in 0 .. " + std::to_string(last) +
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
                                             " keeps a recurrent state that llama.cpp cannot take back a token of");
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
    impl->use_kernels = options.use_kernels;
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

} // namespace dspark
