"""Policies against literal readings and exhaustive search, and what lossless verification asks of each: a slot is
verified or not whatever the confidences after it are (DESIGN section 2, non-anticipation)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core

_policy = _core._scheduling  # type: ignore[attr-defined]
BLOCK = 4


def random_blocks(rng: np.random.Generator, n: int, *, is_free: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "confidence": list(rng.uniform(0.05, 1, BLOCK)),
            "expected": list(rng.uniform(0.05, 1, BLOCK)),
            "most": int(rng.integers(0, BLOCK + 1)),
            "is_free": is_free,
            "weight": float(rng.choice([1.0, rng.uniform(0.3, 3)])),
        }
        for _ in range(n)
    ]


def jagged_costs(rng: np.random.Generator, n_rows: int) -> list[float]:
    """Ascending, with cliffs, flat stretches and now and then a step down, as kernels have them."""
    steps = rng.choice([0.0, 0.1, 1.0, 6.0, -0.5], n_rows, p=[0.25, 0.3, 0.3, 0.1, 0.05]) * rng.uniform(
        0.5, 1.5, n_rows
    )
    return [float(ms) for ms in np.maximum(10 + np.concatenate([[0], np.cumsum(steps)]), 1)]


def values(block: dict[str, Any], key: str = "confidence") -> np.ndarray:
    return block.get("weight", 1.0) * np.cumprod(block[key])[: block["most"]]


def best_prefixes(blocks: list[dict[str, Any]], cost: list[float], price: float, key: str = "confidence") -> float:
    """Largest sum of survivals - price * extra time over all tuples of prefixes."""
    best = 0.0
    for lengths in itertools.product(*(range(block["most"] + 1) for block in blocks)):
        value = sum(values(block, key)[:n].sum() for block, n in zip(blocks, lengths, strict=True))
        best = max(best, value - price * (cost[sum(lengths)] - cost[0]))
    return best


# ---- names ----


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("off", ("off", 0, 0.0)),
        ("fixed:0", ("off", 0, 0.0)),
        ("fixed:7", ("fixed", 7, 0.0)),
        ("full", ("fixed", 2**31 - 1, 0.0)),
        ("threshold:0.5", ("threshold", 0, 0.5)),
        ("algorithm1", ("algorithm1", 0, 0.0)),
        ("adaptive", ("adaptive", 0, 0.0)),
    ],
)
def test_parse_policy_reads_every_name(text: str, parsed: tuple[str, int, float]) -> None:
    assert _policy.parse_policy(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "Adaptive", "fixed", "fixed:", "fixed:-1", "fixed:3.5", "fixed:99999999999", "fixed:3 ", "threshold:",
     "threshold:1.5", "threshold:-0.1", "threshold:nan", "threshold:0.5x", "algorithm2", "off "],
)  # fmt: skip
def test_parse_policy_refuses_the_rest(text: str) -> None:
    with pytest.raises(ValueError, match=r"policy must be off, full, fixed:n, .* got '"):
        _policy.parse_policy(text)


# ---- oracles ----


def literal_algorithm1(blocks: list[dict[str, Any]], cost: list[float], n_requests: int) -> list[int]:
    """The paper's algorithm 1, line by line."""
    survivals = sorted(
        ((-np.prod(block["confidence"][: j + 1]), r, j) for r, block in enumerate(blocks) for j in range(block["most"]))
    )
    prefix = [0] * len(blocks)
    rows, tau, best = 0, float(n_requests), n_requests / cost[0]
    for negative, r, j in survivals:
        rows, tau = rows + 1, tau - negative
        theta = tau / cost[rows]
        if theta <= best:
            break
        best, prefix[r] = theta, j + 1
    return prefix


def test_algorithm1_equals_the_paper() -> None:
    rng = np.random.default_rng(1)
    for _ in range(500):
        blocks = random_blocks(rng, int(rng.integers(1, 5)))
        cost = jagged_costs(rng, BLOCK * len(blocks))
        n_requests = len(blocks) + int(rng.integers(0, 3))
        assert _policy.algorithm1(blocks, cost, n_requests) == literal_algorithm1(blocks, cost, n_requests)


