"""A machine that is not what it was at load, and the real scheduler on it: what it makes beside plain decoding.

Costs from load err by curve and by size, plain and drafted passes change their speed on their own, plain passes behind
others settle, a draft behind a plain step is dearer, some steps take long for no reason; an ideal machine has none of
this. A request that ends makes room for the next one, or requests come in waves as in `dspark bench`. Every policy sees
the same answers, the same acceptance at every position and the same machine at every time. Run as a script for the
table that changes of the scheduler are judged by:

    python tests/scheduling_machine.py [seeds [machine ...]]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from dspark_cpp import _core
from numpy.typing import NDArray

BLOCK = 7
N_TOKENS = 64  # of an answer
SLOW = 4.0  # times what passes take otherwise, in a slow moment
Points = list[tuple[int, float]]
Slow = tuple[float, float]  # from when to when, in milliseconds


@dataclass(frozen=True)
class Machine:
    """What passes cost on it, in milliseconds by size; beyond the last size by the last slope."""

    plain: Points
    verify: Points
    draft: Points
    inject: Points
    rebuild_ms: float
    overhead_ms: float


MACHINES = {
    # The bundled pair on two Zen 4 cores; graphs are kept, so a pass of another shape costs hardly more.
    "demo": Machine(
        plain=[(1, 0.3), (2, 0.32), (4, 0.41), (8, 0.65), (16, 1.1)],
        verify=[(1, 0.31), (2, 0.37), (4, 0.46), (8, 0.66), (16, 1.3), (32, 2.5), (64, 4.6), (128, 9.3)],
        draft=[(1, 0.18), (2, 0.3), (4, 0.55), (8, 1.15), (16, 2.3)],
        inject=[(1, 0.034), (4, 0.045), (8, 0.065), (32, 0.2), (128, 0.86)],
        rebuild_ms=0.015,
        overhead_ms=0.08,
    ),
    # A 0.6B model there.
    "cpu": Machine(
        plain=[(1, 14.6), (2, 16.5), (4, 20.6), (8, 28.5), (16, 52.0)],
        verify=[(1, 14.8), (2, 16.7), (4, 20.8), (8, 28.7), (16, 52.5), (32, 100.0), (128, 390.0)],
        draft=[(1, 5.0), (2, 7.5), (4, 12.5), (8, 23.0), (16, 45.0)],
        inject=[(1, 1.0), (8, 2.0), (128, 30.0)],
        rebuild_ms=0.0,
        overhead_ms=0.4,
    ),
    # 8B on a GPU.
    "gpu": Machine(
        plain=[(1, 6.0), (8, 7.5), (16, 8.5)],
        verify=[(1, 6.2), (8, 8.0), (16, 9.0), (32, 11.0), (64, 15.0), (128, 24.0)],
        draft=[(1, 1.8), (8, 2.6), (16, 3.6)],
        inject=[(1, 0.5), (128, 1.5)],
        rebuild_ms=0.0,
        overhead_ms=0.3,
    ),
}


@dataclass(frozen=True)
class Traffic:
    """Texts and what a drafter makes of them; spreads are standard deviations in logits.

    Attributes
    ----------
    rates
        P(draft accepted | those before it were) of texts that arrive in turns.
    tokens
        Spread of the tokens' difficulty, which confidences see.
    rounds, unseen
        Spread of the rounds' difficulty: what confidences see of it, and what they do not.
    is_blind
        Confidences say the same of every round and text.
    """

    rates: list[float]
    tokens: float = 0.0
    rounds: float = 1.06
    unseen: float = 1.06
    is_blind: bool = False


DRAFTERS = {
    "good": Traffic([0.83, 0.95, 0.93]),
    "fair": Traffic([0.8, 0.88, 0.6]),
    # The bundled pair's nine texts at temperature 0: of its confidences each has an AUC of 0.95 among the blocks that
    # reached it, and logits of two slots a correlation of 0.4 (here 0.95, 0.43).
    "mixed": Traffic([0.98, 0.89, 0.95, 0.97, 0.97, 0.88, 0.99, 0.97, 0.93], tokens=2.2, rounds=1.2, unseen=0.5),
    "blind": Traffic([0.85], rounds=0.0, unseen=0.0, is_blind=True),  # accept events that are drawn by rates alone
    "useless": Traffic([0.02, 0.0, 0.01]),
}


def at(points: Points, size: int) -> float:
    sizes, times = [p[0] for p in points], [p[1] for p in points]
    if size <= sizes[-1]:
        return float(np.interp(size, sizes, times)) if size > 0 else 0.0
    return times[-1] + (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) * (size - sizes[-1])


def measured_curves(
    machine: Machine, n_streams: int, rng: np.random.Generator, *, is_ideal: bool = False
) -> dict[str, Any]:
    """What load measures: off by a tenth a curve and 8 % a size."""

    def measure(points: Points, sizes: set[int]) -> Points:
        if is_ideal:
            return [(size, at(points, size)) for size in sorted(sizes)]
        curve = np.exp(0.1 * rng.normal())
        return [(size, at(points, size) * curve * np.exp(0.08 * rng.normal())) for size in sorted(sizes)]

    n_rows = n_streams * (1 + BLOCK)
    rows = {n_rows, *(n for n in (*range(1, 17), 20, 25, 31, 38, 47, 58, 72, 90, 112) if n < n_rows)}
    requests = {n_streams, *(n for n in (1, 2, 3, 4, 6, 9, 13) if n < n_streams)}
    return {
        "verify": measure(machine.verify, rows),
        "plain": measure(machine.plain, requests),
        "prefill": measure(machine.plain, {1}),
        "draft": measure(machine.draft, requests),
        "inject": measure(machine.inject, {1, 2, 4, 8, 32}),
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
    }


def calibration(drafter: str) -> list[Any]:
    """What was fitted before: rates as they are, confidences as they come; nothing for the useless drafter."""
    if drafter == "useless":
        return []
    return [("exact", 0.0, [1.0] * BLOCK, [float(np.mean(DRAFTERS[drafter].rates))] * BLOCK, [], [])]


class Speed:
    """What a kind of pass takes beyond the costs, over time: for a while this, for a while that."""

    def __init__(self, rng: np.random.Generator, level: float, spread: float, while_ms: float, slow: Slow) -> None:
        self.slow = slow
        self.factors = level * np.exp(0.1 * rng.normal() + spread * rng.normal(size=4000))
        self.ends = np.cumsum(while_ms * rng.exponential(size=4000))

    def at(self, ms: float) -> float:
        factor = float(self.factors[min(int(np.searchsorted(self.ends, ms)), len(self.factors) - 1)])
        return factor * (SLOW if self.slow[0] <= ms < self.slow[1] else 1.0)


@dataclass
class Answer:
    """One request; the luck of its rounds by position, whatever policy gets there."""

    id: int
    traffic: Traffic
    rate: float
    tokens: NDArray[np.float64]  # (N_TOKENS + BLOCK,)
    hard: NDArray[np.float64]  # (N_TOKENS, 2): of a round, what the confidence sees and what not
    luck: NDArray[np.float64]  # (N_TOKENS, BLOCK)
    n_waiting: int
    n_written: int = 0

    @property
    def n_left(self) -> int:
        return N_TOKENS - self.n_written

    def request(self) -> dict[str, Any]:
        sizes = {"n_waiting": self.n_waiting, "n_written": self.n_written, "n_left": self.n_left}
        return {"id": self.id, "most": min(BLOCK, self.n_left - 1)} | sizes

    def seen(self, position: int) -> NDArray[np.float64]:
        """Of a block drafted there, what confidences can see: logits of its slots."""
        traffic = self.traffic
        variance = traffic.tokens**2 + traffic.rounds**2 + traffic.unseen**2
        middle = np.log((self.rate + 1e-3) / (1 - self.rate)) * np.sqrt(1 + 0.35 * variance)
        tokens = self.tokens[position : position + BLOCK]
        logits: NDArray[np.float64] = middle + traffic.tokens * tokens + traffic.rounds * self.hard[position, 0]
        return logits

    def draft(self) -> tuple[list[float], int]:
        """Confidence logits, and how many drafts stand when all are verified."""
        seen, unseen = self.seen(self.n_written), self.traffic.unseen
        stands = self.luck[self.n_written] < 1 / (1 + np.exp(-(seen + unseen * self.hard[self.n_written, 1])))
        shown = np.full(BLOCK, 1.5) if self.traffic.is_blind else seen / np.sqrt(1 + 0.35 * unseen**2)
        return [float(logit) for logit in shown], BLOCK if stands.all() else int(np.argmin(stands))


class MachineSimulation:
    """Answers of one policy, or of a scheduler that is given in place of the real one."""

    def __init__(
        self,
        machine: str,
        drafter: str,
        n_streams: int,
        seed: int = 0,
        policy: str = "adaptive",
        *,
        is_ideal: bool = False,
        scheduler: Any = None,
        slow: Slow = (0.0, 0.0),
    ) -> None:
        self.machine, self.traffic, self.n_streams, self.seed = MACHINES[machine], DRAFTERS[drafter], n_streams, seed
        rng = np.random.default_rng([seed, 1])
        self.scheduler = scheduler or _core._scheduling.Scheduler(  # type: ignore[attr-defined]
            policy=policy,
            costs=measured_curves(self.machine, n_streams, rng, is_ideal=is_ideal),
            block_size=BLOCK,
            calibration=calibration(drafter),
        )
        self.is_ideal = is_ideal
        rng, while_ms = np.random.default_rng([seed, 2]), 300 * at(self.machine.plain, n_streams)
        self.plain_speed = Speed(rng, 1.15, 0.1, while_ms, slow)  # the caller's thread takes its share
        self.drafted_speed = Speed(rng, 1.05, 0.07, while_ms, slow)
        self.noise = np.random.default_rng([seed, 4])
        self.n_plain = self.n_rows = 0  # plain steps in a row, rows of the last pass
        self.ms = self.drafted_ms = 0.0
        self.n_answers = 0

    def answer(self) -> Answer:
        self.n_answers += 1
        rng, rates = np.random.default_rng([self.seed, 3, self.n_answers]), self.traffic.rates
        rate = min(0.99, rates[self.n_answers % len(rates)] * float(np.exp(0.05 * rng.normal())))
        hard, luck = rng.normal(size=(N_TOKENS, 2)), rng.random((N_TOKENS, BLOCK))
        n_waiting = int(rng.integers(15, 45))
        return Answer(self.n_answers, self.traffic, rate, rng.normal(size=N_TOKENS + BLOCK), hard, luck, n_waiting)

    def run(self, n_waves: int) -> MachineSimulation:
        """All answers of a wave begin together, and the last one ends it."""
        for _ in range(n_waves):
            answers = [self.answer() for _ in range(self.n_streams)]
            while answers:
                self.step(answers)
                answers = [answer for answer in answers if not self.ends(answer)]
        return self

    def flow(self, n_tokens: int) -> float:
        """Milliseconds a token where an answer that ends makes room for the next one."""
        answers = [self.answer() for _ in range(self.n_streams)]
        n_done = 0
        while n_done < n_tokens:
            n_done += self.step(answers)
            answers = [self.answer() if self.ends(answer) else answer for answer in answers]
        return self.ms / n_done

    def ends(self, answer: Answer) -> bool:
        if answer.n_left <= 0:
            self.scheduler.finish(answer.id, N_TOKENS)
        return answer.n_left <= 0

    def step(self, answers: list[Answer]) -> int:
        """One step of all; returns the tokens written."""
        decisions = self.scheduler.select([answer.request() for answer in answers])
        drafts = [
            a.draft() if d in ("draft", "probe", "timed") else None for a, d in zip(answers, decisions, strict=True)
        ]
        lengths = self.scheduler.schedule([draft[0] if draft else [] for draft in drafts])
        n_injected = n_committed = 0
        for i, (answer, draft, length) in enumerate(zip(answers, drafts, lengths, strict=True)):
            n_accepted = min(length, draft[1]) if draft else 0
            if draft:
                self.scheduler.observe_round(i, length, n_accepted)
                n_injected += answer.n_waiting
                answer.n_waiting = 0
            answer.n_waiting += 1 + n_accepted
            answer.n_written += 1 + n_accepted
            n_committed += 1 + n_accepted
        n_drafting = sum(draft is not None for draft in drafts)
        draft_ms, inject_ms, verify_ms = self.passes(len(answers), n_drafting, sum(lengths), n_injected)
        total_ms = draft_ms + inject_ms + verify_ms + self.machine.overhead_ms * (1 + 0.03 * sum(lengths))
        self.ms += total_ms
        self.drafted_ms += total_ms if n_drafting else 0.0
        self.scheduler.observe_step(
            n_drafting=n_drafting,
            n_drafted_rows=sum(lengths),
            n_committed=n_committed,
            draft_ms=draft_ms,
            inject_ms=inject_ms,
            verify_ms=verify_ms,
            total_ms=total_ms,
        )
        return n_committed

    def passes(self, n: int, n_drafting: int, n_drafted_rows: int, n_injected: int) -> tuple[float, float, float]:
        """Milliseconds of draft, injection and target in a step of n requests."""
        machine, n_rows = self.machine, n + n_drafted_rows
        if self.is_ideal:
            if n_drafting == 0:
                return 0.0, 0.0, at(machine.plain, n)
            return at(machine.draft, n_drafting), at(machine.inject, n_injected), at(machine.verify, n_rows)
        noise = float(np.exp(0.03 * self.noise.normal())) * (1 + (self.noise.random() < 0.02) * self.noise.random() * 2)
        is_repeat, n_plain = n_rows == self.n_rows, self.n_plain
        self.n_rows, self.n_plain = n_rows, 0 if n_drafting else n_plain + 1
        if n_drafting:
            speed = noise * self.drafted_speed.at(self.ms)
            drafting = at(machine.draft, n_drafting) * (1.15 if n_plain else 1.0)
            verifying = at(machine.verify, n_rows) - is_repeat * machine.rebuild_ms
            return drafting * speed, at(machine.inject, n_injected) * speed, verifying * speed
        settled = at(machine.plain, n)
        unsettled = max(0.0, 1 - n_plain / 6) * (at(machine.verify, n) - settled)
        changed = machine.rebuild_ms if n_plain > 0 and not is_repeat else 0.0
        return 0.0, 0.0, (settled + unsettled + changed) * noise * self.plain_speed.at(self.ms)


def n_tokens_of(n_streams: int) -> int:
    """As many as show what is learned and what learning costs."""
    return N_TOKENS * (36 if n_streams == 1 else 24 * n_streams)


def cells(machines: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """Return machine, drafter and number of streams of every row of a table; no names: all machines."""
    return product(machines or MACHINES, DRAFTERS, (1, 2, 4, 8, 16))


def compare(
    machine: str, drafter: str, n_streams: int, seed: int, *, is_ideal: bool = False
) -> tuple[float, float, float]:
    """Speed to plain decoding, to the best of plain decoding and all fixed lengths, and the share of time drafted."""
    ms = {}
    for policy in ("off", *(f"fixed:{length}" for length in range(1, BLOCK + 1) if drafter != "useless"), "adaptive"):
        simulation = MachineSimulation(machine, drafter, n_streams, seed, policy, is_ideal=is_ideal)
        ms[policy] = simulation.flow(n_tokens_of(n_streams))
    best = [ms_a_token for policy, ms_a_token in ms.items() if policy != "adaptive"]
    return ms["off"] / ms["adaptive"], min(best) / ms["adaptive"], simulation.drafted_ms / simulation.ms


def main() -> None:
    """Print the mean and the worst seed of every cell."""
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    print("machine drafter streams | to plain  worst | to best  worst | drafted")
    for machine, drafter, n_streams in cells(sys.argv[2:]):
        runs = [compare(machine, drafter, n_streams, seed) for seed in range(n_seeds)]
        mean, worst = np.mean(runs, axis=0), np.min(runs, axis=0)
        print(
            f"{machine:7} {drafter:7} {n_streams:7} |    {mean[0]:5.3f}  {worst[0]:5.3f} |"
            f"   {mean[1]:5.3f}  {worst[1]:5.3f} |    {mean[2]:4.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
