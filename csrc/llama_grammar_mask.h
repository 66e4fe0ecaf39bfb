// GBNF grammars as token masks, by llama.cpp's grammar engine. Needs a model for its vocabulary only.
#pragma once

#include "llama_api.h"
#include "token_mask.h"

#include <memory>
#include <string>
#include <vector>

namespace dspark {

struct GrammarOptions {
    std::string gbnf; // start symbol `root`
    bool is_lazy = false;
    std::vector<std::string> trigger_words;    // a lazy grammar binds from the first of these in the text on
    std::vector<std::string> trigger_patterns; // regular expressions; the text from their first group on is bound
    std::string prefill; // beginning of what the grammar describes that stands in the prompt already
};

// Throws std::invalid_argument for a grammar that cannot be parsed or does not begin like `prefill`.
[[nodiscard]] std::shared_ptr<TokenMask> make_grammar_mask(std::shared_ptr<Model> model, const GrammarOptions& options);

// Throws std::invalid_argument for one that `make_grammar_mask` would refuse, as far as this can be told without a
// vocabulary. llama.cpp prints a grammar it cannot parse to standard error: call this where nobody reads that.
void check_grammar(const std::string& gbnf);

} // namespace dspark
