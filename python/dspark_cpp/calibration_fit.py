"""What calibration computes: sequential temperature scaling, and how far a confidence is from the truth.

Pure numpy on arrays; knows no engine, no file. A block is one draft of `gamma` tokens; its confidence logits are those
of the drafter's confidence head, one per position, and `accepted` is how many of its tokens the target accepted.

The confidence c_k = sigmoid(logit_k / T_k) estimates that token k survives given that those before it did; the survival
a_k = c_1 ... c_k estimates that all of the first k do. Everything here measures a_k against the event "the first k
tokens were accepted", which is what a scheduler multiplies with (DESIGN section 2, calibration).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "N_BINS",
    "PositionFigures",
    "Reliability",
    "brier_score",
    "conditional_acceptance",
    "expected_calibration_error",
    "fit_sts",
    "measure_positions",
    "prefix_events",
    "reliability",
    "roc_auc",
    "sample_ece",
    "survivals",
]

N_BINS = 20

_GRID = np.exp(np.linspace(np.log(1 / 16), np.log(16), 257))  # steps of 2.2 %; holds 1 exactly in its middle
_GRID[len(_GRID) // 2] = 1.0

# Two temperatures whose errors differ by less than sampling noise are the same to the data, so the search pays
# _PULL (log T)^2 / n_blocks for leaving 1: at T = 2 that is 0.001 for a thousand blocks, 0.1 for ten.
_PULL = 2.0

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reliability:
    """A reliability diagram: per bin of equal width over [0, 1], from low to high.

    Parameters
    ----------
    n : array of int, shape (n_bins,)
        Forecasts in the bin.
    confidence, frequency : array of float, shape (n_bins,)
        Their mean, and the share of them that came true; NaN in an empty bin.
    """

    n: NDArray[np.int64]
    confidence: Floats
    frequency: Floats


@dataclass(frozen=True, slots=True)
class PositionFigures:
    """How good the survivals of one position are.

    Parameters
    ----------
    n : int
        Blocks whose token at this position was verified.
    ece, brier : float
        In [0, 1]; 0 is perfect.
    auc : float
        0.5 is chance, 1 perfect; NaN when all outcomes are the same.
    noise : float
        ECE that forecasts with these very values would show on average if they were perfectly calibrated: what is left
        of `ece` by the finite sample alone.
    """

    n: int
    ece: float
    auc: float
    brier: float
    noise: float


def expected_calibration_error(probs: ArrayLike, outcomes: ArrayLike, n_bins: int = N_BINS) -> float:
    """Mean distance of confidence from frequency over bins of equal width, weighted by the forecasts in each.

    Parameters
    ----------
    probs : array of float, shape (n,)
        Forecasts in [0, 1]; bin b holds [b / n_bins, (b + 1) / n_bins), the last one 1 too.
    outcomes : array of bool, shape (n,)
        What happened.
    n_bins : int
        At least 1.

    Returns
    -------
    float
        In [0, 1]; NaN without forecasts.

    Raises
    ------
    ValueError
        Shapes that differ, or forecasts outside [0, 1].
    """
    p, y = _checked_forecasts(probs, outcomes)
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    return _ece(p, y, n_bins) if p.size else float("nan")


def brier_score(probs: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared distance of forecasts from outcomes (0 or 1); NaN without forecasts.

    Parameters
    ----------
    probs : array of float, shape (n,)
        In [0, 1].
    outcomes : array of bool, shape (n,)
    """
    p, y = _checked_forecasts(probs, outcomes)
    return float(np.mean((p - y) ** 2)) if p.size else float("nan")


