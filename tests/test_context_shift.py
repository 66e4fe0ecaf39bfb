"""Context shifts in both caches of real models.

The oracle: with one layer, keys and values are functions of a token and its position alone, and so is what the drafter
sees of it (the target's embeddings). A shifted cache is then what the shortened text would leave, so a request that
was shifted must go on like a fresh one whose prompt is the shortened text. With more layers rows behind a shift have
seen what was forgotten; there speculation is compared with plain decoding under the same shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import LLM, SamplingParams, _core
from dspark_cpp.bench.random_pair import Shape, write_random_drafter, write_random_target
from hybrid_models import write_hybrid_target
from pairs import exact_engine, gap, read_prompts

N_CTX, N_KEEP, N_TOKENS = 64, 5, 200
# What re-rotating f32 keys and summing in another order do to a log-probability stays below 1e-4.
MARGIN = 2e-3
ONE_LAYER = Shape(
    hidden_size=64,
    intermediate_size=128,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    is_tied=False,
    head_dim=16,
    vocab_size=512,
)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[_core.Model, _core.Model]:
    folder = tmp_path_factory.mktemp("one_layer")
    write_random_target(folder / "target.gguf", ONE_LAYER, "f16")
    write_random_drafter(folder / "drafter.gguf", folder / "target.gguf", "f16")
    target = _core.Model.load_target(str(folder / "target.gguf"))
    return target, _core.Model.load_drafter(str(folder / "drafter.gguf"), target)


@pytest.fixture(scope="module")
def prompts(target: _core.Model) -> list[list[int]]:
    return [target.tokenize(text)[: N_CTX - 8] for text in read_prompts(6)]


def shifting(max_tokens: int = N_TOKENS, **options: Any) -> _core.RequestOptions:
    base = {"temperature": 0, "ignore_eos": True, "context_shift": True, "n_keep": N_KEEP, "n_logprobs": 2}
    return _core.RequestOptions(max_tokens=max_tokens, **base | options)


def run(engine: _core.Engine, prompts: Sequence[list[int]], options: _core.RequestOptions) -> list[list[_core.Event]]:
    events: dict[int, list[_core.Event]] = {engine.submit(prompt, options): [] for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
        for _, at_target, at_drafter in engine.cache_positions():
            assert at_target <= N_CTX - 2
            assert at_drafter in (-1, at_target)
    return list(events.values())


def tokens_of(events: Sequence[_core.Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def n_safe(events: Sequence[_core.Event]) -> int:
    margins = [gap(entry.top) for event in events for entry in event.logprobs]
    return next((i for i, margin in enumerate(margins) if margin < MARGIN), len(margins))


def shortened(text: list[int]) -> list[int]:
    """Return what a full context keeps."""
    assert len(text) == N_CTX
    n_discarded = (N_CTX - N_KEEP) // 2
    return text[:N_KEEP] + text[N_KEEP + n_discarded :]


@pytest.mark.parametrize("has_drafter", [False, True])
def test_shifted_cache_is_that_of_the_shortened_text(
    one_layer: tuple[_core.Model, _core.Model], has_drafter: bool
) -> None:
    target, drafter = one_layer
    prompt = list(range(20, 50))

    def make() -> _core.Engine:
        return exact_engine(target, drafter if has_drafter else None, n_ctx=N_CTX, policy="full")

    [events] = run(make(), [prompt], shifting(trace=True))
    text, confidences = prompt + tokens_of(events), confidences_of(events, len(prompt))
    n_compared = n_drafts = 0
    context, n_left_out = text[:N_CTX], 0
    while n_left_out + len(context) < len(text):
        kept = shortened(context)
        n_left_out += len(context) - len(kept)
        n_room = N_CTX - len(kept)
        [fresh] = run(make(), [kept], shifting(max_tokens=n_room, context_shift=False, trace=True))
        at = n_left_out + len(kept)
        n = min(n_safe(fresh), len(text) - at, n_room)
        assert tokens_of(fresh)[:n] == text[at : at + n]
        n_compared += n
        for position, logits in confidences_of(fresh, at).items():
            if position in confidences and position < at + n:
                # f16 weights, f32 keys: a rotation more than the fresh ones have had.
                assert confidences[position] == pytest.approx(logits, abs=5e-3)
                n_drafts += 1
        context = kept + text[at : at + n_room]
    assert n_compared > 0.8 * (len(text) - N_CTX)
    assert (n_drafts > 10) == has_drafter


def confidences_of(events: Sequence[_core.Event], n_prompt: int) -> dict[int, list[float]]:
    """Return the confidences of each drafted round by the number of tokens of the whole text before it."""
    at, found = n_prompt, {}
    for event in events:
        for record in event.rounds:
            if record.confidence_logits:
                found[at] = list(record.confidence_logits)
        at += len(event.tokens)
    return found


@pytest.mark.parametrize("n_parallel", [1, 3])
@pytest.mark.parametrize("draft_window", [24, 4096])
def test_speculation_leaves_the_shifted_text_alone(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]], n_parallel: int, draft_window: int
) -> None:
    plain = run(exact_engine(target, n_ctx=N_CTX), prompts, shifting())
    engine = exact_engine(target, drafter, n_ctx=N_CTX, n_parallel=n_parallel, policy="full", draft_window=draft_window)
    answers = run(engine, prompts, shifting())
    n_accepted_late = 0
    for expected, events in zip(plain, answers, strict=True):
        n = n_safe(expected)
        assert tokens_of(events)[:n] == tokens_of(expected)[:n]
        assert len(tokens_of(events)) == N_TOKENS
        stats = events[-1].stats
        assert stats is not None
        assert stats.n_discarded >= 3 * ((N_CTX - N_KEEP) // 2)
        late = [drafted for event in events for drafted in event.drafted][N_CTX:]
        n_accepted_late += sum(late)
    assert n_accepted_late > 0.3 * len(answers) * (N_TOKENS - N_CTX)  # drafting goes on as well as before


def test_drafts_are_as_good_after_a_shift_as_before(
    target: _core.Model, drafter: _core.Model, prompts: list[list[int]]
) -> None:
    """Rows at wrong positions in the drafter's cache would halve acceptance and change no text."""
    engine = exact_engine(target, drafter, n_ctx=N_CTX, policy="full")
    shifted = large = 0
    for events, own in ((run(engine, prompts, shifting()), True), (run_large(target, drafter, prompts), False)):
        n = sum(sum([drafted for event in one for drafted in event.drafted][N_CTX:]) for one in events)
        shifted, large = (n, large) if own else (shifted, n)
    assert shifted > 0.75 * large


