"""Runs cells: every way of decoding once per repetition, short runs there and back (A B C, C B A), within one process.

Owns: engines, clocks. A cell's engines stay open through its repetitions: one without a drafter for plain decoding, one
for the default policy, which learns from its own steps alone, one for all other ways. Where steps are short there are
two that take turns, but for the default policy, which would learn half as much: of engines alike one is up to 15 %
faster, by where its memory happens to lie. A run's speed is that of the time in which all its streams are busy: from
their first tokens until one of them finds no further question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from dspark_cpp import _core
from dspark_cpp.bench.cases import ADAPTIVE, PLAIN, Cell, Workload, request_options
from dspark_cpp.bench.traffic import Traffic, answer_all
from dspark_cpp.config import EngineOptions
from dspark_cpp.llm import LLM

__all__ = [
    "PARTS",
    "Pair",
    "Plan",
    "Run",
    "best_fixed",
    "is_settled",
    "measure",
    "ratios",
    "ratios_to_best",
    "standard_error",
]

_N_WARM_UP = 12
_SETTLED = 0.01
_N_FIRST = 2  # repetitions after which ways far behind the best rest
_FAR = 0.9
_SHORT_MS = 5.0  # steps of models that live in the processor's caches
PARTS = ("draft", "head", "verify", "inject", "sample", "host")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    n_tokens
        Tokens of every answer.
    n_prompts
        Fewest answers of a run; a run has at least as many as streams.
    n_repeats
        Times that every way takes its turn; fixed lengths far behind the best only twice.
    budget_s
        Shared by the cells: no repetition of a cell but the first begins after its part of what is left.
    ignores_end
        Go on after an end-of-text token: for random weights, which have no ends.
    run_s
        A run is made long enough for plain decoding to take this many seconds.
    n_more_repeats
        Further turns, while a cell is not settled (`is_settled`).
    """

    n_tokens: int
    n_prompts: int
    n_repeats: int
    budget_s: float
    ignores_end: bool = False
    run_s: float = 0.0
    n_more_repeats: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One way of decoding in one cell, once.

    Attributes
    ----------
    n_tokens, seconds
        Tokens that came while all streams were busy, and that time.
    user_speed
        Tokens per second of one answer after its first token, mean over answers.
    first_token_ms
        From submission to an answer's first token, mean over answers.
    counts
        Of the run's requests; `n_steps` are the engine's steps without prompts.
    steps_ms
        Engine time by part of a step, all steps without prompts of the run.
    loop_ms
        Time of the run outside the engine: Python, queues.
    """

    cell: Cell
    way: str
    repeat: int
    n_tokens: int
    seconds: float
    user_speed: float
    first_token_ms: float
    counts: dict[str, int]
    scheduled_per_position: list[int]
    accepted_per_position: list[int]
    steps_ms: dict[str, float]
    loop_ms: float

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all streams together."""
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens per round and stream, the target's own included."""
        return self.counts["n_committed"] / max(self.counts["n_rounds"], 1)

    @property
    def scheduled_length(self) -> float:
        """Drafted tokens verified per round and stream."""
        return self.counts["n_scheduled"] / max(self.counts["n_rounds"], 1)


class Pair:
    """The two models, loaded once, and engines of them, one at a time.

    Parameters
    ----------
    target, draft
        GGUF files.
    synthetic
        Accept events to draw in place of verification.
    **options
        Fields of `EngineConfig`.
    """

    def __init__(
        self, target: str, draft: str, synthetic: _core.SyntheticAcceptance | None = None, **options: Any
    ) -> None:
        loading: dict[str, Any] = {"n_gpu_layers": options.get("n_gpu_layers", -1)}
        self.target = _core.Model.load_target(target, **loading)
        self.drafter = _core.Model.load_drafter(draft, self.target, **loading)
        # Repeated prompts must not become free.
        self._options: EngineOptions = {"prefix_reuse": False} | options  # type: ignore[assignment]
        self._llm = type("SyntheticLLM", (LLM,), {"_synthetic_acceptance": synthetic}) if synthetic else LLM

    @property
    def block_size(self) -> int:
        """Drafted tokens of a block."""
        return self.drafter.drafter_info.block_size

    @contextmanager
    def open(self, *, is_plain: bool, n_streams: int, n_ctx: int) -> Iterator[LLM]:
        """Open an engine, with or without the drafter."""
        drafter = None if is_plain else self.drafter
        llm = self._llm(self.target, drafter, **(self._options | {"n_parallel": n_streams, "n_ctx": n_ctx}))
        with llm:
            yield llm


