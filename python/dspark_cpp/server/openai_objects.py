"""OpenAI's dialect: the objects of answers. Pure: no models, no I/O."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_cpp.results import RequestStats, TokenLogprob
from dspark_cpp.server.problems import Problem
from dspark_cpp.server.requests import Piece, ToolCall

__all__ = [
    "chat_logprobs",
    "completion_logprobs",
    "delta",
    "error_body",
    "finish_reason",
    "new_id",
    "timings",
    "usage",
    "whole_message",
]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
}


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


def whole_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return all pieces as one message."""
    content = "".join(piece.content for piece in pieces)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if thinking := "".join(piece.thinking for piece in pieces):
        message["reasoning_content"] = thinking
    if calls := _whole_calls([call for piece in pieces for call in piece.tool_calls]):
        message["tool_calls"] = calls
        message["content"] = content or None
    return message


def _whole_calls(parts: Sequence[ToolCall]) -> list[dict[str, Any]]:
    whole: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = whole.setdefault(
            part.index, {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        )
        call["function"]["arguments"] += part.arguments
    return [call for _, call in sorted(whole.items())]


def _call_delta(call: ToolCall) -> dict[str, Any]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def usage(n_prompt: int, n_cached: int, n_generated: int, stats: Sequence[RequestStats]) -> dict[str, Any]:
    """Return counts; drafted tokens as OpenAI counts predictions."""
    n_accepted = sum(one.n_accepted for one in stats)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "completion_tokens_details": {
            "accepted_prediction_tokens": n_accepted,
            "rejected_prediction_tokens": sum(one.n_scheduled for one in stats) - n_accepted,
        },
        "prompt_tokens_details": {"cached_tokens": n_cached},
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
        "n_parked": stats.n_parked,
        "park_reason": stats.park_reason,
        "accepted_length": round(stats.accepted_length, 3),
        "speedup": round(stats.speedup, 3) if stats.speedup else None,
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
