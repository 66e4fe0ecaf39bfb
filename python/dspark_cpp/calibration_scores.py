"""How far confidences are from the truth: calibration error, Brier score, AUC, the reliability diagram.

Pure numpy on forecasts in [0, 1] and outcomes; knows no block, no position, no file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "N_BINS",
    "Reliability",
    "brier_score",
    "expected_calibration_error",
    "reliability",
    "roc_auc",
    "sample_ece",
]

N_BINS = 20

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


def _ece(probs: Floats, events: Bools, n_bins: int) -> float:
    # |mean p - mean y| times the bin's share is |sum (p - y)| / n: no division by the bin's own size.
    gaps = np.bincount(_bin_of(probs, n_bins), weights=probs - events, minlength=n_bins)
    return float(np.abs(gaps).sum() / probs.size)


def _bin_of(probs: Floats, n_bins: int) -> NDArray[np.intp]:
    return np.minimum((probs * n_bins).astype(np.intp), n_bins - 1)


def _checked_forecasts(probs: ArrayLike, outcomes: ArrayLike) -> tuple[Floats, Bools]:
    p, y = np.asarray(probs, np.float64), np.asarray(outcomes, bool)
    if p.ndim != 1 or p.shape != y.shape:
        raise ValueError(f"probs must have shape {y.shape} of the outcomes, got {p.shape}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probs must be in [0, 1], got " + str(p[~((p >= 0) & (p <= 1))][0]))
    return p, y
