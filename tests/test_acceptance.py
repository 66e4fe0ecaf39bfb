"""Verification is lossless: every rule emits the target's law, over many rounds, whatever the drafter does.

The chi-square tests draw from a toy target and a toy drafter over 8 tokens whose laws depend on the last token. Seeds
are fixed, so each test passes or fails once and for all; P_MIN = 1e-4 over some 140 such p-values leaves a correct
implementation a chance of 1.4 % of needing another seed, while 200k draws expose a wrong law by many orders of
magnitude (the last test of this file shows it).
"""

from __future__ import annotations

import numpy as np
import pytest
from dspark_cpp._core import _math
from reference import acceptance as oracle
from reference import sampling

P_MIN = 1e-4
N_DRAWS = 200_000
N_VOCAB = 8
RULES = ["exact", "rejection", "block"]

RNG = np.random.default_rng(20_26)
TARGET = RNG.normal(0, 1.2, (N_VOCAB, N_VOCAB)).astype(np.float32)
# Close enough to the target to be accepted often, far enough to be rejected often.
DRAFT = (0.6 * TARGET + RNG.normal(0, 0.8, (N_VOCAB, N_VOCAB))).astype(np.float32)

VARIANTS = {
    "plain": {},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    "window": {"repetition_penalty": 1.8, "frequency_penalty": 1.5, "penalty_window": 2},
    "bias": {"logit_bias": [(2, 1.5), (5, -3.0)], "top_k": 6},
}


def laws(logits, options):
    return np.array([sampling.truncate(row, options) for row in logits])


def simulate(n_draws=N_DRAWS, target=TARGET, draft=DRAFT, **options):
    return _math.simulate(target, draft, options, n_draws)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rules_reproduce_the_joint_law_of_consecutive_tokens(rule, temperature, variant):
    """Three tokens with blocks of three: most trials take two or three rounds and draft positions again."""
    options = {"temperature": temperature, **VARIANTS[variant]}
    counts, _ = simulate(rule=rule, block_size=3, n_tokens=3, anchor=1, seed=7, **options)
    law = oracle.sequence_law(TARGET, options, 1, 3)
    assert counts.sum() == N_DRAWS
    assert oracle.chi_square_p(counts, law) > P_MIN
    first_token = counts.reshape(N_VOCAB, -1).sum(axis=1)
    assert oracle.chi_square_p(first_token, law.reshape(N_VOCAB, -1).sum(axis=1)) > P_MIN


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft_length", ["fixed", "from_last_round"])
def test_rules_reproduce_long_sequences_under_changing_draft_lengths(rule, draft_length):
    """Lengths that depend on tokens drafted and thrown away in the round before.

    Allowed, because the next round's draws are fresh: keyed by the position alone, they would not be.
    """
    counts, _ = simulate(
        400_000, rule=rule, block_size=4, n_tokens=5, anchor=3, seed=99, temperature=0.8, draft_length=draft_length
    )
    law = oracle.sequence_law(TARGET, {"temperature": 0.8}, 3, 5)
    assert oracle.chi_square_p(counts, law) > P_MIN


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_rules_reproduce_the_law_of_random_pairs(rule, seed):
    """Other shapes: sparse laws, drafters that propose what the target forbids and miss what it wants."""
    rng = np.random.default_rng(seed)
    target = rng.normal(0, 2.5, (N_VOCAB, N_VOCAB)).astype(np.float32)
    draft = rng.normal(0, 2.5, (N_VOCAB, N_VOCAB)).astype(np.float32)
    target[rng.random(target.shape) < 0.3] = -np.inf
    target[:, 0] = 0.0
    draft[rng.random(draft.shape) < 0.4] = -np.inf
    draft[:, 7] = 0.0
    counts, _ = simulate(target=target, draft=draft, rule=rule, block_size=2, n_tokens=3, seed=seed)
    assert oracle.chi_square_p(counts, oracle.sequence_law(target, {}, 0, 3)) > P_MIN


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_acceptance_of_one_token_is_one_minus_total_variation(rule):
    for temperature in (0.5, 1.0, 1.5):
        options = {"temperature": temperature}
        expected = 1 - oracle.total_variation(laws(TARGET, options)[2], laws(DRAFT, options)[2])
        _, accepted = simulate(rule=rule, block_size=1, n_tokens=1, anchor=2, seed=11, **options)
        # Four standard errors of a binomial frequency: 1 in 16000 for each of six checks.
        assert abs(accepted[1] / N_DRAWS - expected) < 4 * np.sqrt(expected * (1 - expected) / N_DRAWS)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_p": 0.7}], ids=str)
def test_accepted_lengths_follow_the_enumerated_law(rule, options):
    _, accepted = simulate(rule=rule, block_size=4, n_tokens=1, anchor=5, seed=3, **options)
    law = oracle.accepted_law(rule, laws(TARGET, options), laws(DRAFT, options), 5, 4)
    assert oracle.chi_square_p(accepted, law) > P_MIN


