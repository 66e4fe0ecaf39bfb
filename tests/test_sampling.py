"""Options, penalties, truncation, sampling, random streams against the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dspark_cpp._core import _math
from reference import sampling as oracle

# Probabilities are float32 (6e-8 relative each), the vectorised exp is good to 2e-7, sums over 152k terms add as much
# again, and (logit - max) / T is rounded to float32: 6e-8 of its size, 1.7e-6 at 28 nats. Beyond that, below ATOL,
# nothing is compared.
RTOL = 2e-6
ATOL = 1e-12

OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 0.5, "temperature": 2.0},
    {"min_p": 0.07},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8},
    {"temperature": 0.0},
    {"temperature": 1e-3},
    {"temperature": 50.0, "top_p": 0.97},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "presence_penalty": -0.5},
    {"frequency_penalty": 0.4, "presence_penalty": 1.1, "top_p": 0.95},
    {"logit_bias": [(3, 5.0), (0, -100.0)], "repetition_penalty": 1.2, "top_k": 6},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "penalty_window": 7},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5, "penalty_window": 33},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "penalty_window": 0},
]


def dense(n_vocab, distribution):
    ids, probs = distribution
    assert np.all(np.diff(ids) > 0), "ids ascend strictly"
    out = np.zeros(n_vocab)
    out[ids] = probs
    return out


@pytest.mark.parametrize("n_vocab", [8, 1000, 1024, 3001])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_target_distribution_equals_oracle(n_vocab, options):
    rng = np.random.default_rng(n_vocab)
    for scale in (0.1, 2.0, 8.0):
        logits = rng.normal(0, scale, n_vocab).astype(np.float32)
        logits[rng.integers(n_vocab, size=n_vocab // 8)] = -np.inf
        logits[[0, 3]] = 0.25, 0.5
        prompt, output = rng.integers(n_vocab, size=20).tolist(), rng.integers(min(n_vocab, 30), size=25).tolist()
        probs = dense(n_vocab, _math.target_distribution(logits, options, prompt, output))
        np.testing.assert_allclose(
            probs, oracle.target_distribution(logits, options, prompt, output), rtol=RTOL, atol=ATOL
        )
        assert abs(probs.sum() - 1) < 1e-6


def test_target_distribution_on_a_real_vocabulary_size():
    logits = np.random.default_rng(1).normal(0, 3, 151_936).astype(np.float32)
    for options in OPTIONS:
        probs = dense(len(logits), _math.target_distribution(logits, options, [1, 2], [2, 5, 5]))
        np.testing.assert_allclose(
            probs, oracle.target_distribution(logits, options, [1, 2], [2, 5, 5]), rtol=RTOL, atol=ATOL
        )


def test_small_probabilities_keep_their_relative_accuracy():
    """The exp of its own is checked over its whole range, down to where float32 leaves the normal numbers."""
    logits = -np.linspace(0, 87, 4001).astype(np.float32)
    probs = dense(4001, _math.target_distribution(logits, {}, [], []))
    expected = oracle.target_distribution(logits, {})
    is_normal = expected > 1.2e-38
    np.testing.assert_allclose(probs[is_normal], expected[is_normal], rtol=RTOL)
    far = _math.target_distribution(np.array([0.0, -88.0, -1e30, -np.inf], np.float32), {}, [], [])
    assert dense(4, far).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_argmax_takes_the_lowest_id_on_ties():
    logits = np.zeros(5000, np.float32)
    logits[[4321, 77, 1100]] = 3.0
    assert _math.argmax_token(logits, {}, [], []) == 77
    assert _math.argmax_token(logits, {"logit_bias": [(77, -1.0)]}, [], []) == 1100
    assert _math.argmax_token(logits, {"presence_penalty": 1.0}, [77], [1100, 77]) == 4321
    assert _math.target_distribution(logits, {"temperature": 0}, [], [])[0].tolist() == [77]


@pytest.mark.parametrize("n_vocab", [8, 900, 20_000])
@pytest.mark.parametrize("k", [1, 7, 64, 1500])
def test_select_top_k_equals_a_full_sort(n_vocab, k):
    rng = np.random.default_rng(k)
    for logits in (rng.normal(size=n_vocab), rng.integers(4, size=n_vocab), np.sort(rng.normal(size=n_vocab))[::-1]):
        logits = logits.astype(np.float32)
        logits[rng.integers(n_vocab, size=n_vocab // 3)] = -np.inf
        order = np.lexsort((np.arange(n_vocab), -logits))[:k]
        order = order[logits[order] > -np.inf]
        ids, values = _math.select_top_k(logits, k)
        assert ids.tolist() == order.tolist()
        assert values.tolist() == logits[order].tolist()


def test_candidate_distribution_ignores_the_order_of_candidates():
    ids, logits = [7, 2, 90, 4], [0.5, 1.0, 1.0, -0.3]
    for options in OPTIONS:
        expected = _math.candidate_distribution(ids, logits, options)
        for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
            got = _math.candidate_distribution([ids[i] for i in order], [logits[i] for i in order], options)
            assert got[0].tolist() == expected[0].tolist()
            np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)  # sums in another order


def test_sample_is_the_inverse_of_the_distribution_function():
    rng = np.random.default_rng(5)
    probs = rng.dirichlet(np.full(2000, 0.05)).astype(np.float32)
    probs[rng.integers(2000, size=500)] = 0
    probs /= probs.sum()
    uniforms = rng.random(20_000)
    tokens = _math.sample(list(range(2000)), probs.tolist(), uniforms.tolist())
    upper = np.cumsum(probs.astype(np.float64))
    # 1e-7: block sums are taken in float32.
    assert np.all(upper[tokens] > uniforms - 1e-7)
    assert np.all(upper[tokens] - probs[tokens] <= uniforms + 1e-7)
    assert np.all(probs[tokens] > 0)


def test_sample_never_returns_a_token_of_probability_zero():
    ends = [0.0, 0.3, 1.0 - 2**-53]
    assert _math.sample([3, 5, 9, 11], [0.0, 0.4, 0.6, 0.0], ends).tolist() == [5, 5, 9]
    # The sum falls short of 1 by rounding: the last possible token takes the rest.
    assert _math.sample([3, 5, 9], [0.4, 0.5999, 0.0], ends).tolist() == [3, 3, 5]
    with pytest.raises(RuntimeError, match="no token has a positive probability"):
        _math.sample([1, 2], [0.0, 0.0], [0.5])


def test_top_logprobs_equal_log_softmax_of_raw_logits():
    logits = np.random.default_rng(2).normal(0, 4, 50_000).astype(np.float32)
    expected = oracle.log_softmax(logits)
    chosen, best = _math.top_logprobs(logits, 123, 5)
    # Values near -20 in float32: 1e-6 absolute per step, two steps.
    assert chosen == pytest.approx(expected[123], abs=4e-6)
    order = np.argsort(-logits)[:5]
    assert [token for token, _ in best] == order.tolist()
    np.testing.assert_allclose([value for _, value in best], expected[order], atol=4e-6)
    assert _math.top_logprobs(np.array([0.0, -np.inf], np.float32), 1, 5) == (-math.inf, [(0, 0.0)])
    assert _math.top_logprobs(logits, 123, 0)[1] == []


def test_token_counts_push_and_pop():
    pushed = _math.replay_counts([4, 4, 9], [9, 2, 2, -3, -3, 2])
    assert pushed == [[4, 2, 0], [9, 1, 1], [2, 0, 1]]
    with pytest.raises(RuntimeError, match="pop_output token must have been pushed last, got 4"):
        _math.replay_counts([4], [-5])
    with pytest.raises(RuntimeError, match="pop_output token must have been pushed last, got 4"):
        _math.replay_counts([], [4, 5, -5])


@pytest.mark.parametrize("window", [0, 1, 2, 5, 6, 100])
def test_token_counts_follow_their_window_both_ways(window):
    """Counts after any pushes and pops are those of the newest tokens of the text that is left."""
    rng = np.random.default_rng(window)
    prompt, text, moves = [3, 1, 1, 4], [], []
    for _ in range(200):
        if text and rng.random() < 0.45:
            moves.append(-1 - text.pop())
        else:
            text.append(int(rng.integers(6)))
            moves.append(text[-1])
        kept = ([(token, 1) for token in prompt] + [(token, 2) for token in text])[-window:] if window else []
        for entry in _math.replay_counts(prompt, moves, window):
            assert entry[1:] == [kept.count((entry[0], 1)), kept.count((entry[0], 2))]


def test_popped_tokens_are_not_penalised():
    """A drafted token that was pushed and popped leaves the distribution as it was."""
    logits = np.linspace(-1, 1, 8, dtype=np.float32)
    options = {"presence_penalty": 1.0, "repetition_penalty": 2.0}
    clean = _math.target_distribution(logits, options, [1], [2])
    # An absent token and a token with zero counts go the same way; the binding replays through the same class.
    assert _math.replay_counts([1], [2, 6, -7]) == [[1, 1, 0], [2, 0, 1], [6, 0, 0]]
    np.testing.assert_allclose(dense(8, clean), oracle.target_distribution(logits, options, [1], [2]), rtol=RTOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or positive, got -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, got nan"),
        ({"min_p": -0.5}, "min_p must be between 0 and 1, got -0.5"),
        ({"min_p": math.nan}, "min_p must be between 0 and 1, got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be finite and above 0, got inf"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2, got 2.5"),
        ({"presence_penalty": math.nan}, "presence_penalty must be between -2 and 2, got nan"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty must be between -2 and 2, got -inf"),
        ({"penalty_window": -2}, r"penalty_window must be -1 \(all\) or more, got -2"),
        ({"logit_bias": [(-1, 1.0)]}, "logit_bias token must be at least 0, got -1"),
        ({"logit_bias": [(1, math.nan)]}, "logit_bias value must be finite, got nan"),
        ({"logit_bias": [(4, 1.0)]}, "logit_bias token must be below n_vocab 4, got 4"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        _math.target_distribution(np.zeros(4, np.float32), options, [], [])


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "logits must not hold NaN or .inf, got -?nan at token 2"),
        (math.inf, "logits must not hold NaN or .inf, got inf at token 2"),
        (None, "logits must hold a finite value, got none"),
    ],
)
def test_bad_logits_are_named(options, value, message):
    logits = np.full(2000, -np.inf if value is None else 0.0, np.float32)
    logits[2] = -np.inf if value is None else value
    with pytest.raises(RuntimeError, match=message):
        _math.target_distribution(logits, options, [], [])


def test_philox_gives_the_published_vectors():
    """Known answers that the authors of Random123 publish for Philox4x32-10."""
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert _math.philox([0] * 4, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert _math.philox([2**32 - 1] * 4, 2**64 - 1) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert _math.philox(pi, 0x299F31D0_A4093822) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_random_streams_separate_seed_purpose_position_and_round():
    keys = [
        (seed, purpose, position, start)
        for seed in (0, 1, 2**63)
        for purpose in ("draft_sample", "accept_test")
        for position in (10, 11, 2**40)
        for start in (8, 9)
    ] + [(seed, purpose, 10, 0) for seed in (0, 1) for purpose in ("target_sample", "residual")]
    values = [_math.uniform(*key) for key in keys]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    # Settled once for good, so the round does not matter.
    assert _math.uniform(1, "target_sample", 10, 3) == _math.uniform(1, "target_sample", 10, 9)
    assert _math.uniform(1, "residual", 10, 3) == _math.uniform(1, "residual", 10, 9)