def run_large(target: _core.Model, drafter: _core.Model, prompts: list[list[int]]) -> list[list[_core.Event]]:
    engine = exact_engine(target, drafter, n_ctx=512, policy="full")
    events: dict[int, list[_core.Event]] = {engine.submit(prompt, shifting()): [] for prompt in prompts}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return list(events.values())


@pytest.mark.parametrize("cache", [{}, {"kv_type": "f16", "flash_attention": True}], ids=["f32", "f16"])
def test_shared_cells_stay_for_the_others(one_layer: tuple[_core.Model, _core.Model], cache: dict[str, Any]) -> None:
    """Prompts that share their cells: one shifts, and neither it nor the others notice."""
    target, drafter = one_layer
    start = list(range(100, 150))
    asked = [[*start, 7], [*start, 8], [*start, 9]]
    alone = [run(exact_engine(target, n_ctx=N_CTX, **cache), [prompt], shifting())[0] for prompt in asked]
    engine = exact_engine(target, drafter, n_ctx=N_CTX, n_parallel=3, policy="full", prefix_reuse=True, **cache)
    requests: dict[int, list[_core.Event]] = {}
    for prompt in asked:
        requests[engine.submit(prompt, shifting())] = []
        while not next(reversed(requests.values())):  # the next one finds this prompt in the cache
            for event in engine.step():
                requests[event.request_id].append(event)
    while engine.has_work:
        for event in engine.step():
            requests[event.request_id].append(event)
    n_compared = 0
    for expected, events in zip(alone, requests.values(), strict=True):
        n = n_safe(expected)
        assert tokens_of(events)[:n] == tokens_of(expected)[:n]
        n_compared += n
    assert n_compared > 0.5 * len(asked) * N_TOKENS
    last = list(requests.values())[-1][-1].stats
    assert last is not None
    assert last.n_reused == len(start)


@pytest.mark.parametrize("architecture", ["lfm2", "qwen35"])
def test_refused_where_the_memory_cannot_shift(architecture: str, tmp_path: Path) -> None:
    target = _core.Model.load_target(str(write_hybrid_target(tmp_path / "target.gguf", architecture)))
    engine = exact_engine(target, n_ctx=N_CTX)
    assert not engine.can_shift
    with pytest.raises(ValueError, match="context_shift must be off: this pair's caches cannot be shifted"):
        engine.submit([1, 2, 3], shifting())


@pytest.mark.parametrize(("n_keep", "error"), [(-2, ValueError), (True, TypeError), ("4", TypeError)])
def test_bad_options(n_keep: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n_keep must be"):
        SamplingParams(n_keep=n_keep)


def test_public_api(f32_target: Path, f32_drafter: Path, questions: list[str]) -> None:
    params: Callable[..., SamplingParams] = lambda **own: SamplingParams(  # noqa: E731
        temperature=0, max_tokens=150, ignore_eos=True, **own
    )
    with LLM(f32_target, f32_drafter, n_ctx=N_CTX, n_threads=1) as llm:
        assert llm.can_shift
        [ended] = llm.generate(questions[0], params())
        [went_on] = llm.generate(questions[0], params(context_shift=True, n_keep=-1))
    assert ended.finish_reason == "context_full"
    assert went_on.finish_reason == "length"
    assert len(went_on.token_ids) == 150
    assert went_on.stats.n_discarded > 0
    assert ended.stats.n_discarded == 0
    assert went_on.token_ids[: len(ended.token_ids)] == ended.token_ids
