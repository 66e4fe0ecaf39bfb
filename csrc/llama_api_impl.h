// Private to llama_api*.cpp: the only files that include llama.cpp headers. What they share of GGUF reading and errors.
#pragma once

#include "errors.h"
#include "llama_api.h"

#include "chat.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-ext.h"
#include "llama-model-loader.h"
#include "llama-model.h"
#include "llama.h"

#include <map>
#include <mutex>

namespace dspark {

void ensure_backend();
// What llama.cpp says on this thread after clear_error(): the first line of it, or `otherwise`.
void clear_error();
[[nodiscard]] std::string take_error(const std::string& otherwise);

// GGML_ASSERT ends the process. While a guard lives, one that fails on the guard's thread throws std::runtime_error
// instead: a file can contradict itself in more ways than GgufFile::check lists. For loading only: a context that was
// thrown out of must not be used again.
struct AbortGuard {
    AbortGuard();
    ~AbortGuard();
    AbortGuard(const AbortGuard&) = delete;
    AbortGuard& operator=(const AbortGuard&) = delete;
};

// The header of a GGUF file; a key of another type than asked for counts as absent.
struct GgufFile {
    explicit GgufFile(const std::string& file_path); // throws ModelLoadError

    [[nodiscard]] int64_t key(const std::string& name, gguf_type type) const; // -1: absent
    [[nodiscard]] std::string text(const std::string& name) const;
    [[nodiscard]] int64_t integer(const std::string& name, int64_t otherwise) const;
    [[nodiscard]] float real(const std::string& name, float otherwise) const;
    [[nodiscard]] bool boolean(const std::string& name, bool otherwise) const;
    [[nodiscard]] std::vector<int32_t> integers(const std::string& name) const;
    [[nodiscard]] const ggml_tensor* tensor(const std::string& name) const; // null: absent
    [[nodiscard]] TensorBytes read(const std::string& name) const;
    // Throws ModelLoadError for what would make llama.cpp abort or divide by zero before it reports an error.
    void check() const;
    void check_integer(const std::string& name, int64_t least, int64_t most, bool is_optional = false) const;
    void check_norm_type(int64_t tensor_index) const;

    std::string path;
    uintmax_t n_bytes = 0;
    gguf_context_ptr gguf;
    ggml_context_ptr meta;
};

[[nodiscard]] ggml_type parse_type(const std::string& name); // throws std::invalid_argument

struct Model::Impl {
    std::string path;
    llama_model* model = nullptr;
    const llama_vocab* vocab = nullptr;
    std::shared_ptr<Model> target; // drafters: keeps what they borrow alive
    std::vector<ggml_backend_dev_t> devices;
    bool use_kernels = true; // ours, whenever this model is the one that decodes
    DrafterInfo info;
    std::map<std::string, TensorBytes> head_tensors;
    HeadWeights heads;
    std::mutex templates_mutex;
    std::map<std::string, common_chat_templates_ptr> templates; // by override text

    ~Impl() { llama_model_free(model); }
};

[[nodiscard]] llama_model_params model_params(const ModelOptions& options);
void adopt(Model::Impl& impl, llama_model* model);

} // namespace dspark
