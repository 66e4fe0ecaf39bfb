"""What is measured: prompts by domain, the cells of the sweep, the ways of decoding that take turns in each.

Plain data: knows no engine and no clock.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

from dspark_cpp import _core

__all__ = ["ADAPTIVE", "MIXED", "PLAIN", "Cell", "Workload", "read_questions", "request_options", "ways_of"]

PLAIN = "plain"  # an engine without a drafter, not a policy
ADAPTIVE = "adaptive"  # the default policy
MIXED = "mixed"
_DEMO_QUESTIONS = Path(__file__).parents[1] / "demo" / "prompts.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the sweep: what stays the same while the ways of decoding take turns."""

    domain: str
    temperature: float
    n_streams: int

    @property
    def label(self) -> str:
        """For tables and titles."""
        streams = "1 stream" if self.n_streams == 1 else f"{self.n_streams} streams"
        return f"{self.domain}, T = {self.temperature:g}, {streams}"


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts by domain, as tokens. The order of the domains is that of synthetic acceptance."""

    prompts: Mapping[str, Sequence[Sequence[int]]]

    def take(self, domain: str, n: int, first: int = 0) -> list[tuple[str, Sequence[int]]]:
        """Return n prompts with their domains from the `first` on; mixed traffic takes the domains in turns."""
        if domain == MIXED:
            in_turns = chain.from_iterable(zip(*(cycle(self._named(name)) for name in self.prompts), strict=True))
            return list(islice(in_turns, first, first + n))
        return list(islice(cycle(self._named(domain)), first, first + n))

    def _named(self, domain: str) -> list[tuple[str, Sequence[int]]]:
        return [(domain, prompt) for prompt in self.prompts[domain]]

    def seed(self, domain: str, number: int) -> int:
        """Return a seed that synthetic acceptance takes for the domain's: its index, modulo their number."""
        return number * len(self.prompts) + list(self.prompts).index(domain)

    def answer_limit(self, domain: str, number: int, n_tokens: int) -> int:
        """Return the most tokens of one of many answers: from half of `n_tokens` on, evenly, every policy's the same.

        Answers of one length end together, and the prompts that follow share a pass, which no users' do.
        """
        return random.Random(self.seed(domain, number)).randint(-(-n_tokens // 2), n_tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompts in self.prompts.values() for prompt in prompts)

    @classmethod
    def build(
        cls, questions: Mapping[str, Sequence[str]], tokenize: Callable[[str], list[int]], n_tokens: int = 0
    ) -> Workload:
        """Tokenize questions; with `n_tokens`, bring every prompt to that length by other questions before it."""
        prompts = {name: [tokenize(text) for text in texts] for name, texts in questions.items()}
        if n_tokens == 0:
            return cls(prompts)
        return cls({name: [_pad(one, each, n_tokens) for one in each] for name, each in prompts.items()})


def _pad(prompt: Sequence[int], others: Sequence[Sequence[int]], n_tokens: int) -> list[int]:
    missing = n_tokens - len(prompt)
    if missing <= 0:
        return list(prompt[-n_tokens:])
    return [*islice(cycle(chain.from_iterable(others)), missing), *prompt]


def read_questions(path: Path | None = None) -> dict[str, list[str]]:
    """Read questions by domain: a JSON object of lists of texts; without a path, those of the demo pair.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    questions: Any = json.loads((path or _DEMO_QUESTIONS).read_text(encoding="utf-8"))
    is_good = isinstance(questions, dict) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts)
        for texts in questions.values()
    )
    if not is_good or not questions:
        raise ValueError(f"prompts must be a JSON object of lists of texts by domain, got {path}")
    return dict(questions)


def ways_of(policies: str, block_size: int) -> list[str]:
    """Expand `--policies` into the ways that take turns: plain decoding first, the default policy beside it.

    Parameters
    ----------
    policies
        Separated by commas: off, fixed:n, fixed:a..b, threshold:p, algorithm1, adaptive.
    block_size
        Drafted tokens of a block: longer fixed lengths are left out.
    """
    ways = [PLAIN]
    for name in policies.split(","):
        kind, _, value = name.partition(":")
        if kind == "fixed" and ".." in value:
            first, last = (int(number) for number in value.split(".."))
            ways += [f"fixed:{length}" for length in range(first, min(last, block_size) + 1)]
        elif name and name not in ways:
            ways.append(name)
    return sorted(ways, key=lambda way: way not in (PLAIN, ADAPTIVE))


def request_options(
    way: str, temperature: float, n_tokens: int, seed: int, *, ignores_end: bool = False
) -> _core.RequestOptions:
    """Return the options of a request of at most `n_tokens` tokens that is decoded in a way."""
    return _core.RequestOptions(
        max_tokens=n_tokens,
        temperature=temperature,
        seed=seed,
        ignore_eos=ignores_end,
        policy=None if way == PLAIN else way,
    )
