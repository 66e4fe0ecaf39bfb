#include "llama_embedder.h"

#include "errors.h"

#include <algorithm>

namespace dspark {

namespace {

// Rows of one pass. Every row is an output here, and llama.cpp keeps logits of every output, V floats wide: pooling
// over passes of this size by hand keeps that buffer small, where llama.cpp's own pooling needs the whole text in one
// pass.
constexpr int32_t kRows = 64;

int32_t context_length(const Model& model, int32_t n_ctx) {
    return n_ctx > 0 ? n_ctx : std::max(2, std::min(8192, model.n_ctx_train()));
}

ContextOptions context_options(const Model& model, int32_t n_ctx, int32_t n_threads) {
    ContextOptions options;
    options.n_cells = context_length(model, n_ctx);
    options.n_batch = options.n_ubatch = options.n_outputs = kRows;
    options.n_threads = options.n_threads_batch = n_threads > 0 ? n_threads : n_math_threads();
    options.embeddings = true;
    return options;
}

// The file's choice (llama_pooling_type in the GGUF key); generative models say none, and get the mean.
std::string pooling_of(const Model& model) {
    const std::string key = model.architecture() + ".pooling_type";
    for (const auto& [name, value] : model.metadata()) {
        if (name == key) {
            return value == "2" ? "cls" : value == "3" ? "last" : "mean";
        }
    }
    return "mean";
}

} // namespace

Embedder::Embedder(std::shared_ptr<Model> model, int32_t n_ctx, int32_t n_threads)
    : n_ctx_(context_length(*model, n_ctx)), pooling_(pooling_of(*model)),
      context_(model, context_options(*model, n_ctx, n_threads)) {}

void Embedder::check(std::span<const int32_t> tokens) const {
    if (tokens.empty()) {
        throw std::invalid_argument("a text to embed must hold at least 1 token, got 0");
    }
    if (tokens.size() > static_cast<size_t>(n_ctx_)) {
        throw ContextFullError("a text to embed must fit into " + std::to_string(n_ctx_) + " tokens, got " +
                               std::to_string(tokens.size()));
    }
    for (const int32_t token : tokens) {
        if (token < 0 || token >= context_.model().n_vocab()) {
            throw std::invalid_argument("tokens must be in [0, " + std::to_string(context_.model().n_vocab()) +
                                        "), got " + std::to_string(token));
        }
    }
}

std::vector<float> Embedder::embed(std::span<const int32_t> tokens) {
    check(tokens);
    const std::lock_guard lock(mutex_);
    context_.clear();
    std::vector<double> pooled(static_cast<size_t>(context_.model().n_embd()), 0.0);
    for (size_t begin = 0; begin < tokens.size(); begin += kRows) {
        const size_t n = std::min(tokens.size() - begin, static_cast<size_t>(kRows));
        std::vector<BatchRow> rows;
        for (size_t i = 0; i < n; ++i) {
            rows.push_back({tokens[begin + i], static_cast<int32_t>(begin + i), 0, true});
        }
        context_.decode_tokens(rows);
        context_.synchronize();
        for (size_t i = 0; i < n; ++i) {
            add(pooled, static_cast<int32_t>(i), begin + i, tokens.size());
        }
    }
    return {pooled.begin(), pooled.end()};
}

void Embedder::add(std::vector<double>& pooled, int32_t row, size_t position, size_t n_tokens) {
    const bool is_wanted = pooling_ == "mean" || position == (pooling_ == "cls" ? 0 : n_tokens - 1);
    if (!is_wanted) {
        return;
    }
    const double weight = pooling_ == "mean" ? 1.0 / static_cast<double>(n_tokens) : 1.0;
    const std::span<const float> state = context_.embedding(row);
    for (size_t i = 0; i < pooled.size(); ++i) {
        pooled[i] += weight * static_cast<double>(state[i]);
    }
}

} // namespace dspark