def measure(
    pair: Pair,
    workload: Workload,
    cells: Sequence[Cell],
    ways: Sequence[str],
    plan: Plan,
    advance: Callable[[str], None] = lambda label: None,
) -> Iterator[list[Run]]:
    """Measure cell after cell.

    Parameters
    ----------
    pair
        The models.
    workload
        Prompts by domain.
    cells
        Where to measure.
    ways
        `PLAIN` and policies; all take their turn in every repetition.
    plan
        How much.
    advance
        Called with a label after every run.

    Yields
    ------
    list of Run
        All runs of one cell.
    """
    end = time.perf_counter() + plan.budget_s
    for i, cell in enumerate(cells):
        now = time.perf_counter()
        deadline = now + (end - now) / (len(cells) - i)
        with _Engines(pair, workload, cell, plan) as engines:
            yield _measure_cell(engines, ways, plan, deadline, advance)


def _measure_cell(
    engines: _Engines, ways: Sequence[str], plan: Plan, deadline: float, advance: Callable[[str], None]
) -> list[Run]:
    runs: list[Run] = []
    n_answers = _count_answers(engines, plan)
    for repeat in range(plan.n_repeats + plan.n_more_repeats):
        is_enough = repeat >= plan.n_repeats and is_settled(runs)
        if repeat > 0 and (is_enough or time.perf_counter() > deadline):
            break
        turns = ways if repeat < _N_FIRST else _without_far(ways, runs)
        for way in turns if repeat % 2 == 0 else reversed(turns):
            runs.append(_run(engines.of(way, repeat), engines.workload, engines.cell, way, plan, (repeat, n_answers)))
            advance(f"{engines.cell.label}: {way}")
        engines.take_turns = _is_short(runs)
    return runs


def _is_short(runs: Sequence[Run]) -> bool:
    """Whether plain steps are."""
    plain = [run for run in runs if run.way == PLAIN]
    return any(1000 * run.seconds < _SHORT_MS * run.counts["n_steps"] for run in plain)


def _without_far(ways: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """Leave out fixed lengths that cannot be the best in hindsight."""
    least = _FAR * max(median(ratios(runs, way, PLAIN)) for way in ways)
    return [way for way in ways if not way.startswith("fixed:") or median(ratios(runs, way, PLAIN)) >= least]


def ratios(runs: Sequence[Run], way: str, other: str) -> list[float]:
    """Return throughput over another way's, in the repetitions that both took part in."""
    speeds = {(run.way, run.repeat): run.tokens_per_second for run in runs}
    return [
        speed / max(speeds[other, repeat], 1e-9)
        for (name, repeat), speed in speeds.items()
        if name == way and (other, repeat) in speeds
    ]


def best_fixed(runs: Sequence[Run]) -> str:
    """Return the fastest of plain decoding, `off` and the fixed lengths, by the median ratio to plain decoding.

    A length that rests was far behind, whatever its few ratios say.
    """
    n_last = max(run.repeat for run in runs)
    last = dict.fromkeys(run.way for run in runs if run.repeat == n_last)
    ways = [way for way in last if way in (PLAIN, "off") or way.startswith("fixed:")]
    return max(ways, key=lambda way: median(ratios(runs, way, PLAIN)))


def ratios_to_best(runs: Sequence[Run]) -> list[float]:
    """Return the default policy's throughput over that of the best fixed choice of the other half of the repetitions.

    The fastest of several noisy medians is mostly the luckiest: what chose it cannot judge it too.
    """
    halves = [[run for run in runs if run.repeat % 2 == half] for half in (0, 1)]
    if not all(halves):
        return ratios(runs, ADAPTIVE, best_fixed(runs))
    pairs = zip(halves, reversed(halves), strict=True)
    return [ratio for own, other in pairs for ratio in ratios(own, ADAPTIVE, best_fixed(other))]


def is_settled(runs: Sequence[Run]) -> bool:
    """Whether the default policy's ratios, to plain decoding and to the best fixed choice, are known to a hundredth."""
    if not any(run.way == ADAPTIVE for run in runs):
        return True
    return all(standard_error(ratios(runs, ADAPTIVE, other)) <= _SETTLED for other in {PLAIN, best_fixed(runs)})


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the values' median, from their median deviation, as for normal ones; 0 for one."""
    middle = median(values)
    spread = 1.483 * median(abs(value - middle) for value in values)
    return 1.253 * spread / math.sqrt(len(values))


class _Engines:
    """The engines of one cell, opened when first needed and warmed up."""

    def __init__(self, pair: Pair, workload: Workload, cell: Cell, plan: Plan) -> None:
        self.workload = workload
        self.cell = cell
        self._pair = pair
        self._n_ctx = workload.longest + plan.n_tokens + pair.block_size + 1
        self.take_turns = False
        self._open: dict[tuple[str, int], LLM] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, way: str, repeat: int = 0) -> LLM:
        """Return the engine that serves a way in a repetition."""
        turn = repeat % 2 if self.take_turns and way != ADAPTIVE else 0
        kind = (way if way in (PLAIN, ADAPTIVE) else "", turn)
        if kind not in self._open:
            opened = self._pair.open(is_plain=way == PLAIN, n_streams=self.cell.n_streams, n_ctx=self._n_ctx)
            self._open[kind] = self._stack.enter_context(opened)
            _warm_up(self._open[kind], self.workload, self.cell, way)
        return self._open[kind]


