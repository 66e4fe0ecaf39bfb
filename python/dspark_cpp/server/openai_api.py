"""OpenAI's dialect: JSON bodies to requests, answers to JSON. Pure: no models, no I/O."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_cpp.chat import RequestStats, TokenLogprob
from dspark_cpp.config import SamplingParams
from dspark_cpp.server.fields import Fields, check_schema
from dspark_cpp.server.problems import BadRequestError, Problem
from dspark_cpp.server.requests import ChatRequest, GenerationRequest, Piece, ToolCall
from dspark_cpp.server.settings import Limits

__all__ = [
    "Call",
    "chat_logprobs",
    "completion_logprobs",
    "delta",
    "error_body",
    "finish_reason",
    "new_id",
    "read_chat",
    "read_completion",
    "timings",
    "usage",
]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_MAX_TOP_LOGPROBS = 20
_MAX_CHOICES = 8
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of `/v1/chat/completions` or `/v1/completions`.

    Attributes
    ----------
    requests
        One generation per prompt, before each is repeated `n` times.
    logprobs
        How many alternatives to show beside the chosen token; None: no log-probabilities.
    echo
        Show the prompt before the completion (text only).
    """

    model: str
    requests: Sequence[GenerationRequest]
    n: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    echo: str = ""


# ---- requests ----


