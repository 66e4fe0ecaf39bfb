"""Synthetic acceptance: rates, calibration and determinism of its law, and the engine on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dspark_cpp import _core

BLOCK = 7
N_ROUNDS = 40000
# Three standard errors of a frequency over that many rounds.
TOLERANCE = 3 * 0.5 / N_ROUNDS**0.5


def draw(request_seed: int = 0, n_rounds: int = N_ROUNDS, **options: object) -> tuple[np.ndarray, np.ndarray]:
    synthetic = _core.SyntheticAcceptance(**options)
    logits, n_accepted = synthetic.draw_rounds(BLOCK, request_seed, n_rounds)
    return np.array(logits), np.array(n_accepted)


@pytest.mark.parametrize("spread", [0.0, 1.5, 3.0])
def test_prefixes_survive_at_the_given_rates(spread: float) -> None:
    rates = [0.9, 0.8, 0.85, 0.7, 0.6, 0.95, 0.5]
    _, n_accepted = draw(rates=[rates], spread=spread)
    frequencies = [(n_accepted > k).mean() for k in range(BLOCK)]
    np.testing.assert_allclose(frequencies, np.cumprod(rates), atol=TOLERANCE)


def test_short_lists_go_on_with_their_last_rate_and_seeds_choose_the_domain() -> None:
    for seed, rate in ((4, 0.3), (5, 0.9), (6, 0.3)):
        _, n_accepted = draw(seed, rates=[[0.3], [0.9]])
        assert n_accepted.mean() == pytest.approx(sum(rate**k for k in range(1, BLOCK + 1)), abs=7 * TOLERANCE)


@pytest.mark.parametrize("noise", [0.0, 0.7, 3.0])
def test_confidence_is_calibrated_whatever_its_noise(noise: float) -> None:
    logits, n_accepted = draw(rates=[[0.8]], spread=2.0, noise=noise)
    for k in (0, 3, 6):
        reached = n_accepted >= k
        confidence = 1 / (1 + np.exp(-logits[reached, k]))
        accepted = n_accepted[reached] > k
        edges = np.quantile(confidence, np.linspace(0, 1, 6)[1:-1])
        groups = np.digitize(confidence, edges)
        for group in range(5):
            inside = groups == group
            # Four standard errors of the smallest group's frequency.
            bound = 4 * 0.5 / inside.sum() ** 0.5
            assert abs(accepted[inside].mean() - confidence[inside].mean()) < bound


def test_noise_takes_information_away() -> None:
    spreads = [draw(rates=[[0.8]], noise=noise)[0][:, 0].std() for noise in (0.0, 0.7, 3.0)]
    assert spreads[0] > spreads[1] > spreads[2] > 0.0


def test_bias_shifts_the_logits_alone() -> None:
    logits, n_accepted = draw(rates=[[0.8]], n_rounds=50)
    shifted, same = draw(rates=[[0.8]], n_rounds=50, bias=2.0)
    np.testing.assert_allclose(shifted, logits + 2.0, atol=1e-5)  # float32
    np.testing.assert_array_equal(n_accepted, same)


def test_rounds_depend_on_the_seeds_alone() -> None:
    first, second, third = (draw(request_seed, 50, rates=[[0.5]])[1].tolist() for request_seed in (1, 1, 2))
    assert first == second
    assert first != third
    assert draw(1, 50, rates=[[0.5]], seed=9)[1].tolist() != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": [[]]}, "rates must hold at least 1 rate per domain"),
        ({"rates": [[1.5]]}, "rates must be in"),
        ({"rates": [[0.5]], "spread": -1.0}, "spread must be in"),
        ({"rates": [[0.5]], "noise": float("nan")}, "noise must be in"),
        ({"rates": [[0.5]], "bias": 1e9}, "bias must be in"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _core.SyntheticAcceptance(**options)


def answer(target: Path, drafter: Path, rate: float, temperature: float, verification: str) -> _core.RequestStats:
    model = _core.Model.load_target(str(target))
    engine = _core.Engine(
        model,
        _core.Model.load_drafter(str(drafter), model),
        n_ctx=512,
        n_threads=1,
        synthetic_acceptance=_core.SyntheticAcceptance(rates=[[rate]]),
    )
    options = _core.RequestOptions(
        max_tokens=60, temperature=temperature, ignore_eos=True, verification=verification, presence_penalty=0.5
    )
    engine.submit([1, 2, 3], options)
    events = []
    while engine.has_work:
        events += engine.step()
        for _, in_target, in_draft in engine.cache_positions():
            assert in_target == in_draft
    engine.close()
    assert sum(len(event.tokens) for event in events) == 60
    return events[-1].stats


@pytest.mark.parametrize(("temperature", "verification"), [(0.0, "exact"), (1.0, "exact"), (1.0, "block")])
def test_engine_accepts_what_was_drawn(
    temperature: float, verification: str, demo_target: Path, demo_drafter: Path
) -> None:
    never = answer(demo_target, demo_drafter, 0.0, temperature, verification)
    assert never.n_accepted == 0
    assert never.n_scheduled > 0
    always = answer(demo_target, demo_drafter, 1.0, temperature, verification)
    assert always.n_accepted == always.n_scheduled
    assert always.n_rounds == 8  # the prompt's token, then 7 rounds of 8 tokens and one of the 3 left
