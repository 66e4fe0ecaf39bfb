"""The same text, to the bit of every log-probability, alone or in a crowd.

With our kernels on a quantized model nothing of a request depends on what shares its batches and its cache.

ggml's own attention fails every one of these but the first: it takes another order of sums, some of them in f16, for
one row over 512 cells or more, for 64 rows or more, and for every order of the cells.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from dspark_cpp.bench.random_pair import Shape, write_random_target
from pairs import Answer, greedy, read_prompts, run

pytestmark = pytest.mark.skipif(not _core.kernel_types(), reason="no kernels for this processor: ggml's run")

LENGTHS = (7, 30, 64, 65, 130, 260, 300, 20)  # over and under the sizes at which ggml's attention changes its order
N_TOKENS = 24

Figures = list[tuple[int, tuple[tuple[int, float], ...]]]


@pytest.fixture(scope="module")
def target(demo_target: Path) -> _core.Model:
    return _core.Model.load_target(str(demo_target))


@pytest.fixture(scope="module")
def make_engine(target: _core.Model, demo_drafter: Path) -> Callable[..., _core.Engine]:
    drafter = _core.Model.load_drafter(str(demo_drafter), target)
    defaults = {"n_ctx": 512, "n_parallel": 1, "n_threads": 1, "prefix_reuse": False, "policy": "off"}
    return lambda **options: _core.Engine(target, drafter, **defaults | options)


@pytest.fixture(scope="module")
def prompts(target: _core.Model) -> list[list[int]]:
    texts = [target.tokenize(text) for text in read_prompts(40)]
    return [list(chain(*texts[i:]))[:n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(make_engine: Callable[..., _core.Engine], prompts: list[list[int]]) -> list[Figures]:
    engine = make_engine()
    return [figures(answer) for prompt in prompts for answer in run(engine, [prompt], options, False)]


def options(_: int) -> _core.RequestOptions:
    return greedy(N_TOKENS, n_logprobs=4, ignore_eos=True)


def figures(answer: Answer) -> Figures:
    return [(token, tuple(entry.top)) for token, entry in zip(answer.tokens, answer.logprobs, strict=True)]


def assert_equal(answers: Sequence[Answer], expected: Sequence[Figures]) -> None:
    for i, (answer, figures_alone) in enumerate(zip(answers, expected, strict=True)):
        assert figures(answer) == figures_alone, f"prompt of {LENGTHS[i]} tokens"


@pytest.mark.parametrize("how", [{}, {"n_threads": 2}, {"n_batch": 16}, {"n_batch": 64}, {"n_batch": 100}], ids=str)
def test_threads_and_prompt_chunks_change_nothing(make_engine, prompts, alone, how: dict[str, Any]) -> None:
    engine = make_engine(**how)
    assert_equal([run(engine, [prompt], options, False)[0] for prompt in prompts], alone)


@pytest.mark.parametrize("n_parallel", [2, 5, 8])
@pytest.mark.parametrize("policy", ["off", "full"])
def test_neighbours_change_nothing(make_engine, prompts, alone, n_parallel: int, policy: str) -> None:
    engine = make_engine(n_parallel=n_parallel, policy=policy)
    assert_equal(run(engine, prompts, options, policy == "full"), alone)


def test_speculation_changes_nothing(make_engine, prompts, alone) -> None:
    engine = make_engine(policy="full")
    assert_equal([run(engine, [prompt], options)[0] for prompt in prompts], alone)


def test_prefix_reuse_changes_nothing(make_engine, prompts, alone) -> None:
    engine = make_engine(prefix_reuse=True)
    for prompt, expected in zip(prompts, alone, strict=True):
        run(engine, [prompt[: len(prompt) * 2 // 3]], options, False)
        [answer] = run(engine, [prompt], options, False)
        assert answer.stats.n_reused > 0
        assert figures(answer) == expected


def test_holes_in_the_cache_change_nothing(make_engine, prompts, alone) -> None:
    """Arrivals and cancels at random: the cells of a sequence lie scattered and out of order."""
    rng = random.Random(3)
    engine = make_engine(n_parallel=4, prefix_reuse=True, policy="full")
    answers: dict[int, Answer] = {}
    order = list(range(len(prompts)))
    waiting, others, places = order[:], [], {}
    while waiting or engine.has_work:
        if waiting and (rng.random() < 0.3 or not engine.has_work):
            i = waiting.pop()
            request = engine.submit(prompts[i], options(i))
            places[request], answers[i] = i, Answer()
        if rng.random() < 0.3:
            others.append(engine.submit(rng.choice(prompts)[rng.randrange(5) :], options(0)))
        if others and rng.random() < 0.2:
            engine.cancel(others.pop())
        for event in engine.step():
            if event.request_id in places:
                answers[places[event.request_id]].add(event)
    assert_equal([answers[i] for i in order], alone)


def compare_rows(target: _core.Model, tokens: list[int], other: list[int], n_before: int) -> None:
    """Compare the rows after the first n_before one by one with the same in a batch, to the bit.

    The batch meets a cache in which another sequence lies too and this one came in chunks.
    """
    probe = _core._testing.TargetProbe(target, n_cells=1024, n_sequences=2)
    probe.decode([(token, i, 0) for i, token in enumerate(tokens[:n_before])])
    single = [probe.decode([(token, n_before + i, 0)])[0] for i, token in enumerate(tokens[n_before:])]
    crowded = _core._testing.TargetProbe(target, n_cells=1024, n_sequences=2, n_threads=2)
    crowded.decode([(token, i, 1) for i, token in enumerate(other)])
    for begin in range(0, n_before, 30):
        chunk = tokens[begin : min(begin + 30, n_before)]
        crowded.decode([(token, begin + i, 0) for i, token in enumerate(chunk)])
    batch = crowded.decode([(token, n_before + i, 0) for i, token in enumerate(tokens[n_before:])])
    assert np.array_equal(batch, np.array(single))


@pytest.mark.parametrize("n_rows", [2, 3, 8, 16, 63, 64, 65])
def test_logits_of_a_row_are_those_of_the_row_in_a_batch(target: _core.Model, prompts, n_rows: int) -> None:
    compare_rows(target, prompts[5][: 100 + n_rows], prompts[6], 100)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_k_m", "q6_k"])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(12, 2, 64), (6, 1, 128)])
def test_random_targets_of_other_shapes(tmp_path: Path, quant: str, n_heads: int, n_kv_heads: int, head_dim: int):
    shape = Shape(256, 768, 3, n_heads, n_kv_heads, is_tied=True, head_dim=head_dim, vocab_size=2048)
    write_random_target(tmp_path / "random.gguf", shape, quant, seed=1)
    target = _core.Model.load_target(str(tmp_path / "random.gguf"))
    rng = random.Random(2)
    tokens, other = ([rng.randrange(2000) for _ in range(n)] for n in (580, 300))
    compare_rows(target, tokens, other, 560)


def logits_of(target: _core.Model, tokens: list[int], n_rows: int, n_threads: int) -> np.ndarray:
    """Logits of the last n_rows, in one batch behind the others."""
    probe = _core._testing.TargetProbe(target, n_cells=512, n_threads=n_threads)
    rows = [(token, i, 0) for i, token in enumerate(tokens)]
    probe.decode(rows[:-n_rows])
    return probe.decode(rows[-n_rows:])


@pytest.fixture
def ungrouped() -> Iterator[Callable[..., np.ndarray]]:
    """logits_of() with every product by itself."""

    def compute(*arguments: Any) -> np.ndarray:
        _core._testing.set_groups_enabled(False)
        logits = logits_of(*arguments)
        _core._testing.set_groups_enabled(True)
        return logits

    yield compute
    _core._testing.set_groups_enabled(True)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_k_m", "f16"])
@pytest.mark.parametrize("n_rows", [1, 8, 150])
def test_products_in_groups_are_those_one_by_one(tmp_path: Path, quant: str, n_rows: int, ungrouped) -> None:
    """X quantized once for several products and by all threads, the residual and SwiGLU right behind: the same bits."""
    n_layers = 3
    write_random_target(
        tmp_path / "random.gguf",
        Shape(256, 768, n_layers, 8, 2, is_tied=True, head_dim=64, vocab_size=2048),
        quant,
        seed=1,
    )
    target = _core.Model.load_target(str(tmp_path / "random.gguf"))
    tokens = [random.Random(3).randrange(2000) for _ in range(n_rows + 40)]
    expected = ungrouped(target, tokens, n_rows, 1)
    for n_threads in (1, 2, 3, 5):
        assert np.array_equal(logits_of(target, tokens, n_rows, n_threads), expected)
        n_grouped = _core._testing.n_grouped_nodes()
        assert n_grouped == 0 if quant == "f16" else n_grouped >= 5 * (n_layers - 1)
