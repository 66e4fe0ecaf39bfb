#include "llama_api_drafter_check.h"

#include <algorithm>
#include <array>
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

std::string shape_text(const ggml_tensor* tensor) {
    std::string text = "[";
    for (int i = 0; i < ggml_n_dims(tensor); ++i) {
        text += (i > 0 ? ", " : "") + std::to_string(tensor->ne[i]);
    }
    return text + "]";
}

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

} // namespace

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

std::vector<std::string> drafter_mismatches(const GgufFile& file, const DrafterInfo& info, const Model& target) {
    return DrafterCheck(file, info, target).run();
}

} // namespace dspark
