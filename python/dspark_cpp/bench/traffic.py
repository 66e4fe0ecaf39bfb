"""Answers prompts as users who wait would ask for them: each stream asks its next question when its answer has ended.

Owns: the clock of a run. Must not know: policies, engines, figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_cpp import _core
from dspark_cpp.engine_loop import EngineLoop, RequestGroup
from dspark_cpp.errors import DSparkError

__all__ = ["Stream", "Traffic", "answer_all"]


@dataclass(slots=True)
class Stream:
    """One request as its caller sees it."""

    submitted: float
    first: float = 0.0
    last: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    stats: _core.RequestStats | None = None

    def feed(self, event: _core.Event, now: float) -> None:
        """Take in an event that arrived at a time."""
        if event.finish_reason == "error":
            raise DSparkError(f"cannot measure: {event.error}")
        if event.tokens:
            self.first = self.first or now
            self.last = now
            self.arrivals.append((now, len(event.tokens)))
        self.stats = event.stats or self.stats

    @property
    def speed(self) -> float:
        """Tokens per second after the first token; 0 for an answer without text."""
        if not self.arrivals:
            return 0.0
        n_after_first = sum(n for at, n in self.arrivals) - self.arrivals[0][1]
        return n_after_first / max(self.last - self.first, 1e-9)


@dataclass(frozen=True, slots=True)
class Traffic:
    """All answers of a run, in the order of their prompts, and when all streams were busy.

    Attributes
    ----------
    begin
        The last of the first answers has its first token.
    end
        A stream finds no further question.
    """

    streams: list[Stream]
    begin: float
    end: float

    @property
    def n_tokens(self) -> int:
        """Tokens that arrived while all streams were busy."""
        arrivals = (arrival for stream in self.streams for arrival in stream.arrivals)
        return sum(n for at, n in arrivals if self.begin < at <= self.end)


def answer_all(
    loop: EngineLoop,
    prompts: Sequence[Sequence[int]],
    options: Sequence[_core.RequestOptions],
    n_streams: int = 0,
) -> Traffic:
    """Answer prompts, `n_streams` at the same time, in their order; 0: all of them.

    Raises
    ------
    DSparkError
        If an answer ends with an error.
    """
    n_streams = min(n_streams or len(prompts), len(prompts))
    streams: dict[int, Stream] = {}
    waiting = iter(zip(prompts, options, strict=True))
    end = 0.0
    with RequestGroup(loop) as group:

        def ask() -> bool:
            for prompt, one in waiting:
                now = time.perf_counter()
                streams[group.submit(prompt, one)] = Stream(now)
                return True
            return False

        for _ in range(n_streams):
            ask()
        while group.n_open:
            event = group.next_event()
            now = time.perf_counter()
            streams[event.request_id].feed(event, now)
            if event.finish_reason and not ask():
                end = end or now
    answered = list(streams.values())
    begin = max((stream.first for stream in answered[:n_streams]), default=0.0)
    if begin >= end:  # the first answers had ended before the last of them began
        end = max((stream.last for stream in answered), default=0.0)
    return Traffic(answered, begin, end)
