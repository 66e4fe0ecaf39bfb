#include "llama_chat.h"

#include "chat.h"
#include "json-schema-to-grammar.h"
#include "json.h"
#include "llama_grammar_mask.h"

#include <cctype>
#include <stdexcept>

namespace dspark {

namespace {

common_chat_templates_inputs inputs_of(const common_json& request, const common_chat_templates* templates) {
    common_chat_templates_inputs inputs;
    inputs.messages = common_chat_msgs_parse_oaicompat(request.at("messages"));
    if (request.contains("tools")) {
        inputs.tools = common_chat_tools_parse_oaicompat(request.at("tools"));
    }
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", "auto"));
    if (request.contains("json_schema")) {
        inputs.json_schema = request.at("json_schema").dump();
    }
    const auto caps = common_chat_templates_get_caps(templates);
    const auto parallel = caps.find("supports_parallel_tool_calls");
    inputs.parallel_tool_calls = request.value("parallel_tool_calls", parallel != caps.end() && parallel->second);
    inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
    inputs.enable_thinking = request.value("enable_thinking", true);
    inputs.add_generation_prompt = request.value("add_generation_prompt", true);
    if (request.value("continue_final_message", false)) {
        inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
        inputs.add_generation_prompt = false;
    }
    if (request.contains("template_kwargs")) {
        for (const auto& item : request.at("template_kwargs").items()) {
            inputs.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    return inputs;
}

common_json plan_of(const common_chat_params& params, const common_chat_templates* templates) {
    std::vector<std::string> words;
    std::vector<std::string> patterns;
    for (const common_grammar_trigger& trigger : params.grammar_triggers) {
        const bool is_pattern = trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN ||
                                trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL;
        (is_pattern ? patterns : words).push_back(trigger.value);
    }
    const auto caps = common_chat_templates_get_caps(templates);
    const auto tools = caps.find("supports_tools");
    common_json plan;
    plan["prompt"] = params.prompt;
    plan["generation_prompt"] = params.generation_prompt;
    plan["format"] = static_cast<int>(params.format);
    plan["parser"] = params.parser;
    plan["grammar"] = params.grammar;
    plan["grammar_lazy"] = params.grammar_lazy;
    plan["trigger_words"] = words;
    plan["trigger_patterns"] = patterns;
    plan["preserved_tokens"] = params.preserved_tokens;
    plan["stops"] = params.additional_stops;
    plan["supports_thinking"] = params.supports_thinking;
    plan["supports_tools"] = tools != caps.end() && tools->second;
    return plan;
}

} // namespace

std::string plan_chat(const std::string& request_json) {
    common_chat_params params;
    common_json plan;
    try {
        const common_json request = common_json::parse(request_json);
        const common_chat_templates_ptr templates =
            common_chat_templates_init(nullptr, request.at("template").get<std::string>(),
                                       request.value("bos_token", ""), request.value("eos_token", ""));
        params = common_chat_templates_apply(templates.get(), inputs_of(request, templates.get()));
        plan = plan_of(params, templates.get());
    } catch (const std::exception& error) {
        throw std::invalid_argument(std::string("cannot apply the chat template: ") + error.what());
    }
    check_grammar(params.grammar);
    return plan.dump();
}

std::string schema_grammar(const std::string& schema_json) {
    std::string gbnf;
    try {
        gbnf = json_schema_to_grammar(common_json::parse(schema_json));
    } catch (const std::exception& error) {
        throw std::invalid_argument(std::string("cannot use the JSON schema: ") + error.what());
    }
    check_grammar(gbnf);
    return gbnf;
}

struct ChatReader::Impl {
    common_chat_parser_params params;
};

ChatReader::ChatReader(const std::string& plan_json, bool parse_tool_calls) : impl_(std::make_unique<Impl>()) {
    try {
        const common_json plan = common_json::parse(plan_json);
        common_chat_parser_params& params = impl_->params;
        params.format = static_cast<common_chat_format>(plan.at("format").get<int>());
        params.generation_prompt = plan.at("generation_prompt").get<std::string>();
        params.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
        params.parse_tool_calls = parse_tool_calls;
        if (const auto parser = plan.at("parser").get<std::string>(); !parser.empty()) {
            params.parser.load(parser);
        }
    } catch (const std::exception& error) {
        throw std::invalid_argument(std::string("plan must come from plan_chat: ") + error.what());
    }
}

ChatReader::~ChatReader() = default;

std::string ChatReader::read(const std::string& text, bool is_partial) const {
    try {
        const common_chat_msg message = common_chat_parse(text, is_partial, impl_->params);
        common_json calls = common_json::array();
        for (const common_chat_tool_call& call : message.tool_calls) {
            common_json one;
            one["id"] = call.id;
            one["name"] = call.name;
            one["arguments"] = call.arguments;
            calls.push_back(one);
        }
        common_json result;
        result["content"] = message.content;
        result["reasoning_content"] = message.reasoning_content;
        result["tool_calls"] = calls;
        return result.dump();
    } catch (const std::exception& error) {
        throw std::invalid_argument(error.what());
    }
}

} // namespace dspark
