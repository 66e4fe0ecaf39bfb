// Chat templates and the reading of answers, by llama-common. Knows no model: a template is text, so that the rendering
// of a template nobody vouches for can run in a process of its own. Both sides of it speak JSON.
#pragma once

#include <memory>
#include <string>

namespace dspark {

// request: {template, bos_token, eos_token, messages, tools?, tool_choice?, parallel_tool_calls?, json_schema?,
// enable_thinking?, add_generation_prompt?, continue_final_message?, template_kwargs?}; messages and tools in OpenAI's
// form. Returns {prompt, generation_prompt, format, parser, grammar, grammar_lazy, trigger_words, trigger_patterns,
// preserved_tokens, stops, supports_thinking, supports_tools}. Throws std::invalid_argument with the template's
// complaint, and as `check_grammar`.
[[nodiscard]] std::string plan_chat(const std::string& request_json);

// Throws std::invalid_argument for what is no schema, and as `check_grammar`.
[[nodiscard]] std::string schema_grammar(const std::string& schema_json);

// Reads {content, reasoning_content, tool_calls: [{id, name, arguments}]} out of an answer, or out of its beginning.
class ChatReader {
  public:
    // What plan_chat returned for the request.
    ChatReader(const std::string& plan_json, bool parse_tool_calls);
    ~ChatReader();
    // `arguments` is JSON text, perhaps unfinished in a partial answer. Throws std::invalid_argument for an answer that
    // breaks the format.
    [[nodiscard]] std::string read(const std::string& text, bool is_partial) const;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace dspark
