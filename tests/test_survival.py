"""The survival estimator against the rates it should find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core
from reference import calibration as oracle

_survival = _core._scheduling  # type: ignore[attr-defined]
BLOCK = 4
RATES = np.array([0.9, 0.6, 0.8, 0.7])


def key(request: int = 1, rule: str = "block", temperature: float = 1.0) -> tuple[int, str, float]:
    return (request, rule, temperature)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def run(
    estimator: Any, rates: Any, n_rounds: int, seed: int = 0, request: int = 1, rule: str = "block"
) -> list[list[float]]:
    """Full blocks without confidences; returns what was expected before every round."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(n_rounds):
        seen.append(estimator.expect(key(request, rule)))
        fails = np.flatnonzero(rng.random(BLOCK) > rates)
        estimator.observe(key(request, rule), [], BLOCK, int(fails[0]) if len(fails) else BLOCK)
    return seen


def test_expectations_find_the_true_rates() -> None:
    """The mean over 1500 rounds of a memory of some 14: standard error below 0.02 for slots reached half the time."""
    seen = run(_survival.SurvivalEstimator(BLOCK), RATES, 2000)
    np.testing.assert_allclose(np.mean(seen[500:], axis=0), RATES, atol=0.05)


def test_expectations_follow_a_text_that_changes() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    run(estimator, np.full(BLOCK, 0.95), 300)
    after = np.mean(run(estimator, np.full(BLOCK, 0.2), 60, seed=1)[30:], axis=0)
    assert after[0] < 0.4


def test_a_new_request_begins_where_the_others_are_and_has_its_own_rates() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    run(estimator, np.full(BLOCK, 0.3), 300)
    assert estimator.expect(key(2))[0] < 0.45  # the band's, not the prior's 0.8
    for step in range(40):
        run(estimator, np.full(BLOCK, 0.95), 1, seed=step, request=2)
        run(estimator, np.full(BLOCK, 0.3), 1, seed=step, request=1)
    assert estimator.expect(key(2))[0] > estimator.expect(key(1))[0] + 0.2
    assert estimator.expect(key(3, "exact"))[0] == pytest.approx(0.8)  # another rule: nothing known


def test_slots_never_reached_lean_on_the_slot_before() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    run(estimator, np.array([0.0, 0, 0, 0]), 50)
    expected = estimator.expect(key())
    assert expected[0] < 0.1
    assert max(expected[1:]) < 0.2


def test_forgotten_requests_leave_nothing() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    for request in range(100):
        run(estimator, RATES, 3, request=request)
        estimator.forget(request)
    estimator.expect(key(5))
    estimator.read_confidence(key(5), [0.0] * BLOCK)
    assert estimator.n_requests == 0


# ---- confidences ----


def run_confidence(estimator: Any, n_rounds: int, logit_of: Any, seed: int = 0, spread: float = 1.5) -> tuple[Any, Any]:
    """Rounds of varying difficulty. Returns estimates (n, BLOCK) of the last half, and the true probabilities."""
    rng = np.random.default_rng(seed)
    read, true = [], []
    for step in range(n_rounds):
        logits = rng.normal(0.8, spread, BLOCK)
        shown = [float(x) for x in logit_of(logits, rng)]
        if step >= n_rounds // 2:
            read.append(estimator.read_confidence(key(), shown))
            true.append(sigmoid(logits))
        fails = np.flatnonzero(rng.random(BLOCK) > sigmoid(logits))
        estimator.observe(key(), shown, BLOCK, int(fails[0]) if len(fails) else BLOCK)
    return np.array(read), np.array(true)


@pytest.mark.parametrize("bias", [-2.0, 0.0, 2.0])
def test_a_biased_confidence_is_corrected(bias: float) -> None:
    """Slots 0 and 1, which are reached often. The correction goes on moving: 0.05 is its noise on the mean."""
    read, true = run_confidence(_survival.SurvivalEstimator(BLOCK), 3000, lambda logits, rng: logits + bias)
    np.testing.assert_allclose(read.mean(axis=0)[:2], true.mean(axis=0)[:2], atol=0.05)
    assert np.abs(read - true)[:, :2].mean() < 0.1
    assert np.corrcoef(read[:, 0], true[:, 0])[0, 1] > 0.9


def test_a_useless_confidence_ends_up_saying_the_mean() -> None:
    """Pure noise: beside always saying the mean, at most a fifth more of squared error."""
    read, true = run_confidence(_survival.SurvivalEstimator(BLOCK), 4000, lambda logits, rng: rng.normal(0, 2, BLOCK))
    assert read[:, 0].mean() == pytest.approx(true[:, 0].mean(), abs=0.06)
    assert ((read[:, 0] - true[:, 0]) ** 2).mean() < 1.2 * true[:, 0].var()


def test_odd_logits_are_finite_probabilities() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    odd = [float("inf"), float("-inf"), float("nan"), 1e30]
    for _ in range(200):
        estimator.observe(key(), odd, BLOCK, 0)
    rates = np.array(estimator.read_confidence(key(), odd) + estimator.expect(key()))
    assert np.all((rates >= 0) & (rates <= 1))


def test_what_a_parked_request_showed_fades_towards_what_others_show() -> None:
    estimator = _survival.SurvivalEstimator(BLOCK)
    hard, easy = key(1), key(2)
    for _ in range(30):
        estimator.observe(hard, [], BLOCK, 0)
        for _ in range(5):
            estimator.observe(easy, [], BLOCK, BLOCK)
    others = estimator.expect(key(3))[0]
    before = estimator.expect(hard)[0]
    for _ in range(1000):
        estimator.fade(1)
    assert before < 0.5 < 0.7 < others
    assert estimator.expect(hard)[0] == pytest.approx(others, abs=0.01)
    estimator.fade(99)  # nothing is known of it: nothing to do
    assert estimator.n_requests == 2


