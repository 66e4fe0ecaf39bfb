"""What calibration computes: temperatures and offsets that make a drafter's confidences true.

Pure numpy on arrays; knows no engine, no file. A block is one draft of `gamma` tokens; its confidence logits are those
of the drafter's confidence head, one per position, and `accepted` is how many of its tokens the target accepted.

The confidence c_k = sigmoid(logit_k / T_k + b_k) estimates that token k survives given that those before it did; the
survival a_k estimates that all of the first k do. Everything here measures a_k against the event "the first k tokens
were accepted", which is what a scheduler weighs (DESIGN section 2, calibration).

The paper's STS has temperatures alone and a_k = c_1 ... c_k. Two things are ours. The offset b_k: a temperature keeps a
confidence of 1/2 in place. The survival map M_k, a_k = min(a_{k-1}, M_k(a_{k-1} c_k)): confidences that are true one by
one still multiply to a wrong product, because a block that has come far so far goes on otherwise than the mean one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_cpp.calibration import MAP_POINTS
from dspark_cpp.calibration_scores import (
    N_BINS,
    Bools,
    Floats,
    brier_score,
    expected_calibration_error,
    roc_auc,
    sample_ece,
)

__all__ = [
    "PositionFigures",
    "conditional_acceptance",
    "fit_beyond_sts",
    "fit_sts",
    "measure_positions",
    "prefix_events",
    "survivals",
]

_GRID = np.exp(np.linspace(np.log(1 / 16), np.log(16), 257))  # steps of 2.2 %; holds 1 exactly in its middle
_GRID[len(_GRID) // 2] = 1.0

# Two temperatures whose errors differ by less than sampling noise are the same to the data, so the search pays
# _PULL (log T)^2 / n_blocks for leaving 1: at T = 2 that is 0.001 for a thousand blocks, 0.1 for ten.
_PULL = 2.0

# Both fits lean on what they start from, the second on "no change", as if they had seen so many blocks that say so.
_SLOPE_BLOCKS = 2.0
_MAP_BLOCKS = 40.0  # at each point of a survival map: fewer, and it follows the noise of one half of the prompts
_MOST_LOGIT = 16.0  # of a confidence logit in the fit: beyond it a single outlier would decide the slope
_LEAST_SLOPE = 1 / 16

_POINTS = np.linspace(0.0, 1.0, MAP_POINTS)


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


def survivals(
    logits: ArrayLike, temperatures: ArrayLike, offsets: ArrayLike = 0.0, maps: ArrayLike | None = None
) -> Floats:
    """Calibrated prefix survivals.

    Parameters
    ----------
    logits : array of float, shape (n_blocks, gamma)
    temperatures : array of float, shape (gamma,)
        Above 0; ones leave the confidence as it is.
    offsets : array of float, shape (gamma,), or 0
        Added to the scaled logits.
    maps : array of float, shape (gamma * MAP_POINTS,), optional
        Survival maps; None: survivals are products of confidences.

    Returns
    -------
    array of float64, shape (n_blocks, gamma)
        Each row falls from left to right.
    """
    scaled = np.asarray(logits, np.float64) / np.asarray(temperatures, np.float64) + np.asarray(offsets, np.float64)
    confidences = _sigmoid(scaled)
    if maps is None:
        products: Floats = np.multiply.accumulate(confidences, axis=1, dtype=np.float64)
        return products
    survival, before = np.empty_like(confidences), np.ones(len(confidences))
    for k, values in enumerate(np.asarray(maps, np.float64).reshape(-1, MAP_POINTS)):
        before = survival[:, k] = np.minimum(before, np.interp(before * confidences[:, k], _POINTS, values))
    return survival


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


def fit_beyond_sts(
    logits: ArrayLike, accepted: ArrayLike, sts: ArrayLike, verified: ArrayLike | None = None
) -> tuple[Floats, Floats, Floats]:
    """Fit temperatures with offsets, and survival maps, position by position, those before it fixed.

    At position k the temperature and offset maximise the likelihood of token k's fate in the blocks that reached it
    (logistic regression with a weak prior around STS). The map then takes the survivals a_{k-1} c_k of all blocks to
    what share of them came true: least squares over 11 points with linear pieces, leaning on the identity, made
    monotone by pooling. A position without blocks keeps STS and the identity.

    Parameters
    ----------
    logits, accepted, verified
        As of `fit_sts`.
    sts : array of float, shape (gamma,)
        Its result.

    Returns
    -------
    temperatures, offsets : array of float64, shape (gamma,)
    maps : array of float64, shape (gamma * MAP_POINTS,)

    Notes
    -----
    A deviation from the paper, whose calibration is STS alone; see the head of this file.
    """
    x, n_accepted, n_verified = _checked_blocks(logits, accepted, verified)
    x = np.clip(x, -_MOST_LOGIT, _MOST_LOGIT)
    events = prefix_events(n_accepted, x.shape[1])
    slopes, offsets = 1 / np.asarray(sts, np.float64), np.zeros(x.shape[1])
    maps = np.tile(_POINTS, (x.shape[1], 1))
    before = np.ones(x.shape[0])
    for k in range(x.shape[1]):
        is_known = n_verified > k
        is_reached = is_known & (n_accepted >= k)
        slopes[k], offsets[k] = _fit_logistic(x[is_reached, k], events[is_reached, k], slopes[k])
        product = before * _sigmoid(slopes[k] * x[:, k] + offsets[k])
        maps[k] = _fit_map(product[is_known], events[is_known, k])
        before = np.minimum(before, np.interp(product, _POINTS, maps[k]))
    return 1 / slopes, offsets, maps.ravel()


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
    logits: ArrayLike,
    accepted: ArrayLike,
    temperatures: ArrayLike,
    offsets: ArrayLike = 0.0,
    maps: ArrayLike | None = None,
    verified: ArrayLike | None = None,
) -> list[PositionFigures]:
    """ECE, AUC and Brier score of the survivals, position by position; parameters as of `survivals` and `fit_sts`."""
    x, n_accepted, n_verified = _checked_blocks(logits, accepted, verified)
    probs, events = survivals(x, temperatures, offsets, maps), prefix_events(n_accepted, x.shape[1])
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
    errors = [
        expected_calibration_error(before * _sigmoid(logits / temperature), events, n_bins) for temperature in _GRID
    ]
    return float(_GRID[np.argmin(errors + _PULL * np.log(_GRID) ** 2 / events.size)])


def _fit_logistic(logits: Floats, events: Bools, slope: float) -> tuple[float, float]:
    """Slope and offset of the likeliest sigmoid, by Newton's method with halved steps; the loss is convex."""
    inputs, prior = np.column_stack([logits, np.ones_like(logits)]), np.array([slope, 0.0])
    signs = np.where(events, 1.0, -1.0)

    def loss(theta: Floats) -> float:
        return float(
            np.logaddexp(0.0, -signs * (inputs @ theta)).sum() + _SLOPE_BLOCKS / 2 * np.sum((theta - prior) ** 2)
        )

    theta = prior.copy()
    for _ in range(50):
        probs = _sigmoid(inputs @ theta)
        gradient = inputs.T @ (probs - events) + _SLOPE_BLOCKS * (theta - prior)
        curvature = (inputs * (probs * (1 - probs))[:, None]).T @ inputs + _SLOPE_BLOCKS * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(theta - step) > loss(theta) and np.abs(step).max() > 1e-9:
            step /= 2
        theta = theta - step
        if np.abs(step).max() < 1e-6:
            break
    return max(float(theta[0]), _LEAST_SLOPE), float(theta[1])


