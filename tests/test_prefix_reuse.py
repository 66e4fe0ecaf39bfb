"""Prefix reuse in both caches of real models: the same text, less computed, nothing left over from others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import LLM, SamplingParams, _core
from pairs import Plain, exact_engine, greedy, run, run_plain

BOUND = 1e-3  # what rounding may do to the logits of a row that was computed in another batch, with room to spare
N_TOKENS = 24


@pytest.fixture(scope="module")
def make_engine(target: _core.Model, drafter: _core.Model) -> Callable[..., _core.Engine]:
    return lambda **options: exact_engine(
        target, drafter, **{"n_ctx": 512, "n_parallel": 1, "prefix_reuse": True} | options
    )


def check_text(plain: Plain, tokens: list[int]) -> bool:
    """Compare up to the first decision that rounding may turn; True: to the end."""
    n = plain.n_safe(BOUND)
    assert tokens[:n] == plain.tokens[:n]
    return n == len(plain.tokens)


def test_same_prompt_again_computes_one_token(
    make_engine: Callable[..., _core.Engine], target: _core.Model, prompts: list[list[int]]
) -> None:
    engine = make_engine()
    plain = run_plain(target, prompts, N_TOKENS)
    n_complete = 0
    for prompt, text in zip(prompts, plain, strict=True):
        for n_times in range(3):
            [answer] = run(engine, [prompt], lambda i: greedy(N_TOKENS))
            assert answer.stats.n_reused == len(prompt) - 1 or n_times == 0
            n_complete += check_text(text, answer.tokens)
    assert n_complete >= 0.5 * 3 * len(prompts)
    total = engine.stats
    assert total.n_prefill_tokens + total.n_reused == 3 * sum(map(len, prompts))


@pytest.mark.parametrize("draft_window", [512, 32])
def test_turns_of_a_chat(
    make_engine: Callable[..., _core.Engine], target: _core.Model, prompts: list[list[int]], draft_window: int
) -> None:
    """Each turn finds all of the last one but its newest token, drafter's rows included."""
    engine = make_engine(draft_window=draft_window)
    text = prompts[0]
    n_held = n_accepted = 0
    for turn in range(5):
        [answer] = run(engine, [text], lambda i: greedy(N_TOKENS, ignore_eos=True))
        [alone] = run(
            make_engine(prefix_reuse=False), [text], lambda i: greedy(N_TOKENS, ignore_eos=True, n_logprobs=2)
        )
        [plain] = run_plain_open(target, text)
        check_text(plain, answer.tokens)
        check_text(plain, alone.tokens)
        assert answer.stats.n_reused == n_held
        n_accepted += answer.stats.n_accepted - alone.stats.n_accepted
        text = text + answer.tokens
        n_held = len(text) - 1
        text = text + prompts[turn + 1][:12]
    if draft_window == 512:  # the drafter saw the same context, so it drafts as well
        assert abs(n_accepted) <= 5


def run_plain_open(target: _core.Model, prompt: list[int]) -> list[Plain]:
    answers = run(
        exact_engine(target, n_ctx=512), [prompt], lambda i: greedy(N_TOKENS, n_logprobs=2, ignore_eos=True), False
    )
    return [Plain(a.tokens, [e.top[0][1] - e.top[1][1] for e in a.logprobs], str(a.finish_reason)) for a in answers]


def test_shared_system_prompt(
    make_engine: Callable[..., _core.Engine], target: _core.Model, prompts: list[list[int]]
) -> None:
    """Requests run together over one system prompt that only the first of them computed."""
    system = prompts[1] + prompts[2]
    asked = [system + prompt[1:] for prompt in prompts[3:]]
    engine = make_engine(n_parallel=4)
    run(engine, [system], lambda i: greedy(4))
    answers = run(engine, asked, lambda i: greedy(N_TOKENS))
    assert all(answer.stats.n_reused >= len(system) for answer in answers)
    plain = run_plain(target, asked, N_TOKENS)
    n_complete = sum(check_text(text, answer.tokens) for text, answer in zip(plain, answers, strict=True))
    assert n_complete > 0
    assert engine.stats.n_accepted > 0


def test_cancelled_prompt_is_not_lost(make_engine: Callable[..., _core.Engine]) -> None:
    engine = make_engine(n_batch=64)
    prompt = [1 + i % 50 for i in range(300)]
    engine.cancel(engine.submit(prompt, greedy(2)))
    engine.step()  # still in the queue
    request = engine.submit(prompt, greedy(2))
    engine.step()
    engine.step()
    engine.cancel(request)
    engine.step()
    [answer] = run(engine, [prompt], lambda i: greedy(2))
    assert answer.stats.n_reused == 128


@pytest.mark.parametrize("n_parallel", [1, 3])
def test_no_state_leaks_between_requests(
    make_engine: Callable[..., _core.Engine], target: _core.Model, prompts: list[list[int]], n_parallel: int
) -> None:
    """Many short requests that begin alike, in changing slots, some cancelled, some without drafts."""
    chance = random.Random(5)
    engine = make_engine(n_parallel=n_parallel, prefill_chunk=5)
    variants = [prompts[i % 4][: 3 + 4 * i] + prompts[4 + i % 4][: i % 3] for i in range(12)]
    plain = run_plain(target, variants, 10)
    asked: dict[int, int] = {}
    texts: dict[int, list[int]] = {}
    ended: dict[int, str | None] = {}

    def step() -> None:
        for event in engine.step():
            texts.setdefault(event.request_id, []).extend(event.tokens)
            ended[event.request_id] = event.finish_reason

    for _ in range(150):
        variant = chance.randrange(len(variants))
        options = greedy(chance.randint(1, 10), draft_limit=chance.choice([-1, -1, -1, 0]))
        asked[engine.submit(variants[variant], options)] = variant
        for _ in range(chance.randrange(3)):
            step()
        if chance.random() < 0.2:
            engine.cancel(chance.choice(list(asked)[-4:]))
    while engine.has_work:
        step()
    for request, variant in asked.items():
        n = min(plain[variant].n_safe(BOUND), len(texts[request]))
        assert texts[request][:n] == plain[variant].tokens[:n]
    assert set(ended.values()) <= {"stop", "length", "cancelled"}
    assert sum(reason != "cancelled" for reason in ended.values()) > 100
    assert engine.stats.n_reused > 0.2 * engine.stats.n_prefill_tokens


def test_measuring_costs_forgets_what_is_idle(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine()
    [first] = run(engine, prompts[:1], lambda i: greedy(8))
    engine.measure_costs(budget_ms=50)
    [again] = run(engine, prompts[:1], lambda i: greedy(8))
    assert again.stats.n_reused == 0
    assert again.tokens == first.tokens


def test_llm_reports_and_switches_off(f32_target: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for prefix_reuse in (True, False):
        with LLM(f32_target, n_ctx=128, n_threads=1, costs="none", prefix_reuse=prefix_reuse) as llm:
            first, again = (llm.generate("One two three", params)[0] for _ in range(2))
            assert first.stats.n_reused == 0
            assert again.stats.n_reused == (again.stats.n_prompt - 1 if prefix_reuse else 0)
            assert again.token_ids == first.token_ids
