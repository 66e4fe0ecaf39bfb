"""Costs measured in a bad moment, at load or later, or read from a file that is wrong, heal within a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import scheduling_machine
from scheduling_machine import MACHINES, N_TOKENS, MachineSimulation

DRAFTED, ALL = ("verify", "draft"), ("verify", "plain", "prefill", "draft", "inject")
Spoiled = tuple[tuple[str, ...], float, tuple[int, ...]]  # curves, factor, sizes (none: all)


def spoil(spoiled: Spoiled) -> Callable[..., dict[str, Any]]:
    names, factor, sizes = spoiled
    measured_curves = scheduling_machine.measured_curves

    def measure(*arguments: Any, **options: Any) -> dict[str, Any]:
        curves = measured_curves(*arguments, **options)
        for name in names:
            curves[name] = [(n, ms * (factor if n in sizes or not sizes else 1)) for n, ms in curves[name]]
        return curves

    return measure


def second_half_ms(drafter: str, seed: int, policy: str) -> float:
    simulation = MachineSimulation("cpu", drafter, 1, seed, policy).run(20)
    first_ms = simulation.ms
    return simulation.run(20).ms - first_ms


@cache
def best_fixed_ms(drafter: str, seed: int) -> float:
    return min(second_half_ms(drafter, seed, policy) for policy in ("off", "fixed:4", "fixed:7"))


TOO_DEAR: list[Spoiled] = [
    (ALL, 10.0, ()), (DRAFTED, 10.0, ()), (("verify",), 10.0, (2, 4, 5, 7, 8)), (("verify",), 10.0, (6,)),
]  # fmt: skip
TOO_CHEAP: list[Spoiled] = [(ALL, 0.1, ()), (DRAFTED, 0.1, ()), (("verify",), 0.1, (5,)), (("plain",), 10.0, ())]


@pytest.mark.parametrize(
    ("drafter", "least", "spoiled"),
    [("good", 0.93, spoiled) for spoiled in TOO_DEAR + TOO_CHEAP]
    + [("useless", 0.98, spoiled) for spoiled in TOO_CHEAP],
)
def test_wrong_costs_heal(drafter: str, least: float, spoiled: Spoiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the best fixed choice, from the 1,280th token on; with right costs it is 0.97 and 0.99 or more."""
    best_ms = [best_fixed_ms(drafter, seed) for seed in range(2)]
    monkeypatch.setattr(scheduling_machine, "measured_curves", spoil(spoiled))
    assert np.mean([ms / second_half_ms(drafter, seed, "adaptive") for seed, ms in enumerate(best_ms)]) > least


def after_slow_moment_ms(machine: str, drafter: str, n_streams: int, seed: int, policy: str) -> float:
    """What 16 answers a stream take, the slow moment long over: it ends within the second of the 8 before them."""
    plain_ms = scheduling_machine.at(MACHINES[machine].plain, n_streams)
    slow = ((5 + 20 * seed) * plain_ms, (65 + 30 * seed) * plain_ms)
    simulation = MachineSimulation(machine, drafter, n_streams, seed, policy, slow=slow)
    simulation.flow(8 * N_TOKENS * n_streams)
    first_ms = simulation.ms
    simulation.flow(16 * N_TOKENS * n_streams)
    return simulation.ms - first_ms


@pytest.mark.parametrize(
    ("machine", "drafter", "n_streams", "seed", "least"),
    [
        ("demo", "mixed", 8, 0, 0.97),
        ("demo", "mixed", 8, 3, 0.94),
        ("demo", "fair", 1, 1, 0.92),
        ("cpu", "mixed", 1, 1, 0.92),
        ("cpu", "mixed", 16, 0, 0.97),
        ("cpu", "fair", 8, 0, 0.95),
        ("cpu", "fair", 16, 1, 0.93),
        ("cpu", "useless", 1, 1, 0.97),
    ],
)
def test_slow_moment_passes(machine: str, drafter: str, n_streams: int, seed: int, least: float) -> None:
    """It slowed one kind of passes down, and the other one was run from then on."""
    ms = {
        policy: after_slow_moment_ms(machine, drafter, n_streams, seed, policy)
        for policy in ("off", "fixed:4", "fixed:7", "adaptive")
    }
    assert min(ms["off"], ms["fixed:4"], ms["fixed:7"]) / ms["adaptive"] > least