def _count_answers(engines: _Engines, plan: Plan) -> int:
    """Return how many answers a run has: as many for every stream, and plain decoding lasts `run_s`."""
    n_streams = engines.cell.n_streams
    n_rounds = -(-max(plan.n_prompts, n_streams) // n_streams)
    if plan.run_s > 0:
        run = _run(engines.of(PLAIN), engines.workload, engines.cell, PLAIN, plan, (0, n_rounds * n_streams))
        n_rounds = math.ceil(n_rounds * max(1.0, plan.run_s / max(run.seconds, 1e-3)))
    return n_rounds * n_streams


def _warm_up(llm: LLM, workload: Workload, cell: Cell, way: str) -> None:
    prompts = [prompt[-32:] for _, prompt in workload.take(cell.domain, cell.n_streams)]
    answer_all(llm.loop, prompts, [request_options(way, cell.temperature, _N_WARM_UP, 0)] * len(prompts))


def _run(llm: LLM, workload: Workload, cell: Cell, way: str, plan: Plan, turn: tuple[int, int]) -> Run:
    repeat, n_answers = turn
    prompts = workload.take(cell.domain, n_answers)
    numbers = [(domain, repeat * 1000 + i) for i, (domain, _) in enumerate(prompts)]
    options = [
        request_options(
            way,
            cell.temperature,
            plan.n_tokens if cell.n_streams == 1 else workload.answer_limit(domain, number, plan.n_tokens),
            workload.seed(domain, number),
            ignores_end=plan.ignores_end,
        )
        for domain, number in numbers
    ]
    before, began = llm.stats, time.perf_counter()
    traffic = answer_all(llm.loop, [prompt for _, prompt in prompts], options, cell.n_streams)
    elapsed_ms = 1000 * (time.perf_counter() - began)
    return _as_run(cell, way, repeat, traffic, _difference(before, llm.stats), elapsed_ms)


def _difference(before: _core.EngineStats, after: _core.EngineStats) -> dict[str, float]:
    names = ["n_steps", "n_prefill_steps", "prefill_ms", *(f"{part}_ms" for part in PARTS)]
    parts = {name.removesuffix("_ms"): getattr(after, name) - getattr(before, name) for name in names}
    # The engine counts the head in draft and sampling in host; here the parts add up.
    return parts | {"draft": parts["draft"] - parts["head"], "host": parts["host"] - parts["sample"]}


def _as_run(cell: Cell, way: str, repeat: int, traffic: Traffic, steps: dict[str, float], elapsed_ms: float) -> Run:
    streams = traffic.streams
    speeds = [stream.speed for stream in streams if stream.arrivals]
    stats = [stream.stats for stream in streams if stream.stats is not None]
    names = ("n_prompt", "n_rounds", "n_drafted", "n_scheduled", "n_accepted", "n_committed")
    counts = {name: sum(getattr(one, name) for one in stats) for name in names}
    counts["n_steps"] = int(steps["n_steps"] - steps["n_prefill_steps"])
    steps_ms = {name: steps[name] for name in PARTS}
    return Run(
        cell,
        way,
        repeat,
        traffic.n_tokens,
        traffic.end - traffic.begin,
        sum(speeds) / max(len(speeds), 1),
        1000 * sum(s.first - s.submitted for s in streams if s.arrivals) / max(len(speeds), 1),
        counts,
        [sum(column) for column in zip(*(one.scheduled_per_position for one in stats), strict=True)],
        [sum(column) for column in zip(*(one.accepted_per_position for one in stats), strict=True)],
        steps_ms,
        elapsed_ms - steps["prefill"] - sum(steps_ms.values()),
    )
