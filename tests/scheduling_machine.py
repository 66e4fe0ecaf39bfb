"""A machine that is not what it was at load, and the real scheduler on it: what it makes beside plain decoding.

Costs from load err by curve and by size, plain and drafted passes change their speed on their own, plain passes behind
others settle, a draft behind a plain step is dearer, some steps take long for no reason. Answers come in waves as in
`dspark bench`; every policy sees the same answers, the same acceptance at every position and the same machine at every
time. Run as a script for the table that changes of the scheduler are judged by:

    python tests/scheduling_machine.py [seeds [machine ...]]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from dspark_cpp import _core
from numpy.typing import NDArray

BLOCK = 7
N_TOKENS = 64  # of an answer
Points = list[tuple[int, float]]


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
    # The bundled pair on two Zen 4 cores.
    "demo": Machine(
        plain=[(1, 0.28), (2, 0.31), (4, 0.36), (8, 0.6), (16, 1.05)],
        verify=[(1, 0.45), (2, 0.49), (4, 0.64), (8, 0.87), (16, 1.4), (32, 2.1), (64, 3.75), (128, 7.4)],
        draft=[(1, 0.28), (2, 0.42), (4, 0.68), (8, 1.24), (16, 2.4)],
        inject=[(1, 0.055), (4, 0.06), (8, 0.085), (16, 0.14), (32, 0.2), (64, 0.33), (128, 0.6)],
        rebuild_ms=0.14,
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
# P(draft accepted | those before it were) of texts that arrive in turns. All but the useless one were calibrated.
DRAFTERS = {"good": [0.83, 0.95, 0.93], "fair": [0.8, 0.88, 0.6], "useless": [0.02, 0.0, 0.01]}


def at(points: Points, size: int) -> float:
    sizes, times = [p[0] for p in points], [p[1] for p in points]
    if size <= sizes[-1]:
        return float(np.interp(size, sizes, times)) if size > 0 else 0.0
    return times[-1] + (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) * (size - sizes[-1])


def measured_curves(machine: Machine, n_streams: int, rng: np.random.Generator) -> dict[str, Any]:
    """What load measures: off by a tenth a curve and 8 % a size."""

    def measure(points: Points, sizes: set[int]) -> Points:
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
    if drafter == "useless":
        return []
    return [("exact", 0.0, [1.0] * BLOCK, [float(np.mean(DRAFTERS[drafter]))] * BLOCK, [], [])]


class Speed:
    """What a kind of pass takes beyond the costs, over time: for a while this, for a while that."""

    def __init__(self, rng: np.random.Generator, level: float, spread: float, while_ms: float) -> None:
        self.factors = level * np.exp(0.1 * rng.normal() + spread * rng.normal(size=4000))
        self.ends = np.cumsum(while_ms * rng.exponential(size=4000))

    def at(self, ms: float) -> float:
        return float(self.factors[min(int(np.searchsorted(self.ends, ms)), len(self.factors) - 1)])


@dataclass
class Answer:
    """One request; the luck of its rounds by position, whatever policy gets there."""

    id: int
    rate: float
    hard: NDArray[np.float64]  # (N_TOKENS, 2): of a round, in logits, what the confidence sees and what not
    luck: NDArray[np.float64]  # (N_TOKENS, BLOCK)
    n_waiting: int
    n_written: int = 0

    def request(self) -> dict[str, Any]:
        n_left = N_TOKENS - self.n_written
        sizes = {"n_waiting": self.n_waiting, "n_written": self.n_written, "n_left": n_left}
        return {"id": self.id, "most": min(BLOCK, n_left - 1)} | sizes

    def draft(self) -> tuple[list[float], int]:
        """Confidence logits, and how many drafts stand when all are verified."""
        logit = np.log((self.rate + 1e-3) / (1 - self.rate)) * 1.34
        hard = 1.06 * self.hard[self.n_written]
        stands = self.luck[self.n_written] < 1 / (1 + np.exp(-(logit + hard.sum())))
        return [float((logit + hard[0]) / 1.18)] * BLOCK, BLOCK if stands.all() else int(np.argmin(stands))


class MachineSimulation:
    """Waves of answers with one policy."""

    def __init__(self, machine: str, drafter: str, n_streams: int, seed: int = 0, policy: str = "adaptive") -> None:
        self.machine, self.rates, self.n_streams, self.seed = MACHINES[machine], DRAFTERS[drafter], n_streams, seed
        self.scheduler = _core._scheduling.Scheduler(  # type: ignore[attr-defined]
            policy=policy,
            costs=measured_curves(self.machine, n_streams, np.random.default_rng([seed, 1])),
            block_size=BLOCK,
            calibration=calibration(drafter),
        )
        rng, while_ms = np.random.default_rng([seed, 2]), 300 * at(self.machine.plain, n_streams)
        self.plain_speed = Speed(rng, 1.15, 0.1, while_ms)  # the caller's thread takes its share
        self.drafted_speed = Speed(rng, 1.05, 0.07, while_ms)
        self.noise = np.random.default_rng([seed, 4])
        self.n_plain = self.n_rows = 0  # plain steps in a row, rows of the last pass
        self.ms = self.drafted_ms = 0.0
        self.n_answers = 0

    def answer(self) -> Answer:
        self.n_answers += 1
        rng = np.random.default_rng([self.seed, 3, self.n_answers])
        rate = min(0.98, self.rates[self.n_answers % len(self.rates)] * float(np.exp(0.05 * rng.normal())))
        hard, luck = rng.normal(size=(N_TOKENS, 2)), rng.random((N_TOKENS, BLOCK))
        return Answer(self.n_answers, rate, hard, luck, n_waiting=int(rng.integers(15, 45)))

    def run(self, n_waves: int) -> MachineSimulation:
        for _ in range(n_waves):
            answers = [self.answer() for _ in range(self.n_streams)]
            while answers:
                self.step(answers)
                for answer in answers:
                    if answer.n_written >= N_TOKENS:
                        self.scheduler.finish(answer.id, N_TOKENS)
                answers = [answer for answer in answers if answer.n_written < N_TOKENS]
        return self

    def step(self, answers: list[Answer]) -> None:
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

    def passes(self, n: int, n_drafting: int, n_drafted_rows: int, n_injected: int) -> tuple[float, float, float]:
        """Milliseconds of draft, injection and target in a step of n requests."""
        machine, n_rows = self.machine, n + n_drafted_rows
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


def compare(machine: str, drafter: str, n_streams: int, seed: int) -> tuple[float, float, float]:
    """Speed to plain decoding, to the best of plain decoding and two fixed lengths, and the share of time drafted."""
    plain, half, full, adaptive = (
        MachineSimulation(machine, drafter, n_streams, seed, policy).run(36 if n_streams == 1 else 24)
        for policy in ("off", "fixed:4", "fixed:7", "adaptive")
    )
    best_ms = min(plain.ms, half.ms, full.ms)
    return plain.ms / adaptive.ms, best_ms / adaptive.ms, adaptive.drafted_ms / adaptive.ms


def main() -> None:
    """Print the mean and the worst seed of every cell."""
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    print("machine drafter streams | to plain  worst | to best  worst | drafted")
    for machine in sys.argv[2:] or MACHINES:
        for drafter in DRAFTERS:
            for n_streams in (1, 2, 4, 8, 16):
                runs = [compare(machine, drafter, n_streams, seed) for seed in range(n_seeds)]
                mean, worst = np.mean(runs, axis=0), np.min(runs, axis=0)
                print(
                    f"{machine:7} {drafter:7} {n_streams:7} |    {mean[0]:5.3f}  {worst[0]:5.3f} |"
                    f"   {mean[1]:5.3f}  {worst[1]:5.3f} |    {mean[2]:4.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