def roc_auc(scores: ArrayLike, outcomes: ArrayLike) -> float:
    """Probability that a true event scores above a false one, ties counted half (Mann-Whitney).

    Parameters
    ----------
    scores : array of float, shape (n,)
        Any order-preserving forecast, not NaN.
    outcomes : array of bool, shape (n,)

    Returns
    -------
    float
        In [0, 1]; NaN when all outcomes are the same.
    """
    s, y = np.asarray(scores, np.float64), np.asarray(outcomes, bool)
    if s.shape != y.shape or s.ndim != 1 or np.isnan(s).any():
        raise ValueError(f"scores must be numbers of shape {y.shape}, got shape {s.shape}")
    n_true = int(y.sum())
    n_false = y.size - n_true
    if n_true == 0 or n_false == 0:
        return float("nan")
    _, group, sizes = np.unique(s, return_inverse=True, return_counts=True)
    rank = np.cumsum(sizes) - (sizes - 1) / 2  # mean rank of each group of ties, from 1
    return float((rank[group][y].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def reliability(probs: ArrayLike, outcomes: ArrayLike, n_bins: int = N_BINS) -> Reliability:
    """Sort forecasts into bins of equal width; parameters as of `expected_calibration_error`."""
    p, y = _checked_forecasts(probs, outcomes)
    bins = _bin_of(p, n_bins)
    n = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of an empty bin
        confidence = np.bincount(bins, weights=p, minlength=n_bins) / n
        frequency = np.bincount(bins, weights=y, minlength=n_bins) / n
    return Reliability(n, confidence, frequency)


def sample_ece(probs: ArrayLike, n_bins: int = N_BINS, n_repeats: int = 50, seed: int = 0) -> float:
    """ECE that perfectly calibrated forecasts of these values show on average, by simulation.

    Draws outcomes from the forecasts themselves, independently: text correlates neighbouring blocks, so the true floor
    lies a little above it.

    Parameters
    ----------
    probs : array of float, shape (n,)
        In [0, 1].
    n_repeats : int
        Simulated samples to average over.
    seed : int
        Of the random numbers.
    """
    p = np.asarray(probs, np.float64)
    if not p.size:
        return float("nan")
    rng = np.random.default_rng(seed)
    return float(np.mean([_ece(p, rng.random(p.size) < p, n_bins) for _ in range(n_repeats)]))


def survivals(logits: ArrayLike, temperatures: ArrayLike) -> Floats:
    """Calibrated prefix survivals a_k = prod_{i<=k} sigmoid(logit_i / T_i).

    Parameters
    ----------
    logits : array of float, shape (n_blocks, gamma)
    temperatures : array of float, shape (gamma,)
        Above 0; ones leave the confidence as it is.

    Returns
    -------
    array of float64, shape (n_blocks, gamma)
        Each row falls from left to right.
    """
    scaled = np.asarray(logits, np.float64) / np.asarray(temperatures, np.float64)
    products: Floats = np.multiply.accumulate(_sigmoid(scaled), axis=1, dtype=np.float64)
    return products


def prefix_events(accepted: ArrayLike, gamma: int) -> Bools:
    """Which prefixes were accepted: element (i, k) says whether block i had its first k + 1 tokens accepted.

    Parameters
    ----------
    accepted : array of int, shape (n_blocks,)
    gamma : int
        Positions of a block.
    """
    return np.asarray(accepted, np.int64)[:, None] > np.arange(gamma)


def fit_sts(logits: ArrayLike, accepted: ArrayLike, verified: ArrayLike | None = None, n_bins: int = N_BINS) -> Floats:
    """Sequential temperature scaling: one temperature per position.

    For k = 1 .. gamma in order, those before it fixed, T_k minimises the ECE of the survivals a_k against the event
    "the first k tokens were accepted" over a grid from 1/16 to 16 in steps of 2.2 %, plus 2 (log T)^2 / n_blocks. That
    small term is the deviation from the paper: it decides ties for the temperature nearest to 1, holds T near 1 where
    there are too few blocks to tell temperatures apart, and keeps it off the end of the grid where every outcome is the
    same. A position without blocks keeps 1.

    Parameters
    ----------
    logits : array of float, shape (n_blocks, gamma)
        Of the confidence head, before the sigmoid; +-inf is a confidence of 1 or 0 at every temperature.
    accepted : array of int, shape (n_blocks,)
        Drafted tokens accepted, in 0 .. gamma.
    verified : array of int, shape (n_blocks,), optional
        Drafted tokens that were verified; beyond them a block says nothing. None: all of them.
    n_bins : int
        Bins of the ECE.

    Returns
    -------
    array of float64, shape (gamma,)
        Temperatures.

    Raises
    ------
    ValueError
        NaN logits, shapes that do not fit together, or counts out of range.

    Notes
    -----
    DESIGN section 2, calibration; the paper's STS.
    """
    x, n_accepted, n_verified = _checked_blocks(logits, accepted, verified)
    gamma = x.shape[1]
    events = prefix_events(n_accepted, gamma)
    temperatures = np.ones(gamma)
    before = np.ones(x.shape[0])
    for k in range(gamma):
        is_known = n_verified > k
        temperatures[k] = _best_temperature(x[is_known, k], before[is_known], events[is_known, k], n_bins)
        before = before * _sigmoid(x[:, k] / temperatures[k])
    return temperatures


def conditional_acceptance(accepted: ArrayLike, gamma: int, verified: ArrayLike | None = None) -> Floats:
    """P(token k accepted | those before it were), from counts.

    Parameters
    ----------
    accepted, verified
        As of `fit_sts`.
    gamma : int
        Positions of a block.

    Returns
    -------
    array of float64, shape (gamma,)
        With one success in two trials added to the counts, so that a position that was never reached says 1/2 and none
        says 0 or 1 for certain.
    """
    _, n_accepted, n_verified = _checked_blocks(np.zeros((np.size(np.asarray(accepted)), gamma)), accepted, verified)
    k = np.arange(gamma)
    is_tried = (n_accepted[:, None] >= k) & (n_verified[:, None] > k)
    is_accepted = is_tried & (n_accepted[:, None] > k)
    rates: Floats = (is_accepted.sum(axis=0) + 1) / (is_tried.sum(axis=0) + 2)
    return rates


def measure_positions(
    logits: ArrayLike, accepted: ArrayLike, temperatures: ArrayLike, verified: ArrayLike | None = None
) -> list[PositionFigures]:
    """ECE, AUC and Brier score of the survivals, position by position; parameters as of `fit_sts`."""
    x, n_accepted, n_verified = _checked_blocks(logits, accepted, verified)
    probs, events = survivals(x, temperatures), prefix_events(n_accepted, x.shape[1])
    figures = []
    for k in range(x.shape[1]):
        is_known = n_verified > k
        p, y = probs[is_known, k], events[is_known, k]
        ece = expected_calibration_error(p, y)
        figures.append(PositionFigures(int(is_known.sum()), ece, roc_auc(p, y), brier_score(p, y), sample_ece(p)))
    return figures


def _best_temperature(logits: Floats, before: Floats, events: Bools, n_bins: int) -> float:
    if events.size == 0:
        return 1.0
    errors = [_ece(before * _sigmoid(logits / temperature), events, n_bins) for temperature in _GRID]
    return float(_GRID[np.argmin(errors + _PULL * np.log(_GRID) ** 2 / events.size)])


def _ece(probs: Floats, events: Bools, n_bins: int) -> float:
    # |mean p - mean y| times the bin's share is |sum (p - y)| / n: no division by the bin's own size.
    gaps = np.bincount(_bin_of(probs, n_bins), weights=probs - events, minlength=n_bins)
    return float(np.abs(gaps).sum() / probs.size)


def _bin_of(probs: Floats, n_bins: int) -> NDArray[np.intp]:
    return np.minimum((probs * n_bins).astype(np.intp), n_bins - 1)


def _sigmoid(x: Floats) -> Floats:
    # tanh saturates without overflow and takes infinities.
    sigmoid: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return sigmoid


def _checked_forecasts(probs: ArrayLike, outcomes: ArrayLike) -> tuple[Floats, Bools]:
    p, y = np.asarray(probs, np.float64), np.asarray(outcomes, bool)
    if p.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"probs must have shape {y.shape} of the outcomes, got {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probs must be in [0, 1], got " + str(p[~((p >= 0) & (p <= 1))][0]))
    return p, y


def _checked_blocks(
    logits: ArrayLike, accepted: ArrayLike, verified: ArrayLike | None
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    x, n_accepted = np.asarray(logits, np.float64), np.asarray(accepted, np.int64)
    if x.ndim != 2 or n_accepted.shape != x.shape[:1]:
        raise ValueError(f"logits must have shape ({n_accepted.size}, gamma), got {x.shape}")
    if np.isnan(x).any():
        raise ValueError(f"logits must be numbers, got NaN in {int(np.isnan(x).any(axis=1).sum())} blocks")
    n_verified = np.full(x.shape[0], x.shape[1]) if verified is None else np.asarray(verified, np.int64)
    if n_verified.shape != n_accepted.shape:
        raise ValueError(f"verified must have shape {n_accepted.shape}, got {n_verified.shape}")
    if ((n_accepted < 0) | (n_accepted > n_verified) | (n_verified > x.shape[1])).any():
        raise ValueError(f"accepted must be in 0 .. verified and verified at most {x.shape[1]}, got others")
    return x, n_accepted, n_verified
