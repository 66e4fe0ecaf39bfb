// What only the test suite sees: the inside of one draft, and the engine over a scripted drafter.
#include "bindings.h"
#include "bound_engine.h"
#include "llama_drafter.h"
#include "llama_target.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

namespace py = pybind11;
using namespace dspark;

namespace {

py::array_t<float> copy_rows(const std::vector<std::vector<float>>& rows) {
    py::array_t<float> array({rows.size(), rows.empty() ? size_t{0} : rows[0].size()});
    for (size_t i = 0; i < rows.size(); ++i) {
        std::copy(rows[i].begin(), rows[i].end(), array.mutable_data(static_cast<py::ssize_t>(i), 0));
    }
    return array;
}

std::vector<float> copy(std::span<const float> row) { return {row.begin(), row.end()}; }

// What one block looks like inside, on the real models: the rows that the goldens hold.
class DraftProbe {
  public:
    DraftProbe(const std::shared_ptr<Model>& target, const std::shared_ptr<Model>& drafter, std::vector<int32_t> tokens,
               const std::string& head, const std::string& kv_type)
        : tokens_(std::move(tokens)), n_context_(static_cast<int32_t>(tokens_.size()) - 1),
          info_(drafter->drafter_info()), target_(target, context_options(kv_type)),
          drafter_(drafter, target_, drafter_options(head, kv_type)),
          injector_(drafter, context_options(kv_type, true), &target_.context()) {}

    py::dict run() {
        decode_context();
        py::dict result;
        result["taps"] = copy_rows(taps_);
        result["h_ctx"] = copy_rows(context_features());
        result["target_logits"] = copy_rows({copy(target_.logits(n_context_ - 1))});
        draft_block();
        result["hidden"] = copy_rows(hidden_);
        result["base_logits"] = copy_rows(base_logits_);
        result["tokens"] = draft_.tokens;
        result["confidence_logits"] = draft_.confidence_logits;
        py::list ids;
        py::list bias;
        py::list probs;
        for (size_t k = 0; k < trace_.size(); ++k) {
            ids.append(trace_[k].ids);
            bias.append(trace_[k].transition_bias);
            probs.append(std::pair(draft_.probs[k].ids, draft_.probs[k].probs));
        }
        result["candidate_ids"] = ids;
        result["transition_bias"] = bias;
        result["draft_probs"] = probs;
        return result;
    }

  private:
    [[nodiscard]] ContextOptions context_options(const std::string& kv_type, bool embeddings = false) const {
        ContextOptions options;
        options.n_cells = n_context_ + 64;
        options.n_batch = options.n_ubatch = options.n_outputs = n_context_ + 64;
        options.n_threads = options.n_threads_batch = 1;
        options.embeddings = embeddings;
        options.is_causal = !embeddings;
        options.kv_type = kv_type;
        options.flash_attention_off = kv_type == "f32";
        return options;
    }

    [[nodiscard]] static DrafterOptions drafter_options(const std::string& head, const std::string& kv_type) {
        DrafterOptions options;
        options.head = head;
        options.kv_type = kv_type;
        options.flash_attention_off = kv_type == "f32";
        return options;
    }

    void decode_context() {
        drafter_.begin_recording();
        std::vector<BatchRow> rows;
        for (int32_t i = 0; i < n_context_; ++i) {
            rows.push_back({tokens_[static_cast<size_t>(i)], i, 0, i + 1 == n_context_});
            context_rows_.push_back({i, i, 0});
        }
        target_.decode(rows);
        const auto n_embd = static_cast<size_t>(target_.context().model().n_embd());
        taps_.resize(static_cast<size_t>(n_context_));
        for (const int32_t layer : info_.target_layers) {
            const std::span<const float> states = target_.context().layer_input(layer);
            for (size_t i = 0; i < taps_.size(); ++i) {
                const auto row = states.subspan(i * n_embd, n_embd);
                taps_[i].insert(taps_[i].end(), row.begin(), row.end());
            }
        }
    }

    std::vector<std::vector<float>> context_features() {
        std::vector<float> features;
        std::vector<int32_t> positions;
        for (size_t i = 0; i < taps_.size(); ++i) {
            features.insert(features.end(), taps_[i].begin(), taps_[i].end());
            positions.push_back(static_cast<int32_t>(i));
        }
        injector_.decode_features(features, positions, std::vector<int32_t>(taps_.size(), 0), true);
        std::vector<std::vector<float>> h_ctx;
        for (int32_t i = 0; i < n_context_; ++i) {
            h_ctx.push_back(copy(injector_.embedding(i)));
        }
        return h_ctx;
    }

    void draft_block() {
        drafter_.inject(context_rows_);
        DraftTask task;
        task.anchor = tokens_.back();
        task.start = n_context_;
        task.truncation.temperature = 0;
        draft_.trace = &trace_;
        drafter_.draft({&task, 1}, {&draft_, 1});
        for (int32_t k = 0; k < info_.block_size; ++k) {
            const int32_t row = k + (info_.sample_from_anchor ? 0 : 1);
            hidden_.push_back(copy(drafter_.context().embedding(row)));
            base_logits_.push_back(copy(drafter_.context().logits(row)));
        }
    }

    std::vector<int32_t> tokens_;
    int32_t n_context_;
    DrafterInfo info_;
    LlamaTarget target_;
    LlamaDrafter drafter_;
    Context injector_;
    std::vector<ContextRow> context_rows_;
    std::vector<std::vector<float>> taps_; // (n_context, m * n_embd)
    std::vector<std::vector<float>> hidden_;
    std::vector<std::vector<float>> base_logits_;
    std::vector<SlotTrace> trace_;
    BlockDraft draft_;
};

} // namespace

void register_testing(py::module_& module) {
    py::module_ testing = module.def_submodule("_testing", "Only for the test suite.");
    testing.def(
        "draft_probe",
        [](const std::shared_ptr<Model>& target, const std::shared_ptr<Model>& drafter, std::vector<int32_t> tokens,
           const std::string& head,
           const std::string& kv_type) { return DraftProbe(target, drafter, std::move(tokens), head, kv_type).run(); },
        py::arg("target"), py::arg("drafter"), py::arg("tokens"), py::arg("head") = "full", py::arg("kv_type") = "f32");
    testing.def(
        "scripted_engine",
        [](std::shared_ptr<Model> target, std::vector<std::vector<int32_t>> scripts, const std::string& mode,
           int32_t block_size, int32_t n_ctx, int32_t n_parallel, const std::string& kv_type,
           const std::string& policy) {
            LLMOptions options;
            options.n_ctx = n_ctx;
            options.n_parallel = n_parallel;
            options.kv_type = kv_type;
            options.policy = policy;
            options.n_threads = 1; // tests share their machine: threads that wait for each other's turn cost minutes
            return make_scripted_engine(std::move(target), std::move(scripts), mode, block_size, options);
        },
        py::arg("target").none(false), py::arg("scripts"), py::arg("mode"), py::kw_only(), py::arg("block_size") = 7,
        py::arg("n_ctx") = 0, py::arg("n_parallel") = 1, py::arg("kv_type") = "f16", py::arg("policy") = "full");
}
