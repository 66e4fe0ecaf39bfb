"""Ollama's dialect: JSON bodies to requests, answers to JSON. Pure: no models, no I/O.

Field names and their order follow Ollama's `api/types.go`; fields that it leaves out when empty are left out here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dspark_cpp.results import RequestStats, TokenLogprob
from dspark_cpp.server.fields import Fields, check_schema, read_tool
from dspark_cpp.server.ollama_options import Options, read_n_ctx, read_options
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.requests import ChatRequest, GenerationRequest, Piece, Speeds, ToolCall
from dspark_cpp.server.settings import Limits, parse_duration

__all__ = [
    "Call",
    "Timing",
    "chat_message",
    "final_figures",
    "generation_of",
    "logprob_items",
    "read_call",
    "read_keep_alive",
    "speculation",
    "timestamp",
    "tool_calls",
]

_ANY_JSON: dict[str, Any] = {"type": "object"}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What `/api/chat` and `/api/generate` have in common, and the body's other fields.

    Attributes
    ----------
    is_chat
        Which of the two.
    shows_speculation
        The client asked for `dspark` in every object of the stream.
    """

    model: str
    is_chat: bool
    stream: bool
    keep_alive: float | None
    n_ctx: int
    think: bool | str | None
    shows_speculation: bool
    logprobs: int | None
    format: Mapping[str, Any] | None
    body: Fields
    limits: Limits

    @property
    def only_loads(self) -> bool:
        """Nothing to answer: the model is loaded, or unloaded when `keep_alive` is 0."""
        if self.is_chat:
            return not self.body.items("messages", self.limits.messages)
        return not self.body.text("prompt") and not self.body.text("suffix")


@dataclass(frozen=True, slots=True)
class Timing:
    """Nanoseconds of one answer."""

    total: int
    load: int
    prompt: int
    decode: int


# ---- requests ----


def read_call(body: Fields, limits: Limits, *, is_chat: bool) -> Call:
    """Read what does not depend on the model.

    Raises
    ------
    BadRequestError
        If a field is wrong.
    """
    name = body.text("model")
    if not name:
        raise BadRequestError("model is required", param="model")
    top = body.integer_within("top_logprobs", 0, limits.top_logprobs) or 0
    return Call(
        model=name,
        is_chat=is_chat,
        stream=body.flag("stream", True),
        keep_alive=read_keep_alive(body),
        n_ctx=read_n_ctx(body),
        think=_think(body),
        shows_speculation=body.flag("dspark"),
        logprobs=top if body.flag("logprobs") else None,
        format=_format(body, limits),
        body=body,
        limits=limits,
    )


def read_keep_alive(body: Fields) -> float | None:
    """Return seconds that a model shall stay loaded, None if the request does not say."""
    return parse_duration(body.any("keep_alive")) if "keep_alive" in body else None


def generation_of(
    call: Call, *, system: str, opening: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], has_template: bool
) -> tuple[GenerationRequest, Options]:
    """Return what is to be generated, from a call and what the model's own recipe says.

    Raises
    ------
    BadRequestError
        If a field is wrong.
    """
    given = call.body.object("options")
    options = read_options(given.values if given else None, parameters, call.limits, call.logprobs)
    common: dict[str, Any] = {
        "params": options.params,
        "max_tokens": options.max_tokens,
        "n_ctx": options.n_ctx,
        "n_keep": options.n_keep,
        "truncates": call.body.flag("truncate", True),
        "shifts": call.body.flag("shift", True),
    }
    if call.is_chat:
        messages = _with_system([*opening, *_messages(call)], system)
        return GenerationRequest(chat=_chat(call, messages), **common), options
    return _generate(call, system, opening, has_template, common), options


def _generate(
    call: Call, system: str, opening: Sequence[Mapping[str, str]], has_template: bool, common: dict[str, Any]
) -> GenerationRequest:
    body = call.body
    _refuse_images(body, call.limits)
    context = body.items("context", 2**24)
    suffix = body.text("suffix")
    is_raw = body.flag("raw")
    if is_raw and (body.text("template") or body.text("system") or context):
        raise BadRequestError("raw mode does not support template, system, or context")
    if is_raw or suffix or not has_template:
        text = body.text("prompt")
        return GenerationRequest(text=text, suffix=suffix, context=context, json_schema=call.format, **common)
    messages = [] if context else list(opening)
    messages.append({"role": "user", "content": body.text("prompt")})
    chat = _chat(call, _with_system(messages, body.text("system") or ("" if context else system)))
    return GenerationRequest(chat=chat, context=context, **common)


def _chat(call: Call, messages: Sequence[Mapping[str, Any]]) -> ChatRequest:
    given = call.body.objects("tools", call.limits.tools) if call.is_chat else ()
    tools = [read_tool(tool, call.limits) for tool in given]
    think, effort = (True, call.think) if isinstance(call.think, str) else (call.think, "")
    return ChatRequest(messages=messages, tools=tools, json_schema=call.format, think=think, effort=effort)


def _with_system(messages: Sequence[Mapping[str, Any]], system: str) -> list[Mapping[str, Any]]:
    if not system or any(message["role"] == "system" for message in messages):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _messages(call: Call) -> list[dict[str, Any]]:
    messages = [_message(message, call.limits) for message in call.body.objects("messages", call.limits.messages)]
    _give_ids(messages)
    return messages


