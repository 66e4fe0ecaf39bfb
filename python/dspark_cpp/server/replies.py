"""From the engine's events to pieces of an answer: text, thinking, tool calls. One object per request, one thread."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dspark_cpp import _core
from dspark_cpp.chat import TextStream
from dspark_cpp.errors import DecodeError
from dspark_cpp.results import RequestStats, TokenLogprob
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.prompts import Job
from dspark_cpp.server.requests import Piece, Speeds, ToolCall

__all__ = ["ReplyReader"]

_DEAD_END = "grammar must"  # how the engine's complaints about a request's own format begin
_EMPTY: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}


class ReplyReader:
    """Reads the answer to one job.

    Parameters
    ----------
    model
        Gives tokens their bytes.
    job
        Stop strings, the parser, which special tokens are shown.
    """

    def __init__(self, model: _core.Model, job: Job) -> None:
        self._model = model
        self._job = job
        self._stream = TextStream(job.params.stop_strings)
        self._text = job.opening  # for the parser, which reads from the beginning each time
        self._message = _EMPTY
        self._call_ids: list[str] = []

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: no further tokens are needed."""
        return self._stream.is_stopped

    def feed(self, event: _core.Event) -> Piece:
        """Take one event of the request.

        Raises
        ------
        BadRequestError
            Nothing can be said that keeps to the format which the client asked for.
        DecodeError
            The engine gave it up.
        """
        if event.finish_reason == "error":
            raise BadRequestError(event.error) if event.error.startswith(_DEAD_END) else DecodeError(event.error)
        texts = self._push(event.tokens)
        n = len(texts)
        reason = event.finish_reason
        if reason is not None:
            rest = self._stream.finish()
            reason = "stop" if self._stream.is_stopped else reason
            if rest:
                texts = [*texts[:-1], texts[-1] + rest] if texts else [rest]
        piece = Piece(
            content="".join(texts),
            token_ids=tuple(event.tokens[:n]),
            token_texts=tuple(texts),
            drafted=tuple(event.drafted[:n]) + (False,) * (len(texts) - n),
            logprobs=_logprobs(event, n),
            finish_reason=reason,
            speeds=Speeds.of(*event.progress),
            stats=RequestStats() if event.stats is None else RequestStats.from_core(event.stats),
        )
        return piece if self._job.parser is None else self._parsed(self._job.parser, piece)

    def _push(self, tokens: Sequence[int]) -> list[str]:
        texts = []
        for token in tokens:
            if self._stream.is_stopped:
                break
            texts.append(self._stream.push(self._model.token_to_piece(token, token in self._job.shown)))
        return texts

    def _parsed(self, parser: _core.ChatParser, piece: Piece) -> Piece:
        self._text += piece.content
        message = self._read(parser, piece.is_last)
        content = _growth(self._message["content"], message["content"])
        thinking = _growth(self._message["reasoning_content"], message["reasoning_content"])
        calls = self._call_growth(message["tool_calls"])
        self._message = message
        reason = piece.finish_reason
        if reason == "stop" and message["tool_calls"]:
            reason = "tool_calls"
        texts = [""] * len(piece.token_texts)  # the parser moves text about: it goes with the last token
        if texts:
            texts[-1] = content + thinking
        return replace(
            piece,
            content=content,
            thinking=thinking,
            tool_calls=calls,
            token_texts=tuple(texts),
            finish_reason=reason,
        )

    def _read(self, parser: _core.ChatParser, is_last: bool) -> dict[str, Any]:
        try:
            message: dict[str, Any] = json.loads(parser.parse(self._text, not is_last))
        except ValueError:
            if not is_last:
                return self._message
            message = self._read_leniently(parser)
        # What was sent cannot be taken back: a reading that does so waits for the next one.
        keeps = all(message[name].startswith(self._message[name]) for name in ("content", "reasoning_content"))
        keeps = keeps and len(message["tool_calls"]) >= len(self._message["tool_calls"])
        return message if keeps else self._message

    def _read_leniently(self, parser: _core.ChatParser) -> dict[str, Any]:
        """Read an answer that was cut off, or breaks its format: what can be read, else all of it as content."""
        try:
            message: dict[str, Any] = json.loads(parser.parse(self._text, True))
        except ValueError:
            message = _EMPTY
        return message if any(message.values()) or any(self._message.values()) else _EMPTY | {"content": self._text}

    def _call_growth(self, calls: Sequence[dict[str, str]]) -> tuple[ToolCall, ...]:
        grown = []
        before = self._message["tool_calls"]
        for index, call in enumerate(calls):
            is_new = index >= len(before)
            if is_new:
                self._call_ids.append(call["id"] or f"call_{secrets.token_hex(12)}")
            old = "" if is_new else before[index]["arguments"]
            arguments = _growth(old, call["arguments"])
            if is_new or arguments:
                name = call["name"] if is_new else ""
                grown.append(ToolCall(index, self._call_ids[index] if is_new else "", name, arguments))
        return tuple(grown)


def _growth(old: str, new: str) -> str:
    return new[len(old) :] if new.startswith(old) else ""


def _logprobs(event: _core.Event, n: int) -> tuple[TokenLogprob, ...]:
    pairs = zip(event.tokens[:n], event.logprobs, strict=False)
    return tuple(TokenLogprob(token, entry.logprob, tuple(entry.top)) for token, entry in pairs)
