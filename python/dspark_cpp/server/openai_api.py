"""OpenAI's dialect: JSON bodies to requests. Pure: no models, no I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_cpp.config import SamplingParams
from dspark_cpp.server.fields import Fields, check_schema, read_tool
from dspark_cpp.server.ollama_options import penalty_window
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.requests import ChatRequest, GenerationRequest
from dspark_cpp.server.settings import Limits

__all__ = ["FOR_THE_SERVICE", "Call", "model_name", "read_chat", "read_completion"]

# Fields about OpenAI's own service: accounts, storage, prices. Nothing is lost when they are ignored.
FOR_THE_SERVICE = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_OLD_FIELDS = {"functions": "tools", "function_call": "tool_choice"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of `/v1/chat/completions` or `/v1/completions`.

    Attributes
    ----------
    requests
        One generation per prompt.
    n, best_of
        Answers to each prompt that are shown, and that are generated: the likeliest ones are shown.
    logprobs
        How many alternatives to show beside the chosen token; None: no log-probabilities.
    echo
        Show the prompt before the completion.
    """

    model: str
    requests: Sequence[GenerationRequest]
    n: int
    best_of: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: bool = False


# ---- requests ----


def read_chat(body: Fields, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """Read a body of `/v1/chat/completions`; `defaults` are the model's own options, by Ollama's names.

    Raises
    ------
    BadRequestError
        If a field is wrong.
    """
    for old, new in _OLD_FIELDS.items():
        if old in body:
            raise BadRequestError(f"{old} is not supported: send {new} instead", param=old)
    top = body.integer_within("top_logprobs", 0, limits.top_logprobs) or 0
    logprobs = top if body.flag("logprobs") else None
    if top and logprobs is None:
        raise BadRequestError("top_logprobs must come with logprobs", param="top_logprobs")
    tool_choice, tools = _tools(body, limits)
    effort = body.text("reasoning_effort")
    chat = ChatRequest(
        messages=_messages(body, limits),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.flag("parallel_tool_calls") if "parallel_tool_calls" in body else None,
        json_schema=_response_schema(body, limits),
        think=False if effort == "none" else None,
        effort="" if effort == "none" else effort,
    )
    max_tokens = body.integer("max_completion_tokens", body.integer("max_tokens", _default_length(defaults)))
    request = GenerationRequest(
        params=_params(body, limits, defaults, logprobs), max_tokens=_positive(body, max_tokens), chat=chat
    )
    return _call(body, limits, [request], logprobs)


def read_completion(body: Fields, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """Read a body of `/v1/completions`; raises as `read_chat`."""
    logprobs = body.integer_within("logprobs", 0, limits.top_logprobs)
    echo = body.flag("echo")
    if echo and logprobs is not None:
        raise BadRequestError("echo must come without logprobs: those of a prompt are not computed", param="echo")
    max_tokens = body.integer("max_tokens", _default_length(defaults) or 16)
    common: dict[str, Any] = {
        "params": _params(body, limits, defaults, logprobs),
        "max_tokens": _positive(body, max_tokens),
        "suffix": body.text("suffix"),
        "json_schema": _response_schema(body, limits),
    }
    requests = [
        GenerationRequest(**common, **({"text": prompt} if isinstance(prompt, str) else {"tokens": prompt}))
        for prompt in _prompts(body, limits)
    ]
    best_of = body.integer_within("best_of", 1, limits.choices)
    return _call(body, limits, requests, logprobs, best_of=best_of, echo=echo)


def model_name(body: Fields) -> str:
    """Return the model that is asked for."""
    name = body.text("model")
    if not name:
        raise BadRequestError("you must provide a model parameter", param="model")
    return name


def _call(
    body: Fields,
    limits: Limits,
    requests: Sequence[GenerationRequest],
    logprobs: int | None,
    *,
    best_of: int | None = None,
    echo: bool = False,
) -> Call:
    n = body.integer_within("n", 1, limits.choices) or 1
    stream = body.flag("stream")
    if best_of is not None and (best_of < n or (stream and best_of > n)):
        body.refuse("best_of", f"be {n} as n in a stream" if stream else f"be at least n = {n}")
    stream_options = body.object("stream_options")
    if stream_options is not None and not stream:
        raise BadRequestError("stream_options must come with stream", param="stream_options")
    return Call(
        model=model_name(body),
        requests=requests,
        n=n,
        best_of=best_of or n,
        stream=stream,
        include_usage=stream_options is not None and stream_options.flag("include_usage"),
        logprobs=logprobs,
        echo=echo,
    )


def _params(body: Fields, limits: Limits, defaults: Mapping[str, Any], logprobs: int | None) -> SamplingParams:
    own = Fields(defaults)
    seed = body.integer("seed", own.integer("seed"))
    draft = body.integer("draft_num_predict", own.integer("draft_num_predict", -1))
    values: dict[str, Any] = {
        "temperature": body.number("temperature", own.number("temperature", 1.0)),
        "top_p": max(body.number("top_p", own.number("top_p", 1.0)) or 0.0, 1e-6),
        "top_k": max(body.integer("top_k", own.integer("top_k", 0)) or 0, 0),
        "min_p": body.number("min_p", own.number("min_p", 0.0)),
        "repetition_penalty": own.number("repeat_penalty", 1.0),
        # Without a penalty of the model's own, those of a request look at all of its text, as OpenAI's do.
        "penalty_window": penalty_window(own) if "repeat_penalty" in own or "repeat_last_n" in own else -1,
        "presence_penalty": body.number("presence_penalty", own.number("presence_penalty", 0.0)),
        "frequency_penalty": body.number("frequency_penalty", own.number("frequency_penalty", 0.0)),
        "logit_bias": _logit_bias(body),
        "seed": None if seed is None else seed % 2**64,
        "stop": tuple(stop for stop in body.texts("stop", limits.stops) if stop) or own.texts("stop", limits.stops),
        "logprobs": logprobs,
        "draft": "auto" if draft is None or draft < 0 else draft,
    }
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise BadRequestError(str(error), param=str(error).split(" ", 1)[0]) from None


def _logit_bias(body: Fields) -> dict[int, float] | None:
    given = body.object("logit_bias")
    if given is None:
        return None
    biases = {}
    for token in given.values:
        bias = given.number(token, 0.0) or 0.0
        if not token.isdecimal() or not -100 <= bias <= 100 or len(token) > 9:
            raise BadRequestError("logit_bias must map token ids to numbers in -100 .. 100", param="logit_bias")
        biases[int(token)] = bias
    return biases


def _default_length(defaults: Mapping[str, Any]) -> int | None:
    n = Fields(defaults).integer("num_predict", -1)
    return n if n is not None and n > 0 else None


def _positive(body: Fields, max_tokens: int | None) -> int | None:
    if max_tokens is not None and max_tokens < 1:
        raise BadRequestError(f"max_tokens must be at least 1, got {max_tokens}", param="max_tokens")
    return None if max_tokens is None else min(max_tokens, 2**31 - 1)


def _response_schema(body: Fields, limits: Limits) -> Mapping[str, Any] | None:
    wanted = body.object("response_format")
    kind = "text" if wanted is None else wanted.text("type", "text")
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        wanted.refuse("type", "be text, json_object or json_schema")
    wrapper = wanted.object("json_schema")
    schema = None if wrapper is None else wrapper.object("schema")
    if schema is None:
        raise BadRequestError("response_format.json_schema.schema must be an object", param="response_format")
    check_schema("response_format", schema.values, limits)
    return schema.values or {"type": "object"}


def _messages(body: Fields, limits: Limits) -> list[dict[str, Any]]:
    messages = [_message(message, limits) for message in body.objects("messages", limits.messages)]
    if not messages:
        raise BadRequestError("messages must hold at least one message", param="messages")
    return messages


def _message(message: Fields, limits: Limits) -> dict[str, Any]:
    role = message.text("role")
    if role not in _ROLES:
        message.refuse("role", f"be one of {', '.join(_ROLES)}")
    found: dict[str, Any] = {"role": "tool" if role == "function" else role, "content": _content(message, limits)}
    if calls := message.objects("tool_calls", limits.tools):
        found["tool_calls"] = [_call_of_message(call) for call in calls]
    for name in ("name", "tool_call_id", "reasoning_content"):
        if name in message:
            found[name] = message.text(name)
    if found["role"] == "tool":
        found.setdefault("tool_call_id", "")
    return found


def _content(message: Fields, limits: Limits) -> str:
    value = message.any("content")
    if not isinstance(value, list):
        return message.text("content")
    return "".join(_part(part) for part in message.objects("content", limits.messages))


def _part(part: Fields) -> str:
    kind = part.text("type")
    if kind in ("text", "input_text", "refusal"):
        return part.text("refusal" if kind == "refusal" else "text")
    raise BadRequestError(f"this model takes text only, got a part of type {kind[:40]!r}", param="messages")


def _call_of_message(call: Fields) -> dict[str, Any]:
    function = call.object("function")
    if function is None:
        call.refuse("function", "be an object")
    arguments = function.text("arguments") or "{}"
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        function.refuse("arguments", "be JSON")
    name = function.text("name")
    return {"id": call.text("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(body: Fields, limits: Limits) -> tuple[str, list[dict[str, Any]]]:
    tools = [read_tool(tool, limits) for tool in body.objects("tools", limits.tools)]
    choice = body.any("tool_choice")
    if choice in (None, "auto", "none", "required"):
        choice = choice or "auto"
        if choice == "required" and not tools:
            body.refuse("tool_choice", "come with tools")
        return choice, [] if choice == "none" else tools
    named = body.object("tool_choice")
    assert named is not None
    function = named.object("function")
    name = "" if function is None else function.text("name")
    chosen = [tool for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        body.refuse("tool_choice", "name one of the tools")
    return "required", chosen


def _prompts(body: Fields, limits: Limits) -> list[str | list[int]]:
    """Return the prompts; each is a text, or token ids."""
    value = body.any("prompt")
    if value is None:
        raise BadRequestError("prompt must be given", param="prompt")
    if isinstance(value, str):
        return [value]
    items = body.items("prompt", 2**24)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    if not 1 <= len(items) <= limits.inputs or not all(isinstance(item, str | list) for item in items):
        raise BadRequestError("prompt must be a text, token ids, or a list of those", param="prompt")
    if not all(isinstance(item, str) or all(isinstance(token, int) for token in item) for item in items):
        raise BadRequestError("prompt must hold token ids", param="prompt")
    return items