def _fit_map(products: Floats, events: Bools) -> Floats:
    """Values at _POINTS of the monotone map from products to frequencies."""
    place = np.clip(products * (MAP_POINTS - 1), 0, MAP_POINTS - 1)
    left = np.minimum(place.astype(np.intp), MAP_POINTS - 2)
    pieces = np.zeros((products.size, MAP_POINTS))
    rows = np.arange(products.size)
    pieces[rows, left], pieces[rows, left + 1] = left + 1 - place, place - left
    weights = pieces.T @ pieces + _MAP_BLOCKS * np.eye(MAP_POINTS)
    values: Floats = np.linalg.solve(weights, pieces.T @ events + _MAP_BLOCKS * _POINTS).astype(np.float64)
    return np.clip(_pool_falling(values, pieces.sum(axis=0) + _MAP_BLOCKS), 0.0, 1.0)


def _pool_falling(values: Floats, weights: Floats) -> Floats:
    """Return the nearest sequence that never falls (weighted squares): neighbours that fall share their mean."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        pools.append((float(value), float(weight), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (mean, own, n), (mean_before, weight_before, n_before) = pools.pop(), pools.pop()
            total = own + weight_before
            pools.append(((mean * own + mean_before * weight_before) / total, total, n + n_before))
    return np.concatenate([np.full(n, mean) for mean, _, n in pools])


def _sigmoid(x: Floats) -> Floats:
    # tanh saturates without overflow and takes infinities.
    sigmoid: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return sigmoid


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
