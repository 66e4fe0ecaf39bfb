"""Targets with recurrent layers: their states go back with rejected drafts, so the text is that of plain decoding.

Random weights: what the models say means nothing, but every state that is off by one row changes it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import ModelMismatchError, _core
from dspark_cpp.bench.random_pair import write_random_drafter
from hybrid_models import N_VOCAB, write_hybrid_target
from pairs import Answer, Plain, count_complete, exact_engine, greedy, run, run_plain

BLOCK, N_TOKENS = 7, 40
# A hundred times the largest difference seen between a row alone and the same row in another pass.
MARGIN = 1e-3
LENGTHS = (5, 23, 1, 40, 9, 2)


@dataclass(frozen=True)
class Hybrid:
    target: _core.Model
    drafter: _core.Model
    prompts: list[list[int]]
    plain: list[Plain]

    def engine(self, **options: Any) -> _core.Engine:
        return exact_engine(self.target, self.drafter, **{"n_ctx": 256} | options)

    def scripted(self, mode: str, n_parallel: int) -> _core.Engine:
        scripts = [prompt + text.tokens for prompt, text in zip(self.prompts, self.plain, strict=True)]
        options = {"block_size": BLOCK, "n_ctx": 256, "kv_type": "f32", "n_parallel": n_parallel}
        return _core._testing.scripted_engine(self.target, scripts, mode, **options)

    def check(self, answers: Sequence[Answer]) -> None:
        assert count_complete(self.plain, answers, MARGIN) >= 0.8


@pytest.fixture(scope="module", params=["lfm2", "lfm2 with a window", "nemotron_h", "qwen35"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Hybrid:
    folder = tmp_path_factory.mktemp(request.param)
    architecture, _, has_window = request.param.partition(" ")
    path = write_hybrid_target(folder / "target.gguf", architecture, window=16 if has_window else 0)
    write_random_drafter(folder / "drafter.gguf", path, "f16", block_size=BLOCK)
    target = _core.Model.load_target(str(path))
    drafter = _core.Model.load_drafter(str(folder / "drafter.gguf"), target)
    draw = random.Random(7)
    prompts = [[draw.randrange(N_VOCAB - 1) for _ in range(n)] for n in LENGTHS]
    return Hybrid(target, drafter, prompts, run_plain(target, prompts, N_TOKENS, n_ctx=256))


def test_texts_say_something(hybrid: Hybrid) -> None:
    """Otherwise the comparisons below would compare little."""
    assert sum(text.n_safe(MARGIN) for text in hybrid.plain) >= 0.9 * sum(len(text.tokens) for text in hybrid.plain)
    assert all(len(set(text.tokens)) > 5 for text in hybrid.plain if len(text.tokens) == N_TOKENS)
    assert len({tuple(text.tokens) for text in hybrid.plain}) == len(hybrid.plain)


@pytest.mark.parametrize("n_parallel", [1, 4])
@pytest.mark.parametrize("mode", ["right", "wrong", "alternating"])
def test_text_is_the_same_whatever_is_accepted(hybrid: Hybrid, mode: str, n_parallel: int) -> None:
    engine = hybrid.scripted(mode, n_parallel)
    answers = run(engine, hybrid.prompts, lambda i: greedy(N_TOKENS))
    hybrid.check(answers)
    n_scheduled, n_accepted = engine.stats.n_scheduled, engine.stats.n_accepted
    assert n_scheduled > 0
    assert {"right": n_accepted > 0.8 * n_scheduled, "wrong": n_accepted == 0}.get(mode, 0 < n_accepted < n_scheduled)


# A threshold of random confidences cuts every block elsewhere; requests come and go, so prompts stand beside rounds.
@pytest.mark.parametrize(("policy", "n_parallel"), [("full", 1), ("full", 4), ("fixed:2", 3), ("threshold:0.4", 4)])
def test_text_is_the_same_with_a_drafter(hybrid: Hybrid, policy: str, n_parallel: int) -> None:
    engine = hybrid.engine(policy=policy, n_parallel=n_parallel, n_batch=16)
    hybrid.check(run(engine, hybrid.prompts, lambda i: greedy(N_TOKENS)))
    assert engine.stats.n_scheduled > 0


def test_sampled_text_is_the_same(hybrid: Hybrid) -> None:
    options = [
        _core.RequestOptions(max_tokens=N_TOKENS, temperature=1.0, top_k=20, seed=i, verification="exact")
        for i in range(len(LENGTHS))
    ]
    plain = run(exact_engine(hybrid.target, n_ctx=256), hybrid.prompts, lambda i: options[i], has_drafter=False)
    answers = run(hybrid.engine(policy="full", n_parallel=4), hybrid.prompts, lambda i: options[i])
    # A draw can fall on either side of a step of the cumulative sum that rounding moves: at most one text does.
    assert sum(a.tokens != b.tokens for a, b in zip(plain, answers, strict=True)) <= 1


def test_cancelled_requests_leave_nothing_behind(hybrid: Hybrid) -> None:
    """Cancels in every phase, in changing places: whoever comes next starts from an empty state."""
    engine = hybrid.engine(policy="full", n_parallel=2, n_batch=16)
    draw = random.Random(3)
    answers: dict[int, Answer] = {}
    of: dict[int, int] = {}
    for _ in range(30):
        i = draw.randrange(len(LENGTHS))
        request = engine.submit(hybrid.prompts[i], greedy(N_TOKENS))
        answers[request], of[request] = Answer(), i
        for _ in range(draw.randrange(12)):
            for event in engine.step():
                answers[event.request_id].add(event)
        engine.cancel(draw.choice(list(answers)))
    while engine.has_work:
        for event in engine.step():
            answers[event.request_id].add(event)
    cut = 0
    for request, answer in answers.items():
        plain = hybrid.plain[of[request]]
        n = min(plain.n_safe(MARGIN), len(answer.tokens))
        assert answer.tokens[:n] == plain.tokens[:n]
        cut += answer.finish_reason == "cancelled"
    assert 5 <= cut <= 28


def test_features_are_those_of_the_request_alone(hybrid: Hybrid) -> None:
    """Passes are split and their rows reordered: confidences show whether the drafter still sees its own rows."""
    alone, together = (
        run_traced(hybrid.engine(policy="full", n_parallel=n, n_batch=16), hybrid.prompts) for n in (1, 4)
    )
    n_compared = 0
    for one, other in zip(alone, together, strict=True):
        for position, logits in one.items():
            if position in other and logits and other[position]:  # a request that ends leaves the others plain
                # f32 caches and weights in f16: the same sums in another order.
                assert other[position] == pytest.approx(logits, abs=2e-3)
                n_compared += 1
    assert n_compared > 40


def run_traced(engine: _core.Engine, prompts: Sequence[list[int]]) -> list[dict[int, list[float]]]:
    """Return the confidences of each request's rounds by the number of tokens before them."""
    requests = [engine.submit(prompt, greedy(16, trace=True, ignore_eos=True)) for prompt in prompts]
    rounds: dict[int, dict[int, list[float]]] = {request: {} for request in requests}
    n_tokens = dict.fromkeys(requests, 0)
    while engine.has_work:
        for event in engine.step():
            for record in event.rounds:
                rounds[event.request_id][n_tokens[event.request_id]] = list(record.confidence_logits)
            n_tokens[event.request_id] += len(event.tokens)
    return list(rounds.values())


