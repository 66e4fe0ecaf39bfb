"""Speculation changes the speed, never the text: the trained pair in 32-bit floats, every head, form, length and batch.

The default run covers every value of every dimension; the whole matrix, 100 prompts of 128 tokens, is marked slow.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from pairs import (
    HEADS,
    Answer,
    Plain,
    convert_heads,
    count_complete,
    edge_distance,
    exact_engine,
    greedy,
    read_prompts,
    run,
    run_plain,
)

FORMS = ("candidates", "full", "graph")
BLOCK = 7
N_PROMPTS, N_TOKENS = 24, 48
# Thirty times the largest difference seen between a row alone and the same row among others.
MARGIN = 1e-3
# Between two cumulative sums of such probabilities the difference is smaller still: at most a quarter of the logits'.
EDGE = 3e-5


@dataclass(frozen=True)
class Pair:
    """The f32 pair with its prompts and their plain texts."""

    target: _core.Model
    drafters: dict[str, _core.Model]
    prompts: list[list[int]]
    plain: list[Plain]

    def engine(self, drafter: str = "vanilla", **options: Any) -> _core.Engine:
        return exact_engine(self.target, self.drafters[drafter], **{"n_ctx": 512} | options)


@pytest.fixture(scope="module")
def drafter_files(f32_target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return convert_heads(f32_target, tmp_path_factory.mktemp("heads"))


def load_pair(target: Path, drafters: dict[str, Path], n_prompts: int, n_tokens: int) -> Pair:
    model = _core.Model.load_target(str(target))
    prompts = [model.tokenize(text) for text in read_prompts(n_prompts)]
    loaded = {head: _core.Model.load_drafter(str(path), model) for head, path in drafters.items()}
    return Pair(model, loaded, prompts, run_plain(model, prompts, n_tokens))


@pytest.fixture(scope="module")
def pair(f32_target: Path, drafter_files: dict[str, Path]) -> Pair:
    return load_pair(f32_target, drafter_files, N_PROMPTS, N_TOKENS)


def check(
    pair: Pair,
    engine: _core.Engine,
    n_tokens: int = N_TOKENS,
    limits: Sequence[int] = (-1,),
    n_prompts: int = 100,
    has_drafter: bool = True,
) -> list[Answer]:
    """Run prompts, with the draft limits in turn, against the plain texts: all but 5 % (or one) of them to the end."""
    plain = pair.plain[:n_prompts]
    prompts = pair.prompts[:n_prompts]
    answers = run(engine, prompts, lambda i: greedy(n_tokens, draft_limit=limits[i % len(limits)]), has_drafter)
    assert count_complete(plain, answers, MARGIN) >= min(0.95, 1 - 1 / len(plain))
    return answers


# ---- greedy ----


def test_most_prompts_have_a_margin(pair: Pair) -> None:
    """Otherwise the comparisons below would compare little."""
    n_safe = sum(text.n_safe(MARGIN) for text in pair.plain)
    assert n_safe >= 0.95 * sum(len(text.tokens) for text in pair.plain)
    assert sum(text.n_safe(MARGIN) == len(text.tokens) for text in pair.plain) >= 0.95 * N_PROMPTS


# Every head in every form, alone and in batches of every size; draft limits 0 to 7 side by side make them ragged.
@pytest.mark.parametrize(
    ("head", "form", "n_parallel"),
    [(head, form, n) for (head, form), n in zip(product(HEADS, FORMS), (1, 5, 8, 2, 6, 3, 7, 4, 8), strict=True)],
)
def test_text_is_the_same_with_every_head(pair: Pair, head: str, form: str, n_parallel: int) -> None:
    answers = check(pair, pair.engine(head, head=form, n_parallel=n_parallel), limits=(7, 3, 0, 5, 1, 6, 2, 4))
    for answer, limit in zip(answers, (7, 3, 0, 5, 1, 6, 2, 4) * 3, strict=True):
        assert len(answer.stats.accepted_per_position) == BLOCK
        assert not any(answer.stats.scheduled_per_position[limit:])
        assert (answer.stats.n_scheduled > 0) == (limit > 0)
    assert sum(answer.stats.n_accepted for answer in answers) > 0


@pytest.mark.parametrize("draft_length", range(BLOCK + 1))
def test_text_is_the_same_with_every_draft_length(pair: Pair, draft_length: int) -> None:
    engine = pair.engine(n_parallel=8, policy=f"fixed:{draft_length}")
    answers = check(pair, engine, n_prompts=12, has_drafter=draft_length > 0)
    assert engine.stats.n_scheduled <= draft_length * sum(answer.stats.n_rounds for answer in answers)
    assert (engine.stats.n_drafted > 0) == (draft_length > 0)


@pytest.mark.parametrize("n_batch", [8, 19])
def test_text_is_the_same_when_prompts_are_chunked(pair: Pair, n_batch: int) -> None:
    """Prompts of 20 tokens and more share batches of 16 (two blocks) or 19 rows with requests that decode."""
    engine = pair.engine(n_parallel=2, n_batch=n_batch)
    check(pair, engine, n_prompts=12)
    assert engine.stats.n_prefill_tokens == sum(map(len, pair.prompts[:12]))


@pytest.mark.parametrize(("mode", "n_parallel"), list(product(("right", "wrong", "alternating"), (1, 4))))
def test_text_is_the_same_with_scripted_drafts(pair: Pair, mode: str, n_parallel: int) -> None:
    scripts = [prompt + text.tokens for prompt, text in zip(pair.prompts, pair.plain, strict=True)]
    engine = _core._testing.scripted_engine(
        pair.target, scripts, mode, block_size=BLOCK, n_ctx=512, n_parallel=n_parallel, kv_type="f32"
    )
    answers = check(pair, engine, n_prompts=12)
    for answer, text in zip(answers, pair.plain, strict=False):
        if text.n_safe(MARGIN) < N_TOKENS or text.finish_reason != "length":
            continue
        # The first token comes with the prompt; then rounds of 8, of 1, or of 2: one right token, or none and one.
        n_rounds = {"right": (N_TOKENS - 1 + BLOCK) // (BLOCK + 1), "wrong": N_TOKENS - 1}.get(mode)
        if n_rounds is None:
            assert (N_TOKENS - 1) // 2 <= answer.stats.n_rounds <= N_TOKENS // 2 + 1
            assert not any(answer.stats.accepted_per_position[1:])
        else:
            assert answer.stats.n_rounds == n_rounds


def test_state_does_not_leak_between_requests(pair: Pair) -> None:
    """Many short requests that start and end at different times, in slots that others have just left."""
    lengths = [1 + (i * 7) % 13 for i in range(3 * N_PROMPTS)]
    engine = pair.engine("rnn", n_parallel=4)
    answers = run(engine, pair.prompts * 3, lambda i: greedy(lengths[i]))
    assert len(answers) == len(lengths)
    for i, (answer, n) in enumerate(zip(answers, lengths, strict=True)):
        plain = pair.plain[i % N_PROMPTS]
        n_safe = min(n, plain.n_safe(MARGIN))
        assert answer.tokens[:n_safe] == plain.tokens[:n_safe]
        assert len(answer.tokens) <= n


# ---- long texts ----


@pytest.fixture(scope="module")
def long_prompts(pair: Pair) -> list[list[int]]:
    """Conversations of some 300 tokens: earlier questions with their answers, then a question."""
    turns = [prompt + text.tokens for prompt, text in zip(pair.prompts, pair.plain, strict=True)]
    return [list(chain(*turns[i : i + 4]))[-260:] + pair.prompts[i] for i in range(0, 12, 3)]


@pytest.mark.parametrize(("draft_window", "n_batch"), [(64, 512), (64, 32), (7, 100), (1, 512)])
def test_text_is_the_same_with_a_short_draft_window(
    pair: Pair, long_prompts: list[list[int]], draft_window: int, n_batch: int
) -> None:
    """The drafter forgets what is older than its window; prompts are longer than window and batch."""
    assert min(map(len, long_prompts)) > max(draft_window, 200)
    plain = run_plain(pair.target, long_prompts, 96)
    engine = pair.engine(n_parallel=2, draft_window=draft_window, n_batch=n_batch)
    answers = run(engine, long_prompts, lambda i: greedy(96))
    # Four texts: one of them may meet a near tie.
    assert count_complete(plain, answers, MARGIN) >= 0.75
    if draft_window >= 64:
        assert all(answer.stats.n_accepted > 0 for answer in answers)


def test_context_may_be_filled_to_the_last_cell(pair: Pair) -> None:
    """Both limits of a round at once: the context ends in the middle of a block."""
    prompt, text = pair.prompts[0], pair.plain[0]
    n_ctx = len(prompt) + 20
    [answer] = run(pair.engine(n_ctx=n_ctx), [prompt], lambda i: greedy(1000, ignore_eos=True))
    assert answer.finish_reason == "context_full"
    assert len(prompt) + len(answer.tokens) == n_ctx
    n_safe = min(text.n_safe(MARGIN), 20)
    assert answer.tokens[:n_safe] == text.tokens[:n_safe]


# ---- sampled, exact ----

SAMPLED = {"temperature": 0.8, "top_k": 20, "verification": "exact"}


def sampled(i: int, **options: Any) -> _core.RequestOptions:
    return _core.RequestOptions(max_tokens=N_TOKENS, seed=1000 + i, ignore_eos=True, **SAMPLED | options)


@pytest.fixture(scope="module")
def sampled_plain(pair: Pair) -> list[Plain]:
    """Sampled texts without speculation; a margin is the distance of each draw from the next token's share."""
    answers = run(exact_engine(pair.target, n_ctx=512), pair.prompts, lambda i: sampled(i, n_logprobs=21), False)
    texts = []
    for i, (prompt, answer) in enumerate(zip(pair.prompts, answers, strict=True)):
        uniforms = [_core._math.uniform(1000 + i, "target_sample", len(prompt) + j, 0) for j in range(N_TOKENS)]
        margins = [edge_distance(entry.top, u, 0.8) for entry, u in zip(answer.logprobs, uniforms, strict=True)]
        texts.append(Plain(answer.tokens, margins, str(answer.finish_reason)))
    return texts