def test_block_accepts_no_less_than_rejection():
    """Exact expectations by enumeration over many pairs; 1e-9 allows for float64 rounding only."""
    lengths = np.arange(4)
    gains = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scale = rng.uniform(0.2, 3.0)
        target = laws(rng.normal(0, scale, (4, 4)), {})
        draft = laws(rng.normal(0, scale, (4, 4)), {})
        block = oracle.accepted_law("block", target, draft, 0, 3) @ lengths
        rejection = oracle.accepted_law("rejection", target, draft, 0, 3) @ lengths
        gains.append(block - rejection)
    assert min(gains) > -1e-9
    assert max(gains) > 0.02


def test_block_accepts_more_on_the_toy_pair():
    """The implementation shows it too: simulated means differ by more than 3 standard errors of 0.003."""
    mean = {}
    for rule in ("rejection", "block"):
        _, accepted = simulate(rule=rule, block_size=4, n_tokens=1, anchor=5, seed=3)
        mean[rule] = accepted @ np.arange(5) / N_DRAWS
    assert mean["block"] > mean["rejection"] + 0.01


@pytest.mark.parametrize("rule", RULES)
def test_verify_equals_oracle_draw_by_draw(rule):
    """Same uniforms, same decisions: 2000 random blocks of 0 to 5 tokens over 6 tokens, with zeros in both laws.

    A decision could only differ where a uniform falls within float rounding (1e-7) of a boundary; none of these does.
    """
    rng = np.random.default_rng(4)
    for case in range(2000):
        n = int(rng.integers(6))
        target, draft = random_rows(rng, n + 1), random_rows(rng, max(n, 1))
        tokens = [int(rng.choice(6, p=draft[k].astype(float) / draft[k].sum(dtype=float))) for k in range(n)]
        start = int(rng.integers(1000))

        def uniform(purpose, slot, case=case, start=start):
            return _math.uniform(case, purpose, start + 1 + slot, start)

        expected = oracle.verify(rule, tokens, draft.astype(float), target.astype(float), uniform)
        assert _math.verify(rule, tokens, draft, target, start, case)[:2] == expected


def random_rows(rng, n):
    rows = rng.dirichlet(np.full(6, 0.7), n)
    rows[rng.random(rows.shape) < 0.2] = 0
    rows[:, 2] += 0.1
    return (rows / rows.sum(axis=1, keepdims=True)).astype(np.float32)


def test_exact_reads_no_row_after_the_first_mismatch():
    target = np.eye(4, dtype=np.float32)[[1, 2, 3, 0]]
    assert _math.verify("exact", [1, 2, 3], np.empty((0, 4), np.float32), target, 0, 0) == (3, 0, [0, 1, 2, 3])
    assert _math.verify("exact", [1, 0, 3], np.empty((0, 4), np.float32), target, 0, 0) == (1, 2, [0, 1])
    assert _math.verify("exact", [0], np.empty((0, 4), np.float32), target[:2], 0, 0) == (0, 1, [0])


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_rows_are_read_once_in_order_and_only_when_needed(rule):
    one_hot = np.eye(4, dtype=np.float32)
    right = _math.verify(rule, [1, 2], one_hot[[1, 2]], one_hot[[1, 2, 3]], 0, 0)
    assert right == (2, 3, [0, 1, 2])
    wrong = _math.verify(rule, [0, 2], one_hot[[0, 2]], one_hot[[1, 2, 3]], 0, 0)
    assert wrong == (0, 1, [0])
    nothing_drafted = _math.verify(rule, [], np.empty((0, 4), np.float32), one_hot[[3]], 0, 0)
    assert nothing_drafted == (0, 3, [0])


@pytest.mark.parametrize("rule", RULES)
def test_a_prefix_of_the_draft_may_be_verified(rule):
    """Draft distributions beyond the verified prefix are there and must not matter."""
    rows = np.full((4, 4), 0.25, np.float32)
    for seed in range(50):
        short = _math.verify(rule, [1, 2], rows[:2], rows[:3], 5, seed)
        assert _math.verify(rule, [1, 2], rows, rows[:3], 5, seed) == short
        # Equal laws: nothing is ever rejected, also in `block`, where the threshold is 0 / 0.
        assert rule == "exact" or short[0] == 2


def test_equal_laws_up_to_rounding_never_fail():
    rng = np.random.default_rng(8)
    for seed in range(300):
        target = rng.dirichlet(np.ones(8), 5).astype(np.float32)
        draft = np.nextafter(target, np.where(rng.random(target.shape) < 0.5, 0, 1).astype(np.float32))
        tokens = [int(np.argmax(rng.multinomial(1, row.astype(float) / row.sum(dtype=float)))) for row in draft[:4]]
        for rule in ("rejection", "block"):
            n_accepted, token, _ = _math.verify(rule, tokens, draft, target, 0, seed)
            assert n_accepted == 4
            assert 0 <= token < 8