def _message(message: Fields, limits: Limits) -> dict[str, Any]:
    role = message.text("role")
    if role not in _ROLES:
        message.refuse("role", f"be one of {', '.join(_ROLES)}")
    _refuse_images(message, limits)
    found: dict[str, Any] = {"role": role, "content": message.text("content")}
    if thinking := message.text("thinking"):
        found["reasoning_content"] = thinking
    if calls := message.objects("tool_calls", limits.tools):
        found["tool_calls"] = [_call_of_message(call) for call in calls]
    if role == "tool":
        found["name"] = message.text("tool_name") or message.text("name")
        found["tool_call_id"] = message.text("tool_call_id")
    return found


def _call_of_message(call: Fields) -> dict[str, Any]:
    function = call.object("function")
    if function is None:
        call.refuse("function", "be an object")
    arguments = function.any("arguments")
    if not isinstance(arguments, dict | None):
        function.refuse("arguments", "be an object")
    return {
        "id": call.text("id"),
        "type": "function",
        "function": {"name": function.text("name"), "arguments": json.dumps(arguments or {}, ensure_ascii=False)},
    }


def _give_ids(messages: Sequence[dict[str, Any]]) -> None:
    """Templates may want to know which call a result belongs to; older clients do not say."""
    waiting: list[str] = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = call["id"] or f"call_{len(waiting):09d}"
            waiting.append(call["id"])
        if message["role"] == "tool" and not message["tool_call_id"]:
            message["tool_call_id"] = waiting.pop(0) if waiting else "call_000000000"


def _refuse_images(body: Fields, limits: Limits) -> None:
    if body.items("images", limits.images):
        raise BadRequestError("this model does not support images", param="images")


def _think(body: Fields) -> bool | str | None:
    value = body.any("think")
    if value is None or isinstance(value, bool):
        return value
    if value not in ("low", "medium", "high"):
        body.refuse("think", 'be true, false, "low", "medium" or "high"')
    return str(value)


def _format(body: Fields, limits: Limits) -> Mapping[str, Any] | None:
    value = body.any("format")
    if value in (None, ""):
        return None
    if value == "json":
        return _ANY_JSON
    if not isinstance(value, dict):
        raise BadRequestError('format must be "json" or a JSON schema', param="format")
    check_schema("format", value, limits)
    return value or _ANY_JSON


# ---- answers ----


def timestamp(when: datetime | None = None) -> str:
    """Return a time in RFC 3339, in UTC, as Go prints it."""
    return (when or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def chat_message(piece: Piece, calls: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a piece as a message."""
    message: dict[str, Any] = {"role": "assistant", "content": piece.content}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if calls:
        message["tool_calls"] = list(calls)
    return message


def tool_calls(parts: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """Put parts of calls together: Ollama sends whole ones, with arguments as objects."""
    whole: dict[int, dict[str, str]] = {}
    for part in parts:
        call = whole.setdefault(part.index, {"id": "", "name": "", "arguments": ""})
        call["id"] += part.id
        call["name"] += part.name
        call["arguments"] += part.arguments
    return [
        {"id": call["id"], "function": {"index": index, "name": call["name"], "arguments": _object(call["arguments"])}}
        for index, call in sorted(whole.items())
        if call["name"]
    ]


def _object(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; a cut-off answer may have broken ones."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def final_figures(reason: str, n_prompt: int, n_generated: int, timing: Timing) -> dict[str, Any]:
    """Return the last object's figures; durations are whole nanoseconds."""
    return {
        "done": True,
        "done_reason": {"context_full": "length", "tool_calls": "stop"}.get(reason, reason),
        "total_duration": timing.total,
        "load_duration": timing.load,
        "prompt_eval_count": n_prompt,
        "prompt_eval_duration": timing.prompt,
        "eval_count": n_generated,
        "eval_duration": timing.decode,
    }


def speculation(stats: RequestStats, policy: str, speeds: Speeds) -> dict[str, Any]:
    """Return what speculation did, for the last object's `dspark`."""
    return {
        "n_reused": stats.n_reused,
        "n_rounds": stats.n_rounds,
        "n_drafted": stats.n_drafted,
        "n_scheduled": stats.n_scheduled,
        "n_accepted": stats.n_accepted,
        "accepted_length": round(stats.accepted_length, 3),
        "policy": policy,
        "n_parked": stats.n_parked,
        "n_probes": stats.n_probes,
        "park_reason": stats.park_reason,
        "scheduled_per_position": list(stats.scheduled_per_position),
        "accepted_per_position": list(stats.accepted_per_position),
        **speeds.to_dict(),
        "queue_ms": stats.queue_ms,
        "draft_ms": stats.draft_ms,
        "verify_ms": stats.verify_ms,
        "host_ms": stats.host_ms,
    }


def logprob_items(entries: Sequence[TokenLogprob], texts: Mapping[int, bytes], n_top: int) -> list[dict[str, Any]]:
    """Return log-probabilities as Ollama lays them out."""

    def item(token: int, logprob: float) -> dict[str, Any]:
        return {"token": texts[token].decode("utf-8", "replace"), "logprob": logprob, "bytes": list(texts[token])}

    found = []
    for entry in entries:
        one = item(entry.token_id, entry.logprob)
        if n_top:
            one["top_logprobs"] = [item(token, logprob) for token, logprob in entry.top[:n_top]]
        found.append(one)
    return found