@pytest.mark.parametrize(("n_parallel", "limits"), [(1, (7,)), (3, (1, 2, 3)), (8, (7, 0, 4, 6, 5))])
def test_exact_sampling_is_the_same_with_speculation(
    pair: Pair, sampled_plain: list[Plain], n_parallel: int, limits: tuple[int, ...]
) -> None:
    """Under `exact` the text is a function of seed, prompt and model; only a draw on the very edge may flip."""
    engine = pair.engine("gated", n_parallel=n_parallel)
    answers = run(engine, pair.prompts, lambda i: sampled(i, draft_limit=limits[i % len(limits)]))
    # 2 edges in 3e-5 of each of 48 draws: one text in 25 is open somewhere.
    assert count_complete(sampled_plain, answers, EDGE) >= 0.85
    assert sum(answer.stats.n_accepted for answer in answers) > 0


# ---- several engines, any order of farewell ----


def test_two_engines_step_in_turn(pair: Pair) -> None:
    """Each has caches of its own over the same weights."""
    engines = [pair.engine("vanilla", n_parallel=2), pair.engine("gated", n_parallel=2)]
    texts: list[dict[int, list[int]]] = [{}, {}]
    for engine, text in zip(engines, texts, strict=True):
        text.update({engine.submit(prompt, greedy(24)): [] for prompt in pair.prompts[:4]})
    while any(engine.has_work for engine in engines):
        for engine, text in zip(engines, texts, strict=True):
            for event in engine.step():
                text[event.request_id] += event.tokens
    for text in texts:
        for tokens, plain in zip(text.values(), pair.plain[:4], strict=True):
            n_safe = min(24, plain.n_safe(MARGIN))
            assert tokens[:n_safe] == plain.tokens[:n_safe]


