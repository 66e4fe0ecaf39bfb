"""From engine events to what a caller reads: text, chunks, completions; and from chat messages to a prompt.

Owns: decoding tokens to text as they come (whole characters only, nothing of a stop string), the result types, the chat
template's inputs. Must not know: threads, queues, how a request is run. One thread per object.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dspark_cpp import _core
from dspark_cpp.config import SamplingParams, checked_text
from dspark_cpp.errors import DecodeError

__all__ = [
    "Chunk",
    "Completion",
    "Message",
    "ReplyBuilder",
    "RequestStats",
    "TextStream",
    "TokenLogprob",
    "render_chat",
    "without_second_bos",
]

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural log-probability of one generated token under the target's own distribution.

    Attributes
    ----------
    token_id : int
        The token chosen.
    logprob : float
        Its log-probability: log-softmax of the target's logits, before temperature, truncation and penalties.
    top : tuple of (int, float)
        The likeliest tokens and their log-probabilities, best first; as many as `SamplingParams.logprobs` asks for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Counts and times of one request.

    A round is one forward pass of the target that decodes this request. The first token comes out of the prefill and
    belongs to no round. Times are in milliseconds; a pass shared by several requests counts in full for each of them,
    because each of them waited for it.

    Attributes
    ----------
    n_prompt : int
        Tokens of the prompt.
    n_reused : int
        Of those, found in the caches: an earlier request began alike.
    n_discarded : int
        Tokens that context shifts have forgotten.
    n_rounds : int
        Rounds.
    n_drafted, n_scheduled, n_accepted : int
        Tokens the drafter proposed; of those, sent to the target; of those, accepted.
    n_committed : int
        Tokens the rounds added, corrections and bonus tokens included. May exceed the tokens returned: an end-of-text
        token counts, and so does what stood behind a stop string.
    n_parked, n_probes : int
        Rounds decoded plainly because a draft would not have paid; of the drafted ones, those that looked whether that
        still holds.
    park_reason : str
        Why the last of the parked rounds was: what a draft was expected to gain and to cost. Empty when none was.
    scheduled_per_position, accepted_per_position : tuple of int, length block_size
        The same by position in the drafted block.
    queue_ms, prefill_ms : float
        Waiting for a place; reading the prompt.
    draft_ms, verify_ms, host_ms : float
        The drafter's passes; the target's passes; the rest of the rounds (sampling, scheduling, injection).
    plain_ms : float
        What the rounds' tokens would have taken without a drafter: for each a plain step under the load of its step, by
        measured costs. 0 while these are not known.
    """

    n_prompt: int = 0
    n_reused: int = 0
    n_discarded: int = 0
    n_rounds: int = 0
    n_drafted: int = 0
    n_scheduled: int = 0
    n_accepted: int = 0
    n_committed: int = 0
    n_parked: int = 0
    n_probes: int = 0
    park_reason: str = ""
    scheduled_per_position: tuple[int, ...] = ()
    accepted_per_position: tuple[int, ...] = ()
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    host_ms: float = 0.0
    plain_ms: float = 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens committed per round, the bonus token included (tau of the paper's table 1); plain decoding has 1."""
        return self.n_committed / self.n_rounds if self.n_rounds else 0.0

    @property
    def decode_ms(self) -> float:
        """Time in rounds: everything but waiting and prefill."""
        return self.draft_ms + self.verify_ms + self.host_ms

    @property
    def tokens_per_second(self) -> float:
        """Tokens committed per second of `decode_ms`."""
        return 1000.0 * self.n_committed / self.decode_ms if self.decode_ms > 0 else 0.0

    @property
    def speedup(self) -> float:
        """Estimated time of plain decoding over that of the rounds; 0 while unknown."""
        return self.plain_ms / self.decode_ms if self.decode_ms > 0 else 0.0

    @classmethod
    def from_core(cls, stats: _core.RequestStats) -> RequestStats:
        """Copy the engine's own record."""
        return cls(
            n_prompt=stats.n_prompt,
            n_reused=stats.n_reused,
            n_discarded=stats.n_discarded,
            n_rounds=stats.n_rounds,
            n_drafted=stats.n_drafted,
            n_scheduled=stats.n_scheduled,
            n_accepted=stats.n_accepted,
            n_committed=stats.n_committed,
            n_parked=stats.n_parked,
            n_probes=stats.n_probes,
            park_reason=_park_reason(stats),
            scheduled_per_position=tuple(stats.scheduled_per_position),
            accepted_per_position=tuple(stats.accepted_per_position),
            queue_ms=stats.queue_ms,
            prefill_ms=stats.prefill_ms,
            draft_ms=stats.draft_ms,
            verify_ms=stats.verify_ms,
            host_ms=stats.host_ms,
            plain_ms=stats.plain_ms,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one step added to a streamed answer.

    Attributes
    ----------
    text : str
        New text. It may lag behind the tokens: half a character, or what could be the beginning of a stop string, is
        held back until it is certain.
    token_ids : list of int
        New tokens.
    drafted : list of bool
        Per token: an accepted draft, or the target's own.
    logprobs : list of TokenLogprob, optional
        Per token, if asked for.
    finish_reason : str, optional
        In the last chunk only: "stop" (end of text or a stop string), "length", "context_full" or "cancelled".
    stats : RequestStats, optional
        In the last chunk only.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None
    stats: RequestStats | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer.

    Attributes
    ----------
    text : str
        Without special tokens, end-of-text token and stop string.
    token_ids : list of int
        Generated tokens, without the end-of-text token; the last one may be the one that completed a stop string.
    finish_reason : str
        "stop" (end of text or a stop string), "length", "context_full" or "cancelled".
    stats : RequestStats
        Counts and times.
    drafted : list of bool
        Per token: an accepted draft, or the target's own.
    logprobs : list of TokenLogprob, optional
        Per token, if asked for.
    seed : int
        The seed in use; giving it as `SamplingParams.seed` draws the same text again.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stats: RequestStats
    drafted: list[bool]
    logprobs: list[TokenLogprob] | None
    seed: int


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


def _park_reason(stats: _core.RequestStats) -> str:
    if stats.n_parked == 0:
        return ""
    if stats.park_extra_ms <= 0:
        return f"no draft length pays beside a plain step of {stats.park_plain_ms:.3g} ms"
    return (
        f"a draft is expected to bring {stats.park_tokens:.2f} tokens for {stats.park_extra_ms:.3g} ms "
        f"more than a plain step of {stats.park_plain_ms:.3g} ms"
    )


def _stats(event: _core.Event) -> RequestStats | None:
    return None if event.stats is None else RequestStats.from_core(event.stats)
