"""Verification from its definition, exact laws by enumeration, and the test statistics they are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from . import sampling

Array = np.ndarray[Any, Any]


def residual(scale: float, target: Array, draft: Array) -> Array:
    """max(scale * p^t - p^d, 0), not normalised."""
    return np.maximum(scale * target - draft, 0.0)


def block_weights(tokens: Sequence[int], draft: Array, target: Array) -> tuple[list[float], list[float]]:
    """p_1..p_l and h_1..h_l of block verification (Sun et al., arXiv 2403.10444, algorithm 2).

    Parameters
    ----------
    tokens : the draft, (l,)
    draft, target : rows (>= l, n_vocab) conditional on the draft's own prefix; `target` has one row more
    """
    weights: list[float] = []
    thresholds: list[float] = []
    weight = 1.0
    for i, token in enumerate(tokens):
        weight = min(weight * target[i][token] / draft[i][token], 1.0)
        weights.append(weight)
        if i + 1 == len(tokens):
            thresholds.append(weight)
        else:
            mass = residual(weight, target[i + 1], draft[i + 1]).sum()
            total = mass + 1.0 - weight
            thresholds.append(mass / total if total > 0 else 1.0)
    return weights, thresholds


def verify(
    rule: str, tokens: Sequence[int], draft: Array, target: Array, uniform: Callable[[str, int], float]
) -> tuple[int, int]:
    """Number of accepted drafts and the token after them; `uniform(purpose, slot)` brings the random numbers."""
    n = len(tokens)
    weight = 1.0
    accepted = n
    if rule == "exact":
        for k in range(n + 1):
            token = sampling.sample(target[k], uniform("target_sample", k))
            if k == n or token != tokens[k]:
                return k, token
    elif rule == "rejection":
        for k, token in enumerate(tokens):
            if uniform("accept_test", k) >= target[k][token] / draft[k][token]:
                accepted = k
                break
    else:
        weights, thresholds = block_weights(tokens, draft, target)
        passed = [i + 1 for i in range(n) if uniform("accept_test", i) < thresholds[i]]
        accepted = max(passed, default=0)
        weight = weights[accepted - 1] if accepted else 1.0
    if accepted == n:
        return n, sampling.sample(target[n], uniform("target_sample", n))
    rest = residual(weight, target[accepted], draft[accepted])
    return accepted, sampling.sample(rest / rest.sum(), uniform("residual", accepted))


def accepted_law(rule: str, target: Array, draft: Array, anchor: int, block_size: int) -> Array:
    """P(n accepted in one round) for n = 0..block_size, by going through every possible draft.

    `target` and `draft` are (n_vocab, n_vocab): the law of the next token given the last one.
    """
    law = np.zeros(block_size + 1)
    for tokens in itertools.product(range(len(target)), repeat=block_size):
        path = (anchor, *tokens)
        probability = math.prod(draft[path[i]][path[i + 1]] for i in range(block_size))
        if probability == 0:
            continue
        rows_t, rows_d = target[list(path)], draft[list(path)]
        if rule == "block":
            passes = block_weights(tokens, rows_d, rows_t)[1]
            fails_after = 1.0
            for n in range(block_size, 0, -1):  # the largest n that passes
                law[n] += probability * fails_after * passes[n - 1]
                fails_after *= 1.0 - passes[n - 1]
            law[0] += probability * fails_after
        else:  # exact: the target draws the same token; rejection: min(1, p^t / p^d)
            survives = 1.0
            for n, token in enumerate(tokens):
                rate = rows_t[n][token]
                accept = rate if rule == "exact" else min(1.0, rate / rows_d[n][token])
                law[n] += probability * survives * (1.0 - accept)
                survives *= accept
            law[block_size] += probability * survives
    return law


def sequence_law(target_logits: Array, options: Mapping[str, Any], anchor: int, n_tokens: int) -> Array:
    """P of every sequence of n_tokens after `anchor`, the first token most significant: (n_vocab ** n_tokens,)."""
    n_vocab = len(target_logits)
    law = np.zeros((n_vocab,) * n_tokens)
    prefixes: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while prefixes:
        prefix, probability = prefixes.pop()
        if len(prefix) == n_tokens:
            law[prefix] = probability
            continue
        last = prefix[-1] if prefix else anchor
        row = sampling.target_distribution(target_logits[last], options, [anchor], prefix)
        prefixes += [((*prefix, t), probability * row[t]) for t in range(n_vocab) if row[t] > 0]
    return law.ravel()


def total_variation(p: Array, q: Array) -> float:
    """Half the L1 distance."""
    return 0.5 * float(np.abs(p - q).sum())


def chi_square_p(counts: Array, law: Array) -> float:
    """p-value of Pearson's test that `counts` were drawn from `law`.

    Notes
    -----
    Cells that expect fewer than 10 draws are pooled, the usual rule for the chi-square limit to hold. A draw where the
    law has no mass at all gives p = 0. The tail comes from the Wilson-Hilferty cube-root transform, whose error is far
    smaller than the distance between P_MIN and what a wrong law yields.
    """
    expected = law * counts.sum()
    if counts[law == 0].any():
        return 0.0
    is_small = expected < 10
    observed_cells = np.append(counts[~is_small], counts[is_small].sum())
    expected_cells = np.append(expected[~is_small], expected[is_small].sum())
    if expected_cells[-1] < 10:  # the pool is still too small for a cell of its own
        largest = int(np.argmax(expected_cells[:-1]))
        observed_cells[largest] += observed_cells[-1]
        expected_cells[largest] += expected_cells[-1]
        observed_cells, expected_cells = observed_cells[:-1], expected_cells[:-1]
    freedom = len(expected_cells) - 1
    if freedom == 0:
        return 1.0
    statistic = float((np.square(observed_cells - expected_cells) / expected_cells).sum())
    spread = 2.0 / (9.0 * freedom)
    z = ((statistic / freedom) ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))
