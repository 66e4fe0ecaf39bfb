"""From engine events to what a caller reads: text, chunks, completions; and from chat messages to a prompt.

Owns: decoding tokens to text as they come (whole characters only, nothing of a stop string), the chat template's
inputs. Must not know: threads, queues, how a request is run. One thread per object.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dspark_cpp import _core
from dspark_cpp.config import SamplingParams, checked_text
from dspark_cpp.errors import DecodeError
from dspark_cpp.results import Chunk, Completion, RequestStats, TokenLogprob

__all__ = [
    "Message",
    "ReplyBuilder",
    "TextStream",
    "render_chat",
    "without_second_bos",
]

Message = Mapping[str, Any]


class TextStream:
    """Turns token pieces into text that is final, and finds stop strings across them.

    Parameters
    ----------
    stop : sequence of str
        Strings that end the text, each non-empty.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self.is_stopped = False

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token; return the text that became certain."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.decode(piece)
        return self._release(keep_partial=True)

    def finish(self) -> str:
        """Return what was held back; bytes that never became a character are replaced by U+FFFD."""
        if self.is_stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(keep_partial=False)

    def _release(self, *, keep_partial: bool) -> str:
        cut = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if cut >= 0:
            self.is_stopped = True
            text, self._held = self._held[:cut], ""
            return text
        n_final = len(self._held) - (self._n_partial() if keep_partial else 0)
        text, self._held = self._held[:n_final], self._held[n_final:]
        return text

    def _n_partial(self) -> int:
        """Length of the longest end of the held text that may be the beginning of a stop string."""
        for n in range(min(len(self._held), self._longest - 1), 0, -1):
            tail = self._held[-n:]
            if any(stop.startswith(tail) for stop in self._stop):
                return n
        return 0


class Detokenizer(Protocol):
    """The part of a model that text needs."""

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        """Bytes of one token; none for a special token."""


class ReplyBuilder:
    """Collects one request's events into chunks and, at the end, a completion.

    Parameters
    ----------
    model : Detokenizer
        Gives tokens their bytes.
    params : SamplingParams
        What was asked for: stop strings, log-probabilities.
    seed : int
        The seed the request runs with.
    """

    def __init__(self, model: Detokenizer, params: SamplingParams, seed: int) -> None:
        self._model = model
        self._stream = TextStream(params.stop_strings)
        self._has_logprobs = params.logprobs is not None
        self._seed = seed
        self._chunks: list[Chunk] = []
        self.is_finished = False

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: the request needs no further tokens."""
        return self._stream.is_stopped

    def feed(self, event: _core.Event) -> Chunk:
        """Take one event of the request.

        Returns
        -------
        Chunk
            What it adds; empty once a stop string was found, except for how the request ended.

        Raises
        ------
        DecodeError
            The engine gave the request up.
        """
        if event.finish_reason == "error":
            self.is_finished = True
            raise DecodeError(event.error)
        text, n_tokens = self._push(event.tokens)
        reason = event.finish_reason
        if reason is not None:
            text += self._stream.finish()
            reason = "stop" if self._stream.is_stopped else reason
            self.is_finished = True
        logprobs = _logprobs(event, n_tokens) if self._has_logprobs else None
        chunk = Chunk(text, event.tokens[:n_tokens], event.drafted[:n_tokens], logprobs, reason, _stats(event))
        self._chunks.append(chunk)
        return chunk

    def _push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Text of the tokens up to a stop string, and how many tokens that took."""
        text = ""
        for n, token in enumerate(tokens):
            if self._stream.is_stopped:
                return text, n
            text += self._stream.push(self._model.token_to_piece(token))
        return text, len(tokens)

    def completion(self) -> Completion:
        """Put the whole answer together; only after the last event."""
        last = self._chunks[-1]
        assert last.finish_reason is not None
        assert last.stats is not None
        return Completion(
            text="".join(chunk.text for chunk in self._chunks),
            token_ids=[token for chunk in self._chunks for token in chunk.token_ids],
            finish_reason=last.finish_reason,
            stats=last.stats,
            drafted=[flag for chunk in self._chunks for flag in chunk.drafted],
            logprobs=[entry for chunk in self._chunks for entry in chunk.logprobs or ()]
            if self._has_logprobs
            else None,
            seed=self._seed,
        )


def render_chat(
    model: _core.Model,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    enable_thinking: bool = True,
) -> str:
    """Turn messages into a prompt with the chat template of the model's file.

    Parameters
    ----------
    model : Model
        The target.
    messages : sequence of mapping
        OpenAI form: each has a "role" and usually a "content".
    tools : sequence of mapping, optional
        Functions the model may call, in OpenAI form.
    template : str, optional
        A Jinja template to use instead of the file's.
    enable_thinking : bool
        Passed on to templates that know it.

    Returns
    -------
    str
        The prompt, up to where the answer begins.

    Raises
    ------
    TypeError
        Messages that are not mappings, or hold what JSON cannot.
    ValueError
        No messages, a message without a role, or no template.
    """
    _check_messages(messages)
    if not template and not model.chat_template:
        raise ValueError("cannot apply the chat template: the model has none; give `template`, or use `generate`")
    tools_json = json.dumps([dict(tool) for tool in tools], ensure_ascii=False) if tools else ""
    messages_json = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    checked_text("messages", messages_json)
    return model.apply_chat_template(messages_json, tools_json, template or "", True, enable_thinking)


def without_second_bos(model: _core.Model, tokens: list[int]) -> list[int]:
    """Drop the beginning-of-text token that the tokenizer added before the template's own."""
    is_double = model.adds_bos and tokens[:2] == [model.bos_token] * 2
    return tokens[1:] if is_double else tokens


def _check_messages(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages must be a sequence of mappings, got {messages!r}")
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for message in messages:
        if not isinstance(message, Mapping):
            raise TypeError(f"messages must hold mappings, got {message!r}")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages must each have a role, got {dict(message)!r}")


def _logprobs(event: _core.Event, n_tokens: int) -> list[TokenLogprob]:
    pairs = zip(event.tokens[:n_tokens], event.logprobs, strict=False)
    return [TokenLogprob(token, entry.logprob, tuple(entry.top)) for token, entry in pairs]


def _stats(event: _core.Event) -> RequestStats | None:
    return None if event.stats is None else RequestStats.from_core(event.stats)
