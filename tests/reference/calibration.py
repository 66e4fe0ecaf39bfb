"""Calibration in plain loops, written from the definitions: the oracle of `dspark_cpp.calibration_fit`."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else exp(x) / (1 + exp(x))


def ece(probs: Sequence[float], outcomes: Sequence[bool], n_bins: int = 20) -> float:
    total = 0.0
    for b in range(n_bins):
        inside = [i for i, p in enumerate(probs) if min(int(p * n_bins), n_bins - 1) == b]
        if inside:
            confidence = sum(probs[i] for i in inside) / len(inside)
            frequency = sum(outcomes[i] for i in inside) / len(inside)
            total += len(inside) / len(probs) * abs(confidence - frequency)
    return total


def auc(scores: Sequence[float], outcomes: Sequence[bool]) -> float:
    true = [s for s, y in zip(scores, outcomes, strict=True) if y]
    false = [s for s, y in zip(scores, outcomes, strict=True) if not y]
    return sum((a > b) + (a == b) / 2 for a in true for b in false) / (len(true) * len(false))


def survivals(
    logits: Sequence[float], sts: Sequence[float], offsets: Sequence[float], maps: Sequence[Sequence[float]]
) -> list[float]:
    """Survivals of one block: a_k = min(a_{k-1}, M_k(a_{k-1} sigmoid(logit_k / T_k + b_k)))."""
    before, out = 1.0, []
    for logit, temperature, offset, values in zip(logits, sts, offsets, maps, strict=True):
        product = before * sigmoid(logit / temperature + offset)
        piece = min(int(product * 10), 9)
        mapped = values[piece] + (product * 10 - piece) * (values[piece + 1] - values[piece])
        before = min(before, mapped)
        out.append(before)
    return out


def sts_costs(
    logits: Sequence[Sequence[float]], accepted: Sequence[int], before: Sequence[float], k: int
) -> dict[float, float]:
    """Cost of each temperature of the grid at position k, `before` the survivals of the positions before it."""
    costs = {}
    for step in range(-128, 129):
        temperature = exp(step * log(16) / 128)
        probs = [s * sigmoid(row[k] / temperature) for s, row in zip(before, logits, strict=True)]
        costs[temperature] = ece(probs, [n > k for n in accepted]) + 2 * log(temperature) ** 2 / len(accepted)
    return costs