def test_the_next_turn_goes_on_from_the_state(hybrid: Hybrid) -> None:
    """A state cannot be cut, but a prompt that goes on where a request ended finds all of it, and another one none."""
    engine = hybrid.engine(policy="full", n_parallel=2, prefix_reuse=True)
    text = hybrid.prompts[1]
    n_held = 0
    for _ in range(4):
        [plain] = run_plain(hybrid.target, [text], 12, n_ctx=256)
        [answer] = run(engine, [text], lambda i: greedy(12))
        assert answer.stats.n_reused == n_held
        n = plain.n_safe(MARGIN)
        assert answer.tokens[:n] == plain.tokens[:n]
        text = [*text, *answer.tokens]
        n_held = len(text) - (answer.finish_reason == "length")
        text += [3, 4]
    [other] = run(engine, [text[:30]], lambda i: greedy(12))
    assert other.stats.n_reused == 0


def test_costs_can_be_measured(hybrid: Hybrid) -> None:
    """Passes longer than the states go back are timed too."""
    engine = hybrid.engine(policy="adaptive", n_parallel=2)
    curves = engine.measure_costs(budget_ms=1e6)  # a machine that stands still meanwhile leaves no size out
    assert max(size for size, _ in curves["verify"]) == 2 * (BLOCK + 1)
    assert curves["draft"]
    hybrid.check(run(engine, hybrid.prompts, lambda i: greedy(N_TOKENS)))


def test_states_are_counted(hybrid: Hybrid) -> None:
    """Each request keeps the states of a block; without a drafter only the newest."""
    plain, speculating = exact_engine(hybrid.target, n_ctx=64), hybrid.engine(n_ctx=64)
    assert speculating.memory_bytes["target_context"] > plain.memory_bytes["target_context"]


def test_small_batches_hold_a_round(hybrid: Hybrid) -> None:
    """llama.cpp would abort on a pass that cannot hold the rows whose states are kept."""
    engine = hybrid.engine(policy="full", n_batch=1)
    hybrid.check(run(engine, hybrid.prompts, lambda i: greedy(N_TOKENS)))


def test_states_that_cannot_go_back_are_refused(tmp_path: Path) -> None:
    """llama.cpp keeps no older states of qwen3next, which is otherwise much like qwen35."""
    path = write_hybrid_target(tmp_path / "target.gguf", "qwen3next")
    write_random_drafter(tmp_path / "drafter.gguf", path, "f16", block_size=BLOCK)
    target = _core.Model.load_target(str(path))
    assert not target.can_roll_back
    with pytest.raises(ModelMismatchError, match=r"qwen3next keeps a recurrent state that llama.cpp cannot take back"):
        _core.Model.load_drafter(str(tmp_path / "drafter.gguf"), target)