@pytest.mark.parametrize("order", list(permutations(("target", "drafter", "engine"))))
def test_objects_may_go_in_any_order(f32_target: Path, drafter_files: dict[str, Path], order: tuple[str, ...]) -> None:
    """The engine keeps what it needs: with the models' names gone it still works."""
    kept: dict[str, Any] = {"target": _core.Model.load_target(str(f32_target))}
    kept["drafter"] = _core.Model.load_drafter(str(drafter_files["vanilla"]), kept["target"])
    kept["engine"] = exact_engine(kept["target"], kept["drafter"], n_ctx=64)
    for name in order:
        kept.pop(name)
        gc.collect()
        if "engine" in kept:
            [answer] = run(kept["engine"], [[1, 2, 3]], lambda i: greedy(4, ignore_eos=True))
            assert len(answer.tokens) == 4
        elif "drafter" in kept:
            assert kept["drafter"].drafter_info.block_size == BLOCK


# ---- the whole matrix ----


@pytest.fixture(scope="module")
def full_pair(f32_target: Path, drafter_files: dict[str, Path]) -> Pair:
    return load_pair(f32_target, drafter_files, 100, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "form", "n_parallel"),
    [(head, form, n) for head in HEADS for form, n in zip(("candidates", *FORMS), (1, 8, 3, 6), strict=True)],
)
def test_hundred_prompts_with_every_head(full_pair: Pair, head: str, form: str, n_parallel: int) -> None:
    """Alone with full blocks; in batches with limits 0 to 7 side by side, and prompts in chunks."""
    limits = (BLOCK,) if n_parallel == 1 else range(BLOCK + 1)
    check(full_pair, full_pair.engine(head, head=form, n_parallel=n_parallel, n_batch=40), 128, limits)


@pytest.mark.slow
@pytest.mark.parametrize("draft_length", range(BLOCK + 1))
def test_hundred_prompts_with_every_draft_length(full_pair: Pair, draft_length: int) -> None:
    engine = full_pair.engine(n_parallel=1 + draft_length, policy=f"fixed:{draft_length}")
    check(full_pair, engine, 128, has_drafter=draft_length > 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["right", "wrong", "alternating"])
def test_hundred_prompts_with_scripted_drafts(full_pair: Pair, mode: str) -> None:
    scripts = [prompt + text.tokens for prompt, text in zip(full_pair.prompts, full_pair.plain, strict=True)]
    for n_parallel in (1, 8):
        engine = _core._testing.scripted_engine(
            full_pair.target, scripts, mode, block_size=BLOCK, n_ctx=512, n_parallel=n_parallel, kv_type="f32"
        )
        check(full_pair, engine, 128)
