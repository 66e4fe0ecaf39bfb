"""What a caller gets: chunks, completions, and the figures of a request. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from dspark_cpp import _core

__all__ = ["Chunk", "Completion", "RequestStats", "TokenLogprob"]


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
    """What the rounds since the last chunk added to a streamed answer.

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


def _park_reason(stats: _core.RequestStats) -> str:
    if stats.n_parked == 0:
        return ""
    if stats.park_extra_ms <= 0:
        return f"no draft length pays beside a plain step of {stats.park_plain_ms:.3g} ms"
    return (
        f"a draft is expected to bring {stats.park_tokens:.2f} tokens for {stats.park_extra_ms:.3g} ms "
        f"more than a plain step of {stats.park_plain_ms:.3g} ms"
    )
