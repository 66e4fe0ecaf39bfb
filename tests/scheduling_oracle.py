"""The best that a scheduler can do on the simulated machine, and what parts of the real one cost beside it.

The oracle knows what passes cost and how difficult every request is; of a round it sees what its confidences see. It
drafts, and verifies, what makes the most tokens per time of the step (their ratio, found by the price of time), with no
parking and no probes. Run as a script for the table of head room, cell by cell, on ideal machines:

    python tests/scheduling_oracle.py [seeds [machine ...]]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scheduling_machine import BLOCK, MACHINES, Answer, MachineSimulation, at, cells, compare, n_tokens_of

Array = NDArray[np.float64]
N_DRAWS = 24  # of a request's rounds, for what one can be expected to be
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(15)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


def survivals(seen: Array, unseen: float) -> Array:
    """P(the first k drafts stand), k = 1 .. block, of logits (..., block), whatever the confidence does not see."""
    stands: Array = 1 / (1 + np.exp(-(seen[..., None] + unseen * NODES)))
    return np.asarray((np.cumprod(stands, axis=-2) * WEIGHTS).sum(-1))


class Oracle:
    """Takes the scheduler's place in a simulation."""

    def __init__(self, machine: str, seed: int) -> None:
        self.machine, self.rng = MACHINES[machine], np.random.default_rng([seed, 6])
        self.answers: list[Answer] = []
        self.price = 0.0  # tokens per ms
        self.samples: dict[int, Array] = {}  # by request: (N_DRAWS, BLOCK)
        self.plans: dict[tuple[int, ...], tuple[float, set[int]]] = {}

    def sample(self, answer: Answer) -> Array:
        if answer.id not in self.samples:
            positions = self.rng.integers(0, len(answer.hard), N_DRAWS)
            seen = np.stack([answer.seen(int(position)) for position in positions])
            self.samples[answer.id] = survivals(seen, answer.traffic.unseen)
        return self.samples[answer.id]

    def step_ms(self, n: int, n_drafting: int) -> Array:
        """Of a step of n requests: [r] with r drafted rows."""
        machine = self.machine
        rows = np.array([at(machine.verify, n + r) + 0.03 * r * machine.overhead_ms for r in range(n * BLOCK + 1)])
        return rows + machine.overhead_ms + at(machine.draft, n_drafting) + at(machine.inject, 3 * n_drafting)

    def plan(self, answers: list[Answer]) -> tuple[float, set[int]]:
        """The price of time and who drafts: the easiest ones, as many as make the step fastest."""
        n = len(answers)
        samples = [self.sample(answer) for answer in answers]
        order = np.argsort([-sample.sum() for sample in samples], kind="stable")
        plain_ms = at(self.machine.plain, n) + self.machine.overhead_ms
        price, best = n / plain_ms, 0
        for _ in range(4):
            found = (n - price * plain_ms, price, 0)
            for count in range(1, n + 1):
                step_ms = self.step_ms(n, count)
                drafted = np.concatenate([samples[i] for i in order[:count]], axis=1)
                tokens = np.pad(np.cumsum(-np.sort(-drafted, axis=1), axis=1), ((0, 0), (1, 0)))
                rows = np.argmax(tokens - price * step_ms[: tokens.shape[1]], axis=1)
                made, took = n + tokens[np.arange(N_DRAWS), rows].mean(), step_ms[rows].mean()
                found = max(found, (made - price * took, made / took, count))
            best = found[2]
            if found[1] < 1.0005 * price:
                break
            price = found[1]
        return price, {int(i) for i in order[:best]}

    def select(self, requests: list[dict[str, Any]]) -> list[str]:
        ids = tuple(answer.id for answer in self.answers)
        if ids not in self.plans:
            self.plans[ids] = self.plan(self.answers)
        self.price, drafting = self.plans[ids]
        may = [i in drafting and request["most"] > 0 for i, request in enumerate(requests)]
        self.most = [request["most"] if drafts else 0 for request, drafts in zip(requests, may, strict=True)]
        return ["draft" if drafts else "parked" for drafts in may]

    def schedule(self, logits: list[list[float]]) -> list[int]:
        slots = []
        for i, (answer, most) in enumerate(zip(self.answers, self.most, strict=True)):
            if most > 0:
                own = survivals(answer.seen(answer.n_written), answer.traffic.unseen)
                slots += [(-float(own[k]), i) for k in range(most)]
        slots.sort()
        step_ms = self.step_ms(len(logits), sum(most > 0 for most in self.most))[: len(slots) + 1]
        gains = np.concatenate([[0.0], np.cumsum([-value for value, _ in slots])]) - self.price * step_ms
        taken = [i for _, i in slots[: int(np.argmax(gains))]]
        return [taken.count(i) for i in range(len(logits))]

    def observe_round(self, *round_: Any) -> None: ...
    def observe_step(self, **times: Any) -> None: ...
    def finish(self, *request: Any) -> None: ...


class OracleSimulation(MachineSimulation):
    """An ideal machine that the oracle knows."""

    def __init__(self, machine: str, drafter: str, n_streams: int, seed: int = 0) -> None:
        super().__init__(machine, drafter, n_streams, seed, is_ideal=True, scheduler=Oracle(machine, seed))

    def step(self, answers: list[Answer]) -> int:
        self.scheduler.answers = list(answers)
        return super().step(answers)


def main() -> None:
    """Print the means of all cells."""
    n_seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    print("machine drafter streams | to best: oracle  adaptive")
    for machine, drafter, n_streams in cells(sys.argv[2:]):
        ratios = []
        for seed in range(n_seeds):
            simulation = MachineSimulation(machine, drafter, n_streams, seed, is_ideal=True)
            adaptive_ms = simulation.flow(n_tokens_of(n_streams))
            oracle_ms = OracleSimulation(machine, drafter, n_streams, seed).flow(n_tokens_of(n_streams))
            to_best = compare(machine, drafter, n_streams, seed, is_ideal=True)[1]
            ratios.append((to_best * adaptive_ms / oracle_ms, to_best))
        oracle, adaptive = np.mean(ratios, axis=0)
        print(f"{machine:7} {drafter:7} {n_streams:7} |          {oracle:5.3f}     {adaptive:5.3f}", flush=True)


if __name__ == "__main__":
    main()
