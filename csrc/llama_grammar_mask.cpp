#include "llama_grammar_mask.h"

#include "grammar_check.h"
#include "llama_api_impl.h"

#include "llama-grammar.h"
#include "llama-vocab.h"

#include <algorithm>
#include <regex>

namespace dspark {

namespace {

struct FreeGrammar {
    void operator()(llama_grammar* grammar) const { llama_grammar_free_impl(grammar); }
};
using GrammarPtr = std::unique_ptr<llama_grammar, FreeGrammar>;

// Text before the trigger of which a pattern may still need to see something. std::regex recurses once per character,
// so its input must stay short.
constexpr size_t kTailBytes = 256;

// What is common to all copies of a mask.
struct Rules {
    std::shared_ptr<Model> model;
    std::vector<std::string> words;
    std::vector<std::regex> patterns;
};

// One state: before the trigger the tail of the text, after it the grammar's stacks.
struct State {
    GrammarPtr grammar;
    bool is_waiting = false;
    bool is_cut = false; // `tail` is not the whole text
    std::string tail;

    [[nodiscard]] State copy() const {
        return {GrammarPtr(llama_grammar_clone_impl(*grammar)), is_waiting, is_cut, tail};
    }
};

class GrammarMask final : public TokenMask {
  public:
    GrammarMask(std::shared_ptr<const Rules> rules, State state) : rules_(std::move(rules)) {
        states_.push_back(std::move(state));
    }

    [[nodiscard]] std::unique_ptr<TokenMask> clone() const override {
        return std::make_unique<GrammarMask>(rules_, states_.back().copy());
    }

    void check(std::span<const int32_t> ids, std::span<uint8_t> is_allowed) const override {
        const State& state = states_.back();
        if (state.is_waiting) {
            std::fill(is_allowed.begin(), is_allowed.end(), uint8_t{1});
            return;
        }
        std::vector<llama_token_data> data(ids.size());
        std::transform(ids.begin(), ids.end(), data.begin(), [](int32_t id) { return llama_token_data{id, 0, 0}; });
        llama_token_data_array array{data.data(), data.size(), -1, false};
        llama_grammar_apply_impl(*state.grammar, &array);
        std::transform(data.begin(), data.end(), is_allowed.begin(),
                       [](const llama_token_data& one) { return static_cast<uint8_t>(one.logit == 0 ? 1 : 0); });
    }

    void push(int32_t token) override {
        State next = states_.back().copy();
        accept(next, token);
        states_.push_back(std::move(next));
    }
    void pop() override { states_.pop_back(); }
    void commit(int32_t token) override { accept(states_.back(), token); }

    // llama.cpp throws when no stack is left: the caller checked the token, or reports it.
    static void accept_text(State& state, llama_token token, const std::string& text) {
        if (!text.empty()) {
            llama_grammar_accept_token(*state.grammar, token, text);
        }
    }

  private:
    void accept(State& state, int32_t token) const {
        if (rules_->model->is_end_of_generation(token)) {
            return; // ends the text: nothing comes after it that the grammar could judge
        }
        const std::string& piece = state.grammar->vocab->token_to_piece(token);
        if (!state.is_waiting) {
            accept_text(state, token, piece);
            return;
        }
        state.tail += piece;
        if (const size_t begin = find_trigger(state); begin != std::string::npos) {
            state.is_waiting = false;
            accept_text(state, token, state.tail.substr(begin));
            state.tail.clear();
        } else if (state.tail.size() > kTailBytes) {
            state.tail.erase(0, state.tail.size() - kTailBytes);
            state.is_cut = true;
        }
    }

    // Where the bound text begins in the tail.
    [[nodiscard]] size_t find_trigger(const State& state) const {
        size_t begin = std::string::npos;
        for (const std::string& word : rules_->words) {
            begin = std::min(begin, state.tail.find(word));
        }
        for (const std::regex& pattern : rules_->patterns) {
            std::smatch match;
            const auto flags = state.is_cut ? std::regex_constants::match_not_bol : std::regex_constants::match_default;
            if (std::regex_search(state.tail, match, pattern, flags)) {
                const size_t group = match.size() > 1 && match.length(1) > 0 ? 1 : 0;
                begin = std::min(begin, static_cast<size_t>(match.position(group)));
            }
        }
        return begin;
    }

    std::shared_ptr<const Rules> rules_;
    std::vector<State> states_; // committed, then one per pushed token
};

[[nodiscard]] GrammarPtr parse(const Model& model, const std::string& gbnf) {
    check_repetitions(gbnf);
    clear_error();
    const AbortGuard guard;
    GrammarPtr grammar(
        llama_grammar_init_impl(model.impl().vocab, gbnf.c_str(), "root", false, nullptr, 0, nullptr, 0));
    if (!grammar) {
        throw std::invalid_argument("grammar must be a GBNF grammar with a rule `root`: " +
                                    take_error("llama.cpp cannot parse it"));
    }
    return grammar;
}

// Token by token, as the text would come: a grammar may name tokens.
void feed_prefill(State& state, const Model& model, const std::string& text) {
    try {
        for (const int32_t token : model.tokenize(text, false, true)) {
            GrammarMask::accept_text(state, token, model.token_to_piece(token, true));
        }
    } catch (const std::runtime_error&) {
        throw std::invalid_argument("grammar must begin like the prompt's end, got '" + text + "'");
    }
}

} // namespace

void check_grammar(const std::string& gbnf) {
    const bool names_tokens = check_repetitions(gbnf);
    if (!names_tokens && !llama_grammar_parser().parse(gbnf.c_str())) {
        throw std::invalid_argument("grammar must be one that llama.cpp can parse");
    }
}

std::shared_ptr<TokenMask> make_grammar_mask(std::shared_ptr<Model> model, const GrammarOptions& options) {
    if (!model) {
        throw std::invalid_argument("model must be a target, got none");
    }
    State state{parse(*model, options.gbnf), options.is_lazy, false, {}};
    if (!options.is_lazy) {
        feed_prefill(state, *model, options.prefill);
    }
    auto rules = std::make_shared<Rules>();
    rules->model = std::move(model);
    rules->words = options.trigger_words;
    for (const std::string& pattern : options.trigger_patterns) {
        rules->patterns.emplace_back(pattern);
    }
    return std::make_shared<GrammarMask>(std::move(rules), std::move(state));
}

} // namespace dspark