# ---- calibration ----


def test_a_calibration_that_contradicts_what_is_seen_counts_little_after_three_rounds() -> None:
    """A drafter of other weights under the calibration of a good one."""
    entry = ("block", 1.0, [], [0.9] * BLOCK, [], [])
    useless = _survival.SurvivalEstimator(BLOCK, [entry])
    for _ in range(3):
        useless.observe(key(1), [], BLOCK, 0)
    assert useless.expect(key(2))[0] < 0.4
    fitting = _survival.SurvivalEstimator(BLOCK, [entry])
    for _ in range(3):
        fitting.observe(key(1), [], BLOCK, BLOCK)
    fitting.observe(key(1), [], BLOCK, 0)
    assert fitting.expect(key(2))[0] > 0.8


CALIBRATION = [
    ("block", 1.0, [2.0] * BLOCK, [0.5] * BLOCK, [], []),
    ("block", 0.0, [], [0.9] * BLOCK, [], []),
    ("rejection", 1.0, [0.5] * BLOCK, [0.3] * BLOCK, [], []),
]


@pytest.mark.parametrize(
    ("rule", "temperature", "rate", "sts"),
    [
        ("block", 1.0, 0.5, 2.0),
        ("block", 1.3, 0.5, 2.0),
        ("block", 0.0, 0.9, 1.0),
        ("block", 0.3, 0.9, 1.0),
        ("rejection", 0.0, 0.3, 0.5),  # its own rule before its own temperature
        ("exact", 0.1, 0.9, 1.0),  # never fitted: the nearest temperature of any
    ],
)
def test_the_nearest_calibration_counts(rule: str, temperature: float, rate: float, sts: float) -> None:
    estimator = _survival.SurvivalEstimator(BLOCK, CALIBRATION)
    assert estimator.expect(key(1, rule, temperature)) == pytest.approx([rate] * BLOCK)
    read = estimator.read_confidence(key(1, rule, temperature), [1.0] * BLOCK)
    assert read == pytest.approx(list(sigmoid([1.0 / sts] * BLOCK)))


def test_offsets_and_maps_equal_the_oracle() -> None:
    """Doubles on both sides: 1e-12 is rounding."""
    rng = np.random.default_rng(3)
    sts, offsets = rng.uniform(0.7, 2.0, BLOCK), rng.uniform(-1.0, 1.0, BLOCK)
    maps = np.sort(rng.random((BLOCK, 11)), axis=1)
    maps[1] = np.linspace(0, 1, 11)
    entry = ("block", 1.0, sts.tolist(), [], offsets.tolist(), maps.ravel().tolist())
    estimator = _survival.SurvivalEstimator(BLOCK, [entry])
    for _ in range(200):
        logits = rng.uniform(-4.0, 4.0, BLOCK).astype(np.float32)  # the estimator cuts off beyond 8, scaled
        expected = oracle.survivals(logits.tolist(), sts.tolist(), offsets.tolist(), maps.tolist())
        read = estimator.read_confidence(key(), logits.tolist())
        np.testing.assert_allclose(np.cumprod(read), expected, atol=1e-12)
        assert np.all((np.array(read) >= 0) & (np.array(read) <= 1))


def test_a_rate_depends_on_nothing_later() -> None:
    """Non-anticipation: what is said of slot k may use logits 0 .. k alone."""
    maps = np.linspace(0, 1, 11) ** 2
    entry = ("block", 1.0, [1.5] * BLOCK, [], [0.3] * BLOCK, np.tile(maps, BLOCK).tolist())
    estimator = _survival.SurvivalEstimator(BLOCK, [entry])
    first = estimator.read_confidence(key(), [1.0, 0.5, 2.0, -1.0])
    for k in range(BLOCK - 1):
        other = estimator.read_confidence(key(), [1.0, 0.5, 2.0, -1.0][: k + 1] + [-7.0] * (BLOCK - 1 - k))
        assert other[: k + 1] == first[: k + 1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("block", 1.0, [1.0], [], [], []), "calibration sts must hold block_size = 4 values, got 1"),
        (("block", 1.0, [], [0.5] * 5, [], []), "calibration acceptance must hold block_size = 4 values, got 5"),
        (("block", -1.0, [], [], [], []), "calibration temperature must be 0 or more"),
        (("block", 1.0, [0.0] * 4, [], [], []), "calibration sts must be above 0"),
        (("block", 1.0, [], [1.5] * 4, [], []), r"calibration acceptance must be in \[0, 1\]"),
        (("block", 1.0, [], [float("nan")] * 4, [], []), r"calibration acceptance must be in \[0, 1\]"),
        (("block", 1.0, [], [], [0.0] * 3, []), "calibration offsets must hold block_size = 4 values, got 3"),
        (("block", 1.0, [], [], [float("inf")] * 4, []), "calibration offsets must be finite, got inf"),
        (("block", 1.0, [], [], [], [0.5] * 40), "calibration maps must hold block_size x 11 = 44 values, got 40"),
        (("block", 1.0, [], [], [], [0.5] * 43 + [0.4]), r"calibration maps must be in \[0, 1\] and never fall"),
        (("block", 1.0, [], [], [], [float("nan")] * 44), r"calibration maps must be in \[0, 1\] and never fall"),
    ],
)
def test_calibration_is_validated(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _survival.SurvivalEstimator(BLOCK, [entry])