def test_algorithm1_is_optimal_without_cliffs() -> None:
    """Convex costs: expected tokens per time then rises and falls once, so the early stop misses nothing."""
    rng = np.random.default_rng(2)
    for _ in range(200):
        blocks = random_blocks(rng, 3)
        cost = [float(ms) for ms in 10 + np.cumsum(np.concatenate([[0], np.sort(rng.uniform(0, 4, 12))]))]
        lengths = _policy.algorithm1(blocks, cost, 3)
        tokens = 3 + sum(np.cumprod(b["confidence"])[:n].sum() for b, n in zip(blocks, lengths, strict=True))
        best = max(
            (3 + sum(np.cumprod(b["confidence"])[:n].sum() for b, n in zip(blocks, tuple_, strict=True)))
            / cost[sum(tuple_)]
            for tuple_ in itertools.product(*(range(b["most"] + 1) for b in blocks))
        )
        assert tokens / cost[sum(lengths)] == pytest.approx(best, rel=1e-12)


def test_adaptive_equals_exhaustive_search_where_all_may_be_looked_at() -> None:
    rng = np.random.default_rng(3)
    for _ in range(400):
        blocks = random_blocks(rng, int(rng.integers(1, 4)), is_free=True)
        cost = jagged_costs(rng, BLOCK * len(blocks))
        price = float(rng.uniform(0, 1))
        gain, lengths = _policy.adaptive(blocks, cost, price)
        reached = sum(values(b)[:n].sum() for b, n in zip(blocks, lengths, strict=True))
        assert gain == pytest.approx(reached - price * (cost[sum(lengths)] - cost[0]), abs=1e-9)
        assert gain == pytest.approx(best_prefixes(blocks, cost, price), abs=1e-9)


def test_adaptive_looks_over_a_cliff_that_stops_algorithm1() -> None:
    block = {"confidence": [0.9] * 4, "expected": [0.9] * 4}
    cost = [10.0, 16.0, 16.1, 16.2, 16.3]
    assert _policy.adaptive([block], cost, 0.1)[1] == [4]
    assert _policy.algorithm1([{**block, "most": 4}], [10.0, 20.0, 20.1, 20.2, 20.3], 1) == [0]


def test_adaptive_without_foresight_loses_little_against_its_expectation() -> None:
    """Not free: confidences drawn round their expectation. Better on average than any plan made before they are known,
    worse than knowing all of them."""
    rng = np.random.default_rng(4)
    totals = np.zeros(3)
    for _ in range(600):
        blocks = random_blocks(rng, 2)
        for block in blocks:
            noise = rng.normal(0, 1.5, BLOCK)
            odds = np.array(block["expected"]) / (1.001 - np.array(block["expected"])) * np.exp(noise)
            block["confidence"] = list(odds / (1 + odds))
        cost = jagged_costs(rng, 2 * BLOCK)
        price = float(rng.uniform(0.05, 0.5))
        planned = max(
            itertools.product(*(range(block["most"] + 1) for block in blocks)),
            key=lambda n: (
                sum(values(b, "expected")[:k].sum() for b, k in zip(blocks, n, strict=True))
                - price * (cost[sum(n)] - cost[0])
            ),
        )
        of_plan = sum(values(b)[:k].sum() for b, k in zip(blocks, planned, strict=True))
        totals += [
            of_plan - price * (cost[sum(planned)] - cost[0]),
            _policy.adaptive(blocks, cost, price)[0],
            best_prefixes(blocks, cost, price),
        ]
    assert totals[0] < totals[1] <= totals[2]


def test_equal_prefix_equals_exhaustive_search() -> None:
    rng = np.random.default_rng(5)
    for _ in range(300):
        blocks = random_blocks(rng, int(rng.integers(1, 5)))
        cost = jagged_costs(rng, BLOCK * len(blocks))
        price = float(rng.uniform(0, 1))
        gains = [
            sum(values(block, "expected")[:n].sum() for block in blocks) - price * (cost[n * len(blocks)] - cost[0])
            for n in range(min(block["most"] for block in blocks) + 1)
        ]
        assert gains[_policy.equal_prefix(blocks, cost, price)] == pytest.approx(max(gains), abs=1e-12)


