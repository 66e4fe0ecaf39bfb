"""The per-round trace: what a traced request's events say about each of its decode rounds."""

from __future__ import annotations

from math import isfinite
from typing import Any

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from pairs import exact_engine

BLOCK = 7
RULES = {"exact": 0.0, "rejection": 1.0, "block": 1.0}


def trace(engine: Any, prompts: list[list[int]], **options: Any) -> dict[int, list[_core.Event]]:
    """Run all prompts to their end, return the events of each."""
    events: dict[int, list[_core.Event]] = {
        engine.submit(prompt, _core.RequestOptions(**{"max_tokens": 40, "seed": 3, "trace": True} | options)): []
        for prompt in prompts
    }
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def test_progress_is_that_of_the_rounds_so_far(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]]
) -> None:
    """The last progress is that of the stats, and plain time counts each round's tokens as plain steps of its load."""
    engine = exact_engine(target, drafter, n_ctx=512, n_parallel=3)
    plain = [(n, 10.0 * n) for n in range(1, 5)]
    flat = [(1, 1.0), (64, 1.0)]
    engine.set_costs({"verify": flat, "plain": plain, "prefill": [], "draft": flat, "inject": [],
                      "verify_ms_per_row_cell": 0.0, "draft_ms_per_block_cell": 0.0})  # fmt: skip
    for events in trace(engine, prompts[:1], verification="exact", temperature=0.0, ignore_eos=True).values():
        stats, progress = events[-1].stats, [event.progress for event in events]
        assert stats is not None
        assert progress[0] == (0, 0.0, 0.0)  # the first token comes out of the prompt
        assert progress == sorted(progress)
        n_tokens, rounds_ms, plain_ms = progress[-1]
        assert n_tokens == stats.n_committed == 39
        assert rounds_ms == pytest.approx(stats.draft_ms + stats.verify_ms + stats.host_ms)
        assert plain_ms == stats.plain_ms > 0
    engine = exact_engine(target, drafter, n_ctx=512, n_parallel=3)
    [events] = trace(engine, prompts[:1], verification="exact", temperature=0.0, ignore_eos=True).values()
    assert events[-1].stats is not None
    assert events[-1].stats.plain_ms == 0  # no plain pass was ever timed: nobody knows


@pytest.mark.parametrize("rule", RULES)
def test_rounds_add_up_to_the_stats(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]], rule: str
) -> None:
    engine = exact_engine(target, drafter, n_ctx=512, n_parallel=3)
    answers = trace(engine, prompts, verification=rule, temperature=RULES[rule], ignore_eos=True)
    for events in answers.values():
        rounds, stats = [record for event in events for record in event.rounds], events[-1].stats
        assert stats is not None
        assert len(rounds) == stats.n_rounds > 0
        assert sum(record.n_drafted for record in rounds) == stats.n_drafted
        assert sum(record.prefix_len for record in rounds) == stats.n_scheduled
        assert sum(record.n_accepted for record in rounds) == stats.n_accepted  # no end of text cuts them here
        for event in events[1:-1]:
            [record] = event.rounds
            assert len(event.tokens) == record.n_accepted + 1
            assert record.draft_ms > 0
            assert record.verify_ms > 0
            assert len(record.confidence_logits) == record.n_drafted == BLOCK
            assert all(map(isfinite, record.confidence_logits))


def test_acceptance_is_not_cut_at_the_end_of_text(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]]
) -> None:
    """The token before the end is known, so a drafter that plays the text with ignored ends accepts beyond the end."""
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 200}
    plain = trace(exact_engine(target, n_ctx=512, n_parallel=1), prompts[:1], ignore_eos=True, **options)
    tokens = [token for events in plain.values() for event in events for token in event.tokens]
    end = next(i for i, token in enumerate(tokens) if target.is_end_of_generation(token))
    script = prompts[0] + tokens[: end + 6]
    engine = _core._testing.scripted_engine(target, [script], "right", n_ctx=512, kv_type="f32")
    [events] = trace(engine, [prompts[0] + tokens[: end - 2]], **options).values()
    [record] = [record for event in events for record in event.rounds]
    stats = events[-1].stats
    assert stats is not None
    assert events[-1].finish_reason == "stop"
    assert record.n_accepted > stats.n_accepted > 0


def test_a_limit_shortens_the_prefix_not_the_block(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]]
) -> None:
    engine = exact_engine(target, drafter, n_ctx=512)
    [events] = trace(engine, prompts[:1], draft_limit=3, temperature=0.0, ignore_eos=True).values()
    [record] = events[1].rounds
    assert (record.n_drafted, record.prefix_len, len(record.confidence_logits)) == (BLOCK, 3, BLOCK)
    [events] = trace(engine, prompts[:1], draft_limit=0, temperature=0.0).values()
    [record] = events[1].rounds
    assert (record.n_drafted, record.prefix_len, record.n_accepted) == (0, 0, 0)
    assert record.confidence_logits == []
    assert record.draft_ms == 0


def test_nobody_is_traced_unasked(target: _core.Model, drafter: _core.Model, prompts: list[list[int]]) -> None:
    engine = exact_engine(target, drafter, n_ctx=512, n_parallel=6)
    traced = trace(engine, prompts, temperature=0.0)
    untraced = trace(engine, prompts, temperature=0.0, trace=False)
    assert all(event.rounds == [] for events in untraced.values() for event in events)
    for a, b in zip(traced.values(), untraced.values(), strict=True):
        assert [event.tokens for event in a] == [event.tokens for event in b]
