"""The bundled pair for tests of exactness: drafters of all heads, prompts, and how to run requests and compare texts.

Why texts are compared up to a margin. These tests run f32 weights, which our kernels leave to ggml (`test_same_text.py`
has the types that keep their bits): the same row in a batch of another size is summed in another order, so its logits
differ in the last bits: by up to 3e-5 with f32 caches and without flash attention. Where two
tokens lie closer than that, either is a right answer, and the texts part there for good. `Plain` knows how far each
decision of the plain run was from going the other way; a comparison ends at the first one that was nearer than a bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, zip_longest
from math import exp, inf
from pathlib import Path
from typing import Any

from dspark_cpp import _core
from dspark_cpp.convert import ConvertOptions, convert

DATA = Path(__file__).parent / "data" / "demo_pair"
HEADS = ("vanilla", "gated", "rnn")

# With f32 weights the neighbours matter least with f32 caches and without ggml's flash attention, which rounds to f16;
# and figures that do not depend on what ran before: no prefix reuse.
exact_engine = partial(_core.Engine, kv_type="f32", flash_attention=False, n_threads=1, prefix_reuse=False)

Pick = Callable[[int], _core.RequestOptions]


def convert_heads(target: Path, folder: Path) -> dict[str, Path]:
    """Convert the drafters of all three heads to 32-bit floats."""
    for head in HEADS:
        convert(ConvertOptions(DATA / head, target, folder / f"{head}.gguf", outtype="f32"))
    return {head: folder / f"{head}.gguf" for head in HEADS}


def read_prompts(n: int) -> list[str]:
    """Return n prompts, the three domains in turn: questions in chat form, every tenth one raw text."""
    data = json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))
    questions, raw = (_take_turns(data[name]) for name in ("prompts", "raw"))
    return [raw[i // 10] if i % 10 == 9 else questions[i] for i in range(n)]


def _take_turns(prompts: list[dict[str, Any]]) -> list[str]:
    domains: dict[str, list[str]] = {}
    for prompt in prompts:
        domains.setdefault(prompt["domain"], []).append(prompt["text"])
    rows = zip_longest(*(dict.fromkeys(texts) for texts in domains.values()))
    return [text for row in rows for text in row if text is not None]


@dataclass
class Answer:
    """What an engine said about one request."""

    tokens: list[int] = field(default_factory=list)
    drafted: list[bool] = field(default_factory=list)
    logprobs: list[_core.TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str = ""
    stats: Any = None
    n_events: int = 0

    def add(self, event: _core.Event) -> None:
        """Append an event; there must be none after the last."""
        assert self.finish_reason is None, "an event came after the last one"
        assert len(event.tokens) == len(event.drafted)
        assert (event.stats is None) == (event.finish_reason is None)
        self.tokens += event.tokens
        self.drafted += event.drafted
        self.logprobs += event.logprobs
        self.finish_reason, self.error, self.stats = event.finish_reason, event.error, event.stats
        self.n_events += 1


def run(engine: _core.Engine, prompts: Sequence[list[int]], pick: Pick, has_drafter: bool = True) -> list[Answer]:
    """Submit all prompts, with options pick(i), and step to the end; the caches are checked after every step."""
    options = [pick(i) for i in range(len(prompts))]
    answers = {engine.submit(prompt, own): Answer() for prompt, own in zip(prompts, options, strict=True)}
    drafts = {request: own.draft_limit != 0 for request, own in zip(answers, options, strict=True)}
    lengths = dict(zip(answers, map(len, prompts), strict=True))
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].add(event)
        check_caches(engine, answers, lengths, drafts if has_drafter else {})
    return list(answers.values())


def check_caches(
    engine: _core.Engine, answers: dict[int, Answer], lengths: dict[int, int], drafts: dict[int, bool]
) -> None:
    """Both caches must hold all committed tokens but the newest: it is the next anchor, not computed yet.

    Of a request that never drafts the drafter holds nothing.
    """
    for request, target, draft in engine.cache_positions():
        answer = answers[request]
        assert answer.finish_reason is None
        if answer.tokens:
            assert target == lengths[request] + len(answer.tokens) - 2
        else:
            assert target < lengths[request] - 1  # in the middle of the prompt
        assert draft == (target if drafts.get(request) else -1)


@dataclass(frozen=True)
class Plain:
    """The text without speculation, and the distance of each of its decisions from going the other way."""

    tokens: list[int]
    margins: list[float]
    finish_reason: str

    def n_safe(self, bound: float) -> int:
        """Return the number of leading tokens that no rounding below `bound` can change."""
        return next((i for i, margin in enumerate(self.margins) if margin < bound), len(self.tokens))


def greedy(max_tokens: int, **options: Any) -> _core.RequestOptions:
    """Options of a greedy request."""
    return _core.RequestOptions(max_tokens=max_tokens, temperature=0, **options)


def run_plain(target: _core.Model, prompts: Sequence[list[int]], max_tokens: int, n_ctx: int = 512) -> list[Plain]:
    """Greedy texts one at a time without a drafter; a margin is log p(best) - log p(second)."""
    answers = run(exact_engine(target, n_ctx=n_ctx), prompts, lambda i: greedy(max_tokens, n_logprobs=2), False)
    return [Plain(a.tokens, [gap(entry.top) for entry in a.logprobs], str(a.finish_reason)) for a in answers]


def gap(top: Sequence[tuple[int, float]]) -> float:
    """Return how far the best token is ahead of the second."""
    return top[0][1] - top[1][1]


def edge_distance(top: Sequence[tuple[int, float]], uniform: float, temperature: float) -> float:
    """Return how far a draw was from giving another token: the distance of u from the steps of the cumulative sum.

    `top`: the k best tokens and one more, of a request with top_k = k. Where the order of the last two is open, the set
    drawn from is open too: then the distance is 0.
    """
    *kept, (_, next_best) = top
    if kept[-1][1] - next_best < 1e-4:
        return 0.0
    weights = [exp((logprob - kept[0][1]) / temperature) for _, logprob in sorted(kept)]
    edges = list(accumulate(weights))
    return min((abs(edge / edges[-1] - uniform) for edge in edges[:-1]), default=inf)


def count_complete(plain: Iterable[Plain], answers: Iterable[Answer], bound: float) -> float:
    """Check every text up to its first open decision; return the share of the texts that were compared to the end."""
    n_complete = n_texts = 0
    for expected, answer in zip(plain, answers, strict=True):
        n = min(expected.n_safe(bound), len(expected.tokens))
        assert answer.tokens[:n] == expected.tokens[:n]
        if n == len(expected.tokens) == len(answer.tokens):
            assert answer.finish_reason == expected.finish_reason
            n_complete += 1
        n_texts += 1
    return n_complete / n_texts
