"""The engine through the bindings, on the trained pair in 32-bit floats: figures, events, threads, sampling options."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import EngineClosedError, QueueFullError, _core
from pairs import Answer, exact_engine, greedy, run

N_PROMPTS, N_TOKENS = 8, 24
RULES = ("exact", "rejection", "block")


@pytest.fixture(scope="module")
def make_engine(target: _core.Model, drafter: _core.Model) -> Callable[..., _core.Engine]:
    return lambda **options: exact_engine(target, drafter, **{"n_ctx": 512, "n_parallel": 4} | options)


def sampled(**options: Any) -> _core.RequestOptions:
    return _core.RequestOptions(**{"max_tokens": N_TOKENS, "seed": 5, "ignore_eos": True} | options)


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


# ---- figures ----


@pytest.mark.parametrize("n_parallel", [1, 4])
def test_figures_add_up(make_engine: Callable[..., _core.Engine], prompts: list[list[int]], n_parallel: int) -> None:
    engine = make_engine(n_parallel=n_parallel)
    answers = run(engine, prompts, lambda i: greedy(N_TOKENS))
    for answer, prompt in zip(answers, prompts, strict=True):
        stats = answer.stats
        assert stats.n_prompt == len(prompt)
        # The first token comes with the prompt; a round counts an end-of-text token, which is not in the text.
        has_end = answer.finish_reason == "stop"
        assert stats.n_committed == len(answer.tokens) - 1 + has_end
        assert sum(stats.accepted_per_position) == stats.n_accepted <= stats.n_scheduled <= stats.n_drafted
        assert sum(stats.scheduled_per_position) == stats.n_scheduled
        assert stats.n_drafted <= 7 * stats.n_rounds
        assert sorted(stats.accepted_per_position, reverse=True) == stats.accepted_per_position  # prefixes
        n_drafts_in_text = sum(answer.drafted)
        assert n_drafts_in_text == stats.n_accepted or (has_end and n_drafts_in_text < stats.n_accepted)
        assert has_end or stats.n_committed == stats.n_accepted + stats.n_rounds
        assert min(stats.queue_ms, stats.prefill_ms, stats.draft_ms, stats.verify_ms, stats.host_ms) >= 0
        assert stats.prefill_ms > 0
        assert stats.verify_ms > 0
    total = engine.stats
    for name in ("n_drafted", "n_scheduled", "n_accepted", "n_committed"):
        assert getattr(total, name) == sum(getattr(answer.stats, name) for answer in answers)
    assert total.n_prefill_tokens == sum(map(len, prompts))
    assert 0 < total.n_prefill_steps < total.n_steps
    assert min(total.draft_ms, total.verify_ms, total.inject_ms, total.host_ms) > 0


def test_steps_that_read_prompts_are_counted_apart(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine()
    run(engine, prompts, lambda i: greedy(1))
    total = engine.stats
    assert total.n_prefill_steps == total.n_steps > 0
    assert total.prefill_ms > 0
    assert total.verify_ms == total.draft_ms == total.host_ms == 0
    run(engine, prompts[:1], lambda i: greedy(N_TOKENS))
    assert engine.stats.n_steps - engine.stats.n_prefill_steps > 1
    assert engine.stats.verify_ms > 0


def test_prompts_are_priced_by_their_length(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> None:
    """The step that ends a prompt goes on with its last row alone; its time is that of the whole prompt."""
    engine = make_engine(n_parallel=1, prefix_reuse=False)
    prompt = (prompts[0] * 30)[:30]
    run(engine, [prompt] * 20, lambda i: greedy(4))
    assert [size for size, _ in engine.costs["prefill"]] == [30]


def test_only_the_last_event_has_a_reason(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> None:
    """`Answer.add` asserts that nothing follows the last event; every step yields at most one event a request."""
    answers = run(make_engine(), prompts, lambda i: greedy(1 + i, ignore_eos=True))
    assert [answer.finish_reason for answer in answers] == ["length"] * N_PROMPTS
    assert [len(answer.tokens) for answer in answers] == list(range(1, N_PROMPTS + 1))
    assert all(answer.n_events <= 1 + answer.stats.n_rounds for answer in answers)
    assert all(answer.error == "" for answer in answers)


def test_plain_engine_drafts_nothing(target: _core.Model, prompts: list[list[int]]) -> None:
    engine = exact_engine(target, n_ctx=512, n_parallel=4)
    answers = run(engine, prompts, lambda i: greedy(N_TOKENS), has_drafter=False)
    assert engine.stats.n_drafted == engine.stats.draft_ms == 0
    assert all(answer.stats.accepted_per_position == [] for answer in answers)
    assert not any(any(answer.drafted) for answer in answers)
    assert engine.memory_bytes["draft_context"] == 0


def test_counts_follow_the_requests(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> None:
    engine = make_engine(n_parallel=2)
    for prompt in prompts[:3]:
        engine.submit(prompt, greedy(N_TOKENS, ignore_eos=True))
    assert (engine.n_running, engine.n_queued, engine.has_work) == (0, 3, True)
    engine.step()
    assert (engine.n_running, engine.n_queued) == (2, 1)
    while engine.has_work:
        engine.step()
    assert (engine.n_running, engine.n_queued) == (0, 0)
    assert engine.step() == []
    assert engine.cache_positions() == []


# ---- cancel and close ----


def test_cancel_takes_effect_within_a_step(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> None:
    """One request in decode, one in prefill (a long prompt in chunks), one still in the queue."""
    engine = make_engine(n_parallel=2, n_batch=16)
    decoding = engine.submit(prompts[0][:8], greedy(1000, ignore_eos=True))
    while not engine.cache_positions() or engine.stats.n_committed == 0:
        engine.step()
    n_before = engine.stats.n_committed
    prefilling = engine.submit([1] * 400, greedy(10))
    queued = engine.submit(prompts[1], greedy(10))
    engine.step()
    assert (engine.n_running, engine.n_queued) == (2, 1)
    assert all(engine.cancel(request) for request in (decoding, prefilling, queued))
    events = engine.step()
    assert {event.request_id for event in events} == {decoding, prefilling, queued}
    assert {event.finish_reason for event in events} == {"cancelled"}
    assert {event.request_id: event.stats.n_prompt for event in events if event.stats}[prefilling] == 400
    assert max(event.stats.n_committed for event in events if event.stats) >= n_before > 0
    assert (engine.has_work, engine.n_running) == (False, 0)
    assert not engine.cancel(decoding)


def test_slots_of_cancelled_requests_are_clean(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(n_parallel=1)
    engine.cancel(engine.submit(prompts[1], greedy(100)))
    first = engine.submit(prompts[2], greedy(100, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    assert [event.finish_reason for event in engine.step()] == ["cancelled"]
    assert tokens_of(run(engine, [prompts[0]], lambda i: greedy(8))) == tokens_of(
        run(make_engine(n_parallel=1), [prompts[0]], lambda i: greedy(8))
    )


def test_close_during_a_step_waits_for_it(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> None:
    engine = make_engine(n_parallel=1)
    engine.submit(prompts[0], greedy(400, ignore_eos=True))
    started = threading.Event()
    ends: list[str] = []

    def step_on() -> None:
        try:
            while True:
                engine.step()
                started.set()
        except EngineClosedError as error:
            ends.append(str(error))

    thread = threading.Thread(target=step_on)
    thread.start()
    assert started.wait(30)
    engine.close()
    thread.join(30)
    assert ends == ["cannot step: the engine is closed"]


# ---- threads ----


def test_other_threads_run_during_a_step(make_engine: Callable[..., _core.Engine]) -> None:
    """A step over a prompt of 2000 rows takes far longer than a thread waits for its turn (5 ms)."""
    engine = make_engine(n_ctx=2048, n_batch=2048, n_parallel=1)
    engine.submit([1 + i % 50 for i in range(2000)], greedy(1))
    n_ticks = 0
    is_stepping = threading.Event()
    is_over = threading.Event()

    def tick() -> None:
        nonlocal n_ticks
        is_stepping.wait()
        while not is_over.wait(0.001):
            n_ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    is_stepping.set()
    engine.step()
    n_ticks_during = n_ticks
    is_over.set()
    thread.join()
    # Without the release it could run before or after, not during: a tick or two.
    assert n_ticks_during >= 5


def test_many_threads_submit_while_one_steps(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    engine = make_engine(max_queue=4)
    submitted: dict[int, int] = {}
    lock = threading.Lock()

    def submit_on(first: int) -> None:
        for i in range(first, 40, 4):
            while True:
                try:
                    request = engine.submit(prompts[i % N_PROMPTS], greedy(1 + i % 5, ignore_eos=True))
                except QueueFullError:
                    continue
                break
            with lock:
                submitted[request] = i

    threads = [threading.Thread(target=submit_on, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    texts: dict[int, list[int]] = {}
    n_finished = 0
    while n_finished < 40:
        for event in engine.step():
            texts.setdefault(event.request_id, []).extend(event.tokens)
            n_finished += event.finish_reason == "length"
    for thread in threads:
        thread.join()
    assert set(texts) == set(submitted)
    assert all(len(text) == 1 + submitted[request] % 5 for request, text in texts.items())
    # Requests with one prompt begin alike, whoever sent them and whenever.
    starts = {(submitted[request] % N_PROMPTS, text[0]) for request, text in texts.items()}
    assert len(starts) == N_PROMPTS


# ---- sampling ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.3, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"temperature": 1.3, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "penalty_window": 8},
        {"temperature": 0.0},
    ],
    ids=["plain", "truncated", "penalties", "window", "greedy"],
)
def test_every_rule_runs_with_every_option(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], rule: str, options: dict[str, Any]
) -> None:
    engine = make_engine()
    first = run(engine, prompts, lambda i: sampled(verification=rule, **options))
    again = run(engine, prompts, lambda i: sampled(verification=rule, **options))
    other = run(engine, prompts, lambda i: sampled(verification=rule, **options | {"seed": 6}))
    assert {answer.finish_reason for answer in first} == {"length"}
    assert engine.stats.n_accepted > 0
    # The same requests in the same order make the same batches: the very same numbers.
    assert tokens_of(first) == tokens_of(again)
    assert (tokens_of(first) == tokens_of(other)) == (options["temperature"] == 0)


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_neighbours_do_not_change_a_sampled_text(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], rule: str
) -> None:
    """Each request draws from its own stream.

    In a batch of another size the probabilities differ by some 1e-5, and a draw or an acceptance test that falls
    into that gap may go the other way: about one in 10^4 of them. Of 8 texts with some 60 such decisions each, one may
    therefore differ; were the streams mixed up, all would.
    """
    alone = [run(make_engine(n_parallel=1), [p], lambda i: sampled(verification=rule))[0] for p in prompts]
    together = run(make_engine(n_parallel=8), prompts, lambda i: sampled(verification=rule))
    n_same = sum(a.tokens == b.tokens for a, b in zip(alone, together, strict=True))
    assert n_same >= len(prompts) - 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_logit_bias_bans_and_forces(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], rule: str, temperature: float
) -> None:
    def pick(bias: dict[int, float]) -> _core.RequestOptions:
        return sampled(verification=rule, temperature=temperature, logit_bias=bias)

    [free] = run(make_engine(), prompts[:1], lambda i: pick({}))
    banned = dict.fromkeys(free.tokens[:10], -1e9)
    [without] = run(make_engine(), prompts[:1], lambda i: pick(banned))
    assert not set(without.tokens) & set(banned)
    assert len(without.tokens) == N_TOKENS
    [forced] = run(make_engine(), prompts[:1], lambda i: pick({77: 100.0}))
    assert forced.tokens == [77] * N_TOKENS


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2.0, "frequency_penalty": 2.0}, {"repetition_penalty": 50.0}])
def test_penalties_stop_repetition(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], penalty: dict[str, float]
) -> None:
    """A token that a bias of 25 makes all but certain is repeated without penalties and not for long with them."""
    free, fined = (
        run(make_engine(), prompts[:4], lambda i, p=p: greedy(N_TOKENS, ignore_eos=True, logit_bias={77: 25.0}, **p))
        for p in ({}, penalty)
    )
    assert sum(answer.tokens.count(77) for answer in fined) < sum(answer.tokens.count(77) for answer in free)
    assert sum(len(set(answer.tokens)) for answer in fined) > sum(len(set(answer.tokens)) for answer in free)


@pytest.mark.parametrize("draft_limit", [0, -1])
@pytest.mark.parametrize("window", [1, 3, 9])
def test_penalties_forget_what_left_their_window(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], window: int, draft_limit: int
) -> None:
    """A favourite comes back as soon as the last of it is out of sight, also when that happens inside a block."""
    fined = {"repetition_penalty": 1000.0, "penalty_window": window, "logit_bias": {77: 40.0}}
    options = greedy(N_TOKENS, ignore_eos=True, draft_limit=draft_limit, **fined)
    engine = make_engine()
    answers = run(engine, prompts[:4], lambda i: options)
    for answer in answers:
        places = [i for i, token in enumerate(answer.tokens) if token == 77]
        assert places == list(range(0, N_TOKENS, window + 1))
    assert (engine.stats.n_scheduled > 0) == (draft_limit != 0)


def test_end_of_text_ends_the_text_inside_a_block(target: _core.Model, prompts: list[list[int]]) -> None:
    """The script goes on behind the end, and drafts of that are checked too: none of it may reach the text."""
    plain = run(exact_engine(target, n_ctx=512), prompts, lambda i: greedy(200), has_drafter=False)
    ended = [(p, answer.tokens) for p, answer in zip(prompts, plain, strict=True) if answer.finish_reason == "stop"]
    scripts = [prompt + tokens + [target.eos_token] + [5] * 20 for prompt, tokens in ended]
    engine = _core._testing.scripted_engine(target, scripts, "right", n_ctx=512, n_parallel=4, kv_type="f32")
    answers = run(engine, [prompt for prompt, _ in ended], lambda i: greedy(200))
    assert [answer.finish_reason for answer in answers] == ["stop"] * len(ended)
    assert tokens_of(answers) == [tokens for _, tokens in ended]
    # The end itself was an accepted draft somewhere: accepted, but not in the text.
    assert any(answer.stats.n_accepted > sum(answer.drafted) for answer in answers)


def test_end_of_text_may_be_ignored(make_engine: Callable[..., _core.Engine], target: _core.Model) -> None:
    certain = {target.eos_token: 1000.0}
    [answer] = run(make_engine(), [[1, 2]], lambda i: greedy(20, logit_bias=certain))
    assert (answer.tokens, answer.finish_reason) == ([], "stop")
    [answer] = run(make_engine(), [[1, 2]], lambda i: greedy(20, logit_bias=certain, ignore_eos=True))
    assert (answer.tokens, answer.finish_reason) == ([target.eos_token] * 20, "length")


# ---- log-probabilities ----


def test_logprobs_of_drafted_tokens_equal_those_of_plain_decoding(
    target: _core.Model, make_engine: Callable[..., _core.Engine], prompts: list[list[int]]
) -> None:
    """1e-3: rows in batches of another size differ by up to 3e-5; a text is compared until it parts at a near tie."""
    plain = run(exact_engine(target, n_ctx=512), prompts, lambda i: greedy(N_TOKENS, n_logprobs=3), has_drafter=False)
    drafted = run(make_engine(), prompts, lambda i: greedy(N_TOKENS, n_logprobs=3))
    n_compared = n_drafts = 0
    for expected, answer in zip(plain, drafted, strict=True):
        assert len(answer.logprobs) == len(answer.tokens)
        for i, (a, b) in enumerate(zip(expected.logprobs, answer.logprobs, strict=False)):
            if expected.tokens[i] != answer.tokens[i]:
                break
            assert b.logprob == pytest.approx(a.logprob, abs=1e-3)
            assert [p for _, p in b.top] == pytest.approx([p for _, p in a.top], abs=1e-3)
            n_compared += 1
            n_drafts += answer.drafted[i]
    assert n_drafts > 0
    assert n_compared >= 0.8 * sum(len(answer.tokens) for answer in plain)


@pytest.mark.parametrize("n_logprobs", [-1, 0, 1, 5])
def test_as_many_logprobs_as_asked_for(
    make_engine: Callable[..., _core.Engine], prompts: list[list[int]], n_logprobs: int
) -> None:
    [answer] = run(make_engine(), prompts[:1], lambda i: greedy(8, n_logprobs=n_logprobs, ignore_eos=True))
    assert len(answer.logprobs) == (0 if n_logprobs < 0 else 8)
    for token, entry in zip(answer.tokens, answer.logprobs, strict=False):
        assert len(entry.top) == n_logprobs
        assert math.exp(entry.logprob) <= 1
        assert sorted((p for _, p in entry.top), reverse=True) == [p for _, p in entry.top]
        if n_logprobs > 0:
            assert entry.top[0] == (token, entry.logprob)
