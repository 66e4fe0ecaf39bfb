// Loading drafters: the backbone through llama.cpp, the heads not.
#include "kernels/kernels.h"
#include "llama_api_drafter_check.h"
#include "llama_api_impl.h"
#include "vector_loops.h"

#include <array>
#include <cstring>
#include <set>

namespace dspark {

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

constexpr std::array kHeadTensors = {
    "markov_w1.weight",    "markov_w2.weight",  "markov_w2.scale",  "markov_gate.weight", "markov_gate.bias",
    "markov_joint.weight", "markov_joint.bias", "conf_proj.weight", "conf_proj.bias",
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
    if (const auto reasons = drafter_mismatches(file, impl->info, owner); !reasons.empty()) {
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
