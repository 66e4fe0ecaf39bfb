"""What both dialects translate a client's request into, and what a model's answer is made of. Plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_cpp.config import SamplingParams
from dspark_cpp.results import RequestStats, TokenLogprob

__all__ = ["ChatRequest", "GenerationRequest", "Piece", "Speeds", "ToolCall", "ToolChoice"]

ToolChoice = str  # auto | none | required


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to answer, in OpenAI's form.

    Attributes
    ----------
    think
        None: as the template does by itself.
    effort
        "low", "medium", "high": how much, for templates that ask; empty: theirs to say.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool | None = None
    json_schema: Mapping[str, Any] | None = None
    think: bool | None = None
    effort: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What is to be generated for one request; exactly one of `chat`, `text` and `tokens` is the prompt.

    Attributes
    ----------
    text, suffix
        A prompt as it is; with a suffix, what goes between the two.
    context
        Tokens that stand before the prompt.
    params
        Options; `max_tokens` None is up to the context's end.
    truncates
        Make a prompt that is too long fit, by leaving out its oldest part, instead of refusing it.
    shifts
        Go on when the context is full, where the model can forget its older half, but for the first `n_keep` tokens.
    """

    params: SamplingParams
    max_tokens: int | None = None
    chat: ChatRequest | None = None
    text: str | None = None
    suffix: str = ""
    tokens: Sequence[int] | None = None
    context: Sequence[int] = ()
    json_schema: Mapping[str, Any] | None = None
    n_ctx: int | None = None
    n_keep: int = 4
    truncates: bool = False
    shifts: bool = False


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, or in a stream what came of it: `index` says which one, `arguments` is JSON text."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second of a request's rounds so far, by the engine's clock.

    Attributes
    ----------
    actual
        As it was.
    plain
        As it would have been without a drafter under the same load, by the engine's measured costs.

    Either is None while unknown.
    """

    actual: float | None = None
    plain: float | None = None

    @classmethod
    def of(cls, n_tokens: int, rounds_ms: float, plain_ms: float) -> Speeds:
        """Divide."""
        return cls(*(1e3 * n_tokens / ms if ms > 0 else None for ms in (rounds_ms, plain_ms)))

    def to_dict(self) -> dict[str, float]:
        """Return what is known, by the names of the answers."""
        speeds = {"tokens_per_second": self.actual, "plain_tokens_per_second": self.plain}
        return {name: round(speed, 2) for name, speed in speeds.items() if speed is not None}


@dataclass(frozen=True, slots=True)
class Piece:
    """What the rounds since the last piece added to an answer.

    Attributes
    ----------
    token_texts
        Text per token; their sum is `content` + `thinking`.
    tool_calls
        What came of the calls.
    finish_reason
        In the last piece only: "stop", "length", "context_full" or "tool_calls".
    """

    content: str = ""
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    token_texts: tuple[str, ...] = ()
    drafted: tuple[bool, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    speeds: Speeds = Speeds()
    stats: RequestStats = field(default_factory=RequestStats)

    @property
    def is_last(self) -> bool:
        """Whether the answer ends here."""
        return self.finish_reason is not None
