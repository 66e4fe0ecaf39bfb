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

// A repetition of what may be empty, (x?){0,n}, is n rules S(k) ::= x? S(k-1) | "": each can be left in two ways
// without a character, so n states go on to n states with every character. From some dozens on that takes seconds a
// token, and everyone in the engine waits.
class EmptyChains {
  public:
    explicit EmptyChains(const llama_grammar_rules& rules) : rules_(rules), may_be_empty_(rules.size(), 0) {
        while (find_empty()) {
        }
    }

    void check() {
        lengths_.assign(rules_.size(), kUnknown);
        for (size_t rule = 0; rule < rules_.size(); ++rule) {
            if (length(rule) > kLongest) {
                throw std::invalid_argument("grammar must repeat what may be empty at most " +
                                            std::to_string(kLongest) + " times");
            }
        }
    }

  private:
    static constexpr int32_t kLongest = 10;
    static constexpr int32_t kUnknown = -1;

    // Calls visit(refs) with the rules that an alternative consists of, for those that consist of rules alone.
    template <class Visit> void for_each_chain(size_t rule, Visit visit) const {
        std::vector<size_t> refs;
        bool has_text = false;
        for (const llama_grammar_element& element : rules_[rule]) {
            if (element.type != LLAMA_GRETYPE_ALT && element.type != LLAMA_GRETYPE_END) {
                has_text = has_text || element.type != LLAMA_GRETYPE_RULE_REF;
                refs.push_back(element.value);
                continue;
            }
            if (!has_text) {
                visit(refs);
            }
            refs.clear();
            has_text = false;
        }
    }

    [[nodiscard]] bool are_empty(const std::vector<size_t>& refs) const {
        return std::all_of(refs.begin(), refs.end(), [&](size_t ref) { return may_be_empty_[ref] != 0; });
    }

    // One pass down and one up: rules refer to later ones, and those of repetitions to earlier ones.
    bool find_empty() {
        bool has_changed = false;
        const auto visit = [&](size_t rule) {
            const bool was_empty = may_be_empty_[rule] != 0;
            for_each_chain(rule, [&](const auto& refs) { may_be_empty_[rule] |= are_empty(refs) ? 1 : 0; });
            has_changed = has_changed || (may_be_empty_[rule] != 0) != was_empty;
        };
        for (size_t rule = 0; rule < rules_.size(); ++rule) {
            visit(rule);
        }
        for (size_t rule = rules_.size(); rule-- > 0;) {
            visit(rule);
        }
        return has_changed;
    }

    // Rules in a row that may be left in two ways. Stops right beyond the limit, so that the recursion is shallow.
    int32_t length(size_t rule, int32_t depth = 0) {
        if (lengths_[rule] != kUnknown || depth > kLongest) {
            return std::max(lengths_[rule], 0);
        }
        lengths_[rule] = 0; // met again below itself: a loop, one state
        bool has_empty = false;
        for_each_chain(rule, [&](const auto& refs) { has_empty = has_empty || refs.empty(); });
        int32_t longest = 0;
        for_each_chain(rule, [&](const auto& refs) {
            if (has_empty && refs.size() > 1 && are_empty(refs)) {
                for (const size_t ref : refs) {
                    longest = std::max(longest, 1 + length(ref, depth + 1));
                }
            }
        });
        return lengths_[rule] = longest;
    }

    const llama_grammar_rules& rules_;
    std::vector<uint8_t> may_be_empty_;
    std::vector<int32_t> lengths_;
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
    EmptyChains(grammar->rules).check();
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
    if (check_repetitions(gbnf)) {
        return;
    }
    llama_grammar_parser parser;
    if (!parser.parse(gbnf.c_str())) {
        throw std::invalid_argument("grammar must be one that llama.cpp can parse");
    }
    EmptyChains(parser.rules).check();
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
