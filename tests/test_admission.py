"""Prompts in chunks beside requests that decode: bounded, fair, and without a trace in the text."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from pairs import count_complete, exact_engine, greedy, run, run_plain

CHUNK = 32
LONG = [1 + i % 50 for i in range(400)]


@pytest.fixture(scope="module")
def make_engine(target: _core.Model, drafter: _core.Model) -> Callable[..., _core.Engine]:
    return lambda **options: exact_engine(target, drafter, **{"n_ctx": 512, "prefill_chunk": CHUNK} | options)


def n_cached(engine: _core.Engine, request: int) -> int:
    return next(position + 1 for one, position, _ in engine.cache_positions() if one == request)


def start_decoding(engine: _core.Engine, prompt: list[int], max_tokens: int) -> int:
    request: int = engine.submit(prompt, greedy(max_tokens, ignore_eos=True))
    while engine.stats.n_committed == 0:
        engine.step()
    return request


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(n_parallel=2)
    decoding = start_decoding(engine, prompts[0], 200)
    long = engine.submit(LONG, greedy(2, ignore_eos=True))
    for n_chunks in range(1, 7):
        assert decoding in {event.request_id for event in engine.step() if event.tokens}
        assert n_cached(engine, long) == n_chunks * CHUNK
    engine.cancel(decoding)
    engine.step()  # nobody decodes now: all that is left, in one pass
    assert n_cached(engine, long) == len(LONG)


def test_a_short_prompt_does_not_wait_behind_a_long_one(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(n_parallel=3)
    start_decoding(engine, prompts[0], 200)
    long = engine.submit(LONG, greedy(2, ignore_eos=True))
    short = engine.submit(prompts[1][: CHUNK // 2], greedy(2, ignore_eos=True))
    assert short in {event.request_id for event in engine.step() if event.tokens}
    assert n_cached(engine, long) == CHUNK // 2


def test_everyone_has_a_turn_when_rows_are_fewer_than_prompts(make_engine: Callable[..., _core.Engine]) -> None:
    engine = make_engine(n_parallel=4, prefill_chunk=1)
    start_decoding(engine, [1, 2, 3], 200)
    waiting = [engine.submit(LONG, greedy(2)) for _ in range(3)]
    for _ in range(6):
        engine.step()
    assert [n_cached(engine, request) for request in waiting] == [2, 2, 2]


@pytest.mark.parametrize("prefill_chunk", [1, 7, 64])
def test_text_is_the_same_with_every_chunk(
    target: _core.Model, make_engine: Callable[..., _core.Engine], prompts: list[list[int]], prefill_chunk: int
) -> None:
    plain = run_plain(target, prompts, 24)
    engine = make_engine(n_parallel=3, prefill_chunk=prefill_chunk)
    answers = run(engine, prompts, lambda i: greedy(24))
    assert count_complete(plain, answers, 1e-3) > 0.5
    assert engine.stats.n_prefill_tokens == sum(map(len, prompts))


def test_chunk_must_hold_a_row(make_engine: Callable[..., _core.Engine]) -> None:
    with pytest.raises(ValueError, match="prefill_chunk must be at least 1, got 0"):
        make_engine(prefill_chunk=0)