def test_threshold_stops_at_the_first_low_confidence() -> None:
    block = {"confidence": [0.9, 0.5, 0.4, 0.9]}
    assert [_policy.threshold_prefix(block, p) for p in (0, 0.45, 0.5, 0.6, 0.95)] == [4, 2, 2, 1, 0]
    assert _policy.threshold_prefix({**block, "most": 1}, 0.1) == 1


def test_choose_drafting_is_near_the_best_subset() -> None:
    """Which blocks to draft is a search over subsets; two greedy orders find its best nearly always."""
    rng = np.random.default_rng(6)
    n_worse, lost, total = 0, 0.0, 0.0
    for _ in range(300):
        blocks = random_blocks(rng, int(rng.integers(1, 5)))
        cost = jagged_costs(rng, BLOCK * len(blocks))
        draft = [0.0, *np.cumsum(rng.uniform(0, 3, len(blocks)))]
        price = float(rng.uniform(0, 0.5))
        choice = _policy.choose_drafting(blocks, cost, draft, price)
        best = 0.0
        for subset in itertools.product([0, 1], repeat=len(blocks)):
            members = [block for block, is_in in zip(blocks, subset, strict=True) if is_in]
            best = max(best, best_prefixes(members, cost, price, "expected") - price * draft[len(members)])
        members = [block for block, is_in in zip(blocks, choice["is_drafting"], strict=True) if is_in]
        own = best_prefixes(members, cost, price, "expected") - price * draft[len(members)]
        assert choice["gain_tokens"] == pytest.approx(own, abs=1e-9)
        assert choice["gain_tokens"] <= best + 1e-9
        n_worse += choice["gain_tokens"] < best - 1e-9
        lost += best - choice["gain_tokens"]
        total += best
    assert lost <= 0.002 * total


def rate_of(members: list[dict[str, Any]], cost: list[float], draft: list[float], n_requests: int) -> float:
    """Most tokens per ms over all prefixes of blocks that are all drafted."""
    before_ms = draft[len(members)] + sum(block.get("entry_ms", 0.0) for block in members)
    return max(
        (n_requests + sum(values(block, "expected")[:n].sum() for block, n in zip(members, lengths, strict=True)))
        / (cost[sum(lengths)] + before_ms)
        for lengths in itertools.product(*(range(block["most"] + 1) for block in members))
    )


def chosen(blocks: list[dict[str, Any]], is_in: Sequence[int]) -> list[dict[str, Any]]:
    return [block for block, taken in zip(blocks, is_in, strict=True) if taken]


@pytest.mark.parametrize("has_entries", [False, True])
def test_choose_fastest_drafting_is_near_the_best_rate_of_all_subsets(has_entries: bool) -> None:
    rng = np.random.default_rng(8)
    lost, n_drafting = [], 0
    for _ in range(200):
        blocks = [block | {"weight": 1.0} for block in random_blocks(rng, int(rng.integers(1, 4)))]
        if has_entries:
            blocks = [block | {"entry_ms": float(rng.choice([0.0, rng.uniform(0, 8)]))} for block in blocks]
        n_requests = len(blocks) + int(rng.integers(0, 3))
        cost = jagged_costs(rng, BLOCK * len(blocks))
        draft = [0.0, *np.cumsum(rng.uniform(0, 2, len(blocks)))]
        choice = _policy.choose_fastest_drafting(blocks, cost, draft, n_requests)
        subsets = itertools.product([0, 1], repeat=len(blocks))
        best = max(rate_of(chosen(blocks, is_in), cost, draft, n_requests) for is_in in subsets)
        reached = rate_of(chosen(blocks, choice["is_drafting"]), cost, draft, n_requests)
        n_drafting += any(choice["is_drafting"])
        assert choice["tokens_per_ms"] <= best * (1 + 1e-9)
        lost.append(1 - reached / best)
    assert 30 < n_drafting < 190
    assert max(lost) < 0.02
    assert np.mean(lost) < 0.001