def test_bad_calls_are_named():
    rows = np.array([[0.5, 0.5, 0.0]], np.float32)
    with pytest.raises(ValueError, match="draft token must have a positive draft probability, got token 2 with 0"):
        _math.verify("block", [2], rows, np.repeat(rows, 2, axis=0), 0, 0)
    with pytest.raises(ValueError, match="draft_probs must hold a distribution per draft token, got 1 for 2"):
        _math.verify("rejection", [0, 1], rows, np.repeat(rows, 3, axis=0), 0, 0)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.9}, {"frequency_penalty": 0.8}, {"temperature": 0}], ids=str
)
def test_exact_text_depends_on_the_seed_alone(options):
    """Draft off, every length, a good, a hopeless and a changing drafter: the same tokens."""
    shared = {"rule": "exact", "n_tokens": 40, **options}
    for seed in range(30):
        plain = _math.generate(TARGET, DRAFT, {**shared, "block_size": 0, "seed": seed}).tolist()
        for draft in (DRAFT, TARGET, -TARGET):
            for block_size in (1, 3, 7):
                for draft_length in ("fixed", "from_last_round"):
                    run = {**shared, "block_size": block_size, "seed": seed, "draft_length": draft_length}
                    assert _math.generate(TARGET, draft, run).tolist() == plain


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_greedy_text_is_the_same_under_every_rule(rule):
    plain = _math.generate(TARGET, DRAFT, {"n_tokens": 30, "temperature": 0, "presence_penalty": 1.0}).tolist()
    run = {"rule": rule, "block_size": 5, "n_tokens": 30, "temperature": 0, "presence_penalty": 1.0}
    assert _math.generate(TARGET, DRAFT, run).tolist() == plain


# Non-anticipation (paper, appendix A): SPS(1, 2, 3) = (1, 0.5, 0.45), a_1 = 0.8, c_2 = 0.9 after token 0 and 0 after
# token 1.
STEPS_PER_SECOND = {1: 1.0, 2: 0.5, 3: 0.45}
APPENDIX_TARGET = np.array([0.7, 0.3], np.float32)
APPENDIX_DRAFT = np.array([0.5, 0.5], np.float32)


def throughput(prefix_len, second_confidence):
    survivals = [0.8, 0.8 * second_confidence]
    return (1 + sum(survivals[:prefix_len])) * STEPS_PER_SECOND[1 + prefix_len]


def global_search(first_token):
    """Looks at c_2, which tells what x_1 is, before it decides whether x_1 is verified at all."""
    second_confidence = 0.9 if first_token == 0 else 0.0
    return max(range(3), key=lambda prefix_len: throughput(prefix_len, second_confidence))


def early_stop(first_token):
    """Algorithm 1: goes on only while throughput rises; verifying slot 1 is decided before c_2 is known."""
    best = 0
    while best < 2 and throughput(best + 1, 0.9 if first_token == 0 else 0.0) > throughput(best, 0.0):
        best += 1
    return best


def older_information(_first_token):
    """A budget from earlier rounds: two slots, whatever this block holds."""
    return 2


def emitted_share_of_token_0(policy, rule, n_draws=10_000):
    draft, target = np.tile(APPENDIX_DRAFT, (2, 1)), np.tile(APPENDIX_TARGET, (3, 1))
    n_zeros = 0
    for seed in range(n_draws):
        tokens = [int(_math.uniform(seed, "draft_sample", 1 + k, 0) >= 0.5) for k in range(2)]
        prefix_len = policy(tokens[0])
        n_accepted, next_token, _ = _math.verify(rule, tokens[:prefix_len], draft, target[: prefix_len + 1], 0, seed)
        n_zeros += (tokens[0] if n_accepted else next_token) == 0
    return n_zeros / n_draws


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_appendix_a_global_search_is_biased_and_the_others_are_not(rule):
    # 10k draws: a standard error of 0.0046; four of them stay far from the 0.15 between the two outcomes.
    assert global_search(0) == 2
    assert global_search(1) == 0
    assert emitted_share_of_token_0(global_search, rule) == pytest.approx(0.85, abs=0.019)
    for policy in (early_stop, older_information):
        assert emitted_share_of_token_0(policy, rule) == pytest.approx(0.7, abs=0.019)


def test_appendix_a_is_harmless_under_exact():
    assert emitted_share_of_token_0(global_search, "exact") == pytest.approx(0.7, abs=0.019)


def test_the_statistics_notice_a_wrong_law():
    """What the chi-square tests rest on: the right counts against slightly wrong laws, and the other way round."""
    counts, _ = simulate(rule="block", block_size=3, n_tokens=3, anchor=1, seed=7)
    assert oracle.chi_square_p(counts, oracle.sequence_law(TARGET, {"temperature": 1.03}, 1, 3)) < 1e-8
    assert oracle.chi_square_p(counts, oracle.sequence_law(DRAFT, {}, 1, 3)) < 1e-8
    rng = np.random.default_rng(0)
    law = oracle.sequence_law(TARGET, {}, 1, 3)
    p_values = [oracle.chi_square_p(rng.multinomial(N_DRAWS, law), law) for _ in range(200)]
    # Uniform under the null: the mean of 200 has a standard error of 0.02.
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.08)