def read_chat(body: Fields, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """Read a body of `/v1/chat/completions`; `defaults` are the model's own options, by Ollama's names.

    Raises
    ------
    BadRequestError
        If a field is wrong.
    """
    top = body.integer("top_logprobs", 0) or 0
    if not 0 <= top <= _MAX_TOP_LOGPROBS:
        body.refuse("top_logprobs", f"be between 0 and {_MAX_TOP_LOGPROBS}")
    logprobs = top if body.flag("logprobs") else None
    if top and logprobs is None:
        raise BadRequestError("top_logprobs must come with logprobs", param="top_logprobs")
    tool_choice, tools = _tools(body, limits)
    chat = ChatRequest(
        messages=_messages(body, limits),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.flag("parallel_tool_calls") if "parallel_tool_calls" in body else None,
        json_schema=_response_schema(body, limits),
        think=_think(body),
    )
    max_tokens = body.integer("max_completion_tokens", body.integer("max_tokens", _default_length(defaults)))
    request = GenerationRequest(
        params=_params(body, limits, defaults, logprobs), max_tokens=_positive(body, max_tokens), chat=chat
    )
    return _call(body, [request], logprobs)


def read_completion(body: Fields, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """Read a body of `/v1/completions`; raises as `read_chat`."""
    logprobs = body.integer("logprobs")
    if logprobs is not None and not 0 <= logprobs <= _MAX_TOP_LOGPROBS:
        body.refuse("logprobs", f"be between 0 and {_MAX_TOP_LOGPROBS}")
    max_tokens = body.integer("max_tokens", _default_length(defaults) or 16)
    common: dict[str, Any] = {
        "params": _params(body, limits, defaults, logprobs),
        "max_tokens": _positive(body, max_tokens),
        "suffix": body.text("suffix"),
        "json_schema": _response_schema(body, limits),
    }
    prompts = _prompts(body, limits)
    requests = [
        GenerationRequest(**common, **({"text": prompt} if isinstance(prompt, str) else {"tokens": prompt}))
        for prompt in prompts
    ]
    echo = prompts[0] if body.flag("echo") and isinstance(prompts[0], str) else ""
    return _call(body, requests, logprobs, echo)


def model_name(body: Fields) -> str:
    """Return the model that is asked for."""
    name = body.text("model")
    if not name:
        raise BadRequestError("you must provide a model parameter", param="model")
    return name


def _call(body: Fields, requests: Sequence[GenerationRequest], logprobs: int | None, echo: str = "") -> Call:
    n = body.integer("n", 1) or 1
    if not 1 <= n <= _MAX_CHOICES:
        body.refuse("n", f"be between 1 and {_MAX_CHOICES}")
    stream_options = body.object("stream_options")
    return Call(
        model=model_name(body),
        requests=requests,
        n=n,
        stream=body.flag("stream"),
        include_usage=stream_options is not None and stream_options.flag("include_usage"),
        logprobs=logprobs,
        echo=echo,
    )


def _params(body: Fields, limits: Limits, defaults: Mapping[str, Any], logprobs: int | None) -> SamplingParams:
    own = Fields(defaults)
    seed = body.integer("seed", own.integer("seed"))
    draft = own.integer("draft_num_predict", -1)
    values: dict[str, Any] = {
        "temperature": body.number("temperature", own.number("temperature", 1.0)),
        "top_p": max(body.number("top_p", own.number("top_p", 1.0)) or 0.0, 1e-6),
        "top_k": max(body.integer("top_k", own.integer("top_k", 0)) or 0, 0),
        "min_p": body.number("min_p", own.number("min_p", 0.0)),
        "repetition_penalty": own.number("repeat_penalty", 1.0),
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


def _think(body: Fields) -> bool | str | None:
    effort = body.text("reasoning_effort")
    if not effort:
        return None
    return False if effort == "none" else None  # the rest is a wish that templates without thinking may ignore


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
    value = message.values.get("content")
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
    tools = [_tool(tool, limits) for tool in body.objects("tools", limits.tools)]
    choice = body.values.get("tool_choice")
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


def _tool(tool: Fields, limits: Limits) -> dict[str, Any]:
    function = tool.object("function")
    if function is None or not function.text("name"):
        tool.refuse("function", "be an object with a name")
    parameters = function.object("parameters")
    schema = dict(parameters.values) if parameters else {"type": "object", "properties": {}}
    check_schema("tools", schema, limits)
    description = function.text("description")
    return {
        "type": "function",
        "function": {"name": function.text("name"), "description": description, "parameters": schema},
    }


def _prompts(body: Fields, limits: Limits) -> list[str | list[int]]:
    """Return the prompts; each is a text, or token ids."""
    value = body.values.get("prompt")
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


# ---- answers ----


def new_id(kind: str) -> str:
    """Return an id such as `chatcmpl-...`."""
    return f"{kind}-{secrets.token_hex(12)}"


def finish_reason(reason: str | None) -> str | None:
    """Return OpenAI's word for how an answer ended."""
    return {"context_full": "length", "cancelled": "stop"}.get(reason, reason) if reason else None


def delta(piece: Piece) -> dict[str, Any]:
    """Return what a piece adds to the message."""
    found: dict[str, Any] = {}
    if piece.content:
        found["content"] = piece.content
    if piece.thinking:
        found["reasoning_content"] = piece.thinking
    if piece.tool_calls:
        found["tool_calls"] = [_call_delta(call) for call in piece.tool_calls]
    return found


def _call_delta(call: ToolCall) -> dict[str, Any]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def usage(n_prompt: int, n_generated: int, stats: Sequence[RequestStats]) -> dict[str, Any]:
    """Return counts; drafted tokens as OpenAI counts predictions."""
    n_accepted = sum(one.n_accepted for one in stats)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "completion_tokens_details": {
            "accepted_prediction_tokens": n_accepted,
            "rejected_prediction_tokens": sum(one.n_scheduled for one in stats) - n_accepted,
            "reasoning_tokens": 0,
        },
    }


def timings(stats: RequestStats, n_generated: int, prompt_ns: int, decode_ns: int) -> dict[str, Any]:
    """Return speed and acceptance, by the names of llama.cpp's server."""
    return {
        "prompt_n": stats.n_prompt,
        "prompt_ms": prompt_ns / 1e6,
        "predicted_n": n_generated,
        "predicted_ms": decode_ns / 1e6,
        "predicted_per_second": max(n_generated - 1, 0) * 1e9 / decode_ns,
        "draft_n": stats.n_scheduled,
        "draft_n_accepted": stats.n_accepted,
        "n_rounds": stats.n_rounds,
        "accepted_length": round(stats.accepted_length, 3),
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "host_ms": stats.host_ms,
    }


def chat_logprobs(entries: Sequence[TokenLogprob], texts: Mapping[int, bytes], n_top: int) -> dict[str, Any]:
    """Return log-probabilities of a chat's tokens."""

    def item(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts[token].decode("utf-8", "replace"), "logprob": logprob, "bytes": list(texts[token])}

    content = [
        item(entry.token_id, entry.logprob)
        | {"top_logprobs": [item(token, logprob) for token, logprob in entry.top[:n_top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprob], texts: Mapping[int, bytes], n_top: int, offset: int
) -> dict[str, Any]:
    """Return log-probabilities of a completion's tokens; `offset`: characters before the first of them."""
    tokens = [texts[entry.token_id].decode("utf-8", "replace") for entry in entries]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    best = [
        {texts[token].decode("utf-8", "replace"): logprob for token, logprob in reversed(entry.top[:n_top])}
        for entry in entries
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": best if n_top else None,
        "text_offset": offsets,
    }


def error_body(problem: Problem) -> dict[str, Any]:
    """Return an error in OpenAI's shape."""
    kind = _ERROR_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": problem.code}}