def test_an_entry_that_costs_more_than_is_left_to_gain_keeps_a_block_out() -> None:
    block = {"confidence": [0.9] * 4}
    cost, draft = [10.0, 11, 12, 13, 14], [0.0, 2.0, 3.0]
    both = _policy.choose_fastest_drafting([block, block], [10.0 + n for n in range(9)], draft, 2)
    assert list(both["is_drafting"]) == [True, True]
    dear = {**block, "entry_ms": 40.0}
    assert list(_policy.choose_fastest_drafting([dear], cost, draft, 1)["is_drafting"]) == [False]
    one = _policy.choose_fastest_drafting([dear, block], [10.0 + n for n in range(9)], draft, 2)
    assert list(one["is_drafting"]) == [False, True]


def test_choose_drafting_tells_what_parking_avoids() -> None:
    choice = _policy.choose_drafting([{"confidence": [0.1] * 4}], [10.0, 20, 30, 40, 50], [0.0, 5.0], 0.1)
    assert not any(choice["is_drafting"])
    assert (choice["gain_tokens"], choice["n_tokens"], choice["extra_ms"]) == (0, 0.1, 15)


# ---- non-anticipation ----


def decide(policy: str, blocks: list[dict[str, Any]], cost: list[float], price: float) -> list[int]:
    if policy == "threshold":
        return [_policy.threshold_prefix(block, 0.5) for block in blocks]
    if policy == "algorithm1":
        result: list[int] = _policy.algorithm1(blocks, cost, len(blocks))
        return result
    if policy == "equal":
        return [_policy.equal_prefix(blocks, cost, price)] * len(blocks)
    lengths: list[int] = _policy.adaptive(blocks, cost, price)[1]
    return lengths


def anticipations(policy: str, *, is_free: bool = False, n_cases: int = 1200) -> int:
    """How often a slot's fate changes when confidences of its own request after it do."""
    rng = np.random.default_rng(7)
    n_changed = 0
    for _ in range(n_cases):
        blocks = random_blocks(rng, int(rng.integers(1, 4)))
        blocks[0]["most"] = BLOCK
        blocks[0]["is_free"] = is_free
        for block in blocks[1:]:
            block["is_free"] = bool(rng.integers(2))
        cost = jagged_costs(rng, BLOCK * len(blocks))
        price = float(rng.uniform(0, 0.6))
        slot = int(rng.integers(0, BLOCK - 1))
        before = decide(policy, blocks, cost, price)[0] > slot
        later = list(rng.choice([0.0, 0.01, 0.5, 1.0, rng.uniform()], BLOCK - 1 - slot))
        blocks[0]["confidence"] = blocks[0]["confidence"][: slot + 1] + later
        n_changed += (decide(policy, blocks, cost, price)[0] > slot) != before
    return n_changed


@pytest.mark.parametrize("policy", ["threshold", "algorithm1", "adaptive", "equal"])
def test_no_policy_looks_at_later_confidences(policy: str) -> None:
    assert anticipations(policy) == 0


def test_the_property_can_fail() -> None:
    assert anticipations("adaptive", is_free=True, n_cases=1000) > 8


@pytest.mark.parametrize(
    ("rate", "verify_ms", "expected"), [(0.9, 1.0, True), (0.7, 4.5, True), (0.7, 15.0, False), (0.02, 2.0, False)]
)
def test_could_pay_looks_beyond_what_is_expected_but_not_at_wonders(
    rate: float, verify_ms: float, expected: bool
) -> None:
    """0.7 of easier texts is 0.86, 0.02 is 0.05; the plain step takes 10 ms."""
    block = {"most": 7, "expected": [rate] * 7, "confidence": [rate] * 7}
    cost = [10.0 + verify_ms * n for n in range(8)]
    assert _policy.could_pay([block], cost, [0.0, 5.0], 1) == expected
