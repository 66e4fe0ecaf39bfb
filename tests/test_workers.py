"""Threads that share the reading of logits change nothing: neither drafts nor texts, under every rule."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from pairs import greedy, read_prompts, run

N_TOKENS = 40


@pytest.fixture(scope="module")
def pair(demo_target: Path, demo_drafter: Path) -> tuple[_core.Model, _core.Model]:
    target = _core.Model.load_target(str(demo_target))
    return target, _core.Model.load_drafter(str(demo_drafter), target)


def options(temperature: float, **others) -> _core.RequestOptions:
    if temperature == 0:
        return greedy(N_TOKENS, **others)
    return _core.RequestOptions(max_tokens=N_TOKENS, temperature=temperature, seed=7, **others)


CASES = {
    "greedy": options(0),
    "greedy with log-probabilities": options(0, n_logprobs=3),
    "greedy with penalties": options(0, repetition_penalty=1.3, presence_penalty=0.4),
    "sampled, exact": options(1.0, verification="exact"),
    "sampled, block": options(0.8, verification="block", top_p=0.9),
    "sampled, rejection": options(1.0, verification="rejection", top_k=20),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_parallel", [1, 3, 9])
def test_workers_change_nothing(pair: tuple[_core.Model, _core.Model], case: str, n_parallel: int) -> None:
    target, drafter = pair
    prompts = [target.tokenize(text) for text in read_prompts(9)]

    def answers(n_workers: int, head: str) -> list[tuple[list[int], int, int]]:
        engine = _core.Engine(
            target,
            drafter,
            n_ctx=512,
            n_parallel=n_parallel,
            prefix_reuse=False,
            policy="full",
            head=head,
            n_workers=n_workers,
        )
        done = run(engine, prompts, lambda _: CASES[case])
        return [(answer.tokens, answer.stats.n_accepted, answer.stats.n_rounds) for answer in done]

    alone = answers(1, "candidates")
    assert any(n_accepted > 0 for _, n_accepted, _ in alone)
    assert answers(4, "candidates") == alone
    assert answers(4, "full") == answers(1, "full")


def test_a_number_of_workers_is_checked(pair: tuple[_core.Model, _core.Model]) -> None:
    with pytest.raises(ValueError, match=r"n_workers must be in -1 \.\. 512, got -2"):
        _core.Engine(*pair, n_ctx=64, n_workers=-2)
