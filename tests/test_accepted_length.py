"""Accepted length against the PyTorch reference loop on the same prompts (tests/data/demo_pair/accepted_lengths.json).

At T = 1 the two loops draw different random numbers, so the means are compared within their joint standard error: 4 of
it, a false alarm in about 1 of 15,000 comparisons, and the seeds are fixed. At T = 0 both draft and verify the same
tokens but for near-ties: 2 %.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from dspark_cpp import LLM, SamplingParams
from pairs import DATA

DOMAINS = ("arithmetic", "code", "chat")
REFERENCE = DATA / "accepted_lengths.json"


def load_reference(temperature: float, rule: str, domain: str) -> dict[str, float]:
    rows = json.loads(REFERENCE.read_text())["vanilla"]["results"]
    key = (temperature, rule, domain)
    return next(row for row in rows if (row["temperature"], row["rule"], row["domain"]) == key)


def load_prompts(domain: str) -> tuple[list[str], int]:
    """Return the prompts the reference was measured on, and its token limit."""
    settings = json.loads(REFERENCE.read_text())["vanilla"]
    prompts = json.loads((DATA / "prompts.json").read_text())["prompts"]
    texts = [prompt["text"] for prompt in prompts if prompt["domain"] == domain]
    return texts[: settings["n_prompts"]], settings["max_tokens"]


def measure(llm: LLM, texts: list[str], params: list[SamplingParams]) -> tuple[float, float]:
    """Return the pooled committed tokens per round and its standard error over prompts (ratio estimator)."""
    stats = [answer.stats for answer in llm.generate(texts, params) if answer.stats.n_rounds]
    n_rounds = sum(s.n_rounds for s in stats)
    ratio = sum(s.n_committed for s in stats) / n_rounds
    spread = sum((s.n_committed - ratio * s.n_rounds) ** 2 for s in stats)
    return ratio, math.sqrt(spread * len(stats) / max(len(stats) - 1, 1)) / n_rounds


@pytest.fixture(scope="module")
def pair(f32_target: Path, f32_drafter: Path) -> Any:
    # The 64 largest U of each slot, as the reference: the graph form knows no others.
    with LLM(
        f32_target, f32_drafter, n_ctx=768, n_parallel=4, kv_type="f32", head="graph", n_candidates=64, policy="full"
    ) as llm:
        yield llm


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("rule", ["block", "rejection"])
def test_accepted_length_when_sampling_equals_reference(pair: LLM, rule: str, domain: str) -> None:
    reference = load_reference(1.0, rule, domain)
    texts, max_tokens = load_prompts(domain)
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=i, verification=rule) for i in range(len(texts))
    ]
    ratio, error = measure(pair, texts, params)
    joint = math.hypot(error, reference["standard_error"])
    print(f"{domain} {rule}: {ratio:.3f} +- {error:.3f}, reference {reference['accepted_length']:.3f}")
    assert abs(ratio - reference["accepted_length"]) < 4 * joint


@pytest.mark.parametrize("domain", DOMAINS)
def test_accepted_length_when_greedy_equals_reference(pair: LLM, domain: str) -> None:
    reference = load_reference(0.0, "exact", domain)
    texts, max_tokens = load_prompts(domain)
    ratio, _ = measure(pair, texts, [SamplingParams(max_tokens=max_tokens, temperature=0.0)] * len(texts))
    print(f"{domain} greedy: {ratio:.3f}, reference {reference['accepted_length']:.3f}")
    assert ratio == pytest.approx(reference["accepted_length"], rel=0.02)


def test_default_candidates_lose_nothing_to_the_full_vocabulary(f32_target: Path, f32_drafter: Path) -> None:
    params = SamplingParams(max_tokens=96, temperature=0.0)
    texts = [text for domain in DOMAINS for text in load_prompts(domain)[0]]
    lengths = []
    for head in ("full", "candidates"):
        with LLM(f32_target, f32_drafter, n_ctx=768, n_parallel=4, kv_type="f32", head=head, policy="full") as llm:
            lengths.append(measure(llm, texts, [params] * len(texts))[0])
    print(f"full vocabulary {lengths[0]:.4f}, candidates {lengths[1]:.4f}")
    assert lengths[1] > 0.995 * lengths[0]
