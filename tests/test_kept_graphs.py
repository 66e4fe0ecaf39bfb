"""The drafter's passes with graphs kept by shape: the bits of llama.cpp's own passes, and no graph built twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dspark_cpp import LLM, SamplingParams, _core

N_TOKENS = 700
QUEUE_BYTES = 1 << 30  # rows wait until a draft

# Each round: rows that are committed, then a block. All of 1 .. 8 rows, in an order that repeats none at once.
ROUNDS = [3, 1, 8, 2, 5, 1, 7, 4, 6, 1, 3, 8]

Probe = Callable[..., Any]
Act = Callable[[Any], list[np.ndarray]]


@pytest.fixture(scope="module")
def probe(demo_target: Path, demo_drafter: Path) -> Probe:
    target = _core.Model.load_target(str(demo_target))
    drafter = _core.Model.load_drafter(str(demo_drafter), target)
    tokens = np.random.default_rng(7).integers(20, 2000, N_TOKENS).tolist()
    return partial(_core._testing.ContextProbe, target, drafter, tokens, QUEUE_BYTES)


def rounds(probe: Any, sizes: list[int] = ROUNDS) -> list[np.ndarray]:
    drafts = []
    for n_rows in sizes:
        probe.extend(n_rows)
        drafts.append(probe.draft())
    return drafts


def across_the_first_cells(probe: Any) -> list[np.ndarray]:
    """Past 256 cells llama.cpp's attention looks at 256 more, which every graph must be told."""
    probe.extend(230)
    return rounds(probe, [*ROUNDS, *ROUNDS])


def behind_a_long_injection(probe: Any) -> list[np.ndarray]:
    probe.extend(300)  # 256 rows, then 44
    return [probe.draft(), *rounds(probe)]


def after_forgetting(probe: Any) -> list[np.ndarray]:
    first = rounds(probe)
    probe.forget()
    return [*first, *rounds(probe)]


def after_a_shift(probe: Any) -> list[np.ndarray]:
    """Keys of moved cells are rotated before the next pass."""
    first = rounds(probe)
    probe.shift(4, 10)
    return [*first, *rounds(probe)]


@pytest.mark.parametrize("window", [4096, 40])
@pytest.mark.parametrize(
    "act", [rounds, across_the_first_cells, behind_a_long_injection, after_forgetting, after_a_shift]
)
def test_kept_graphs_give_the_bits_of_llama_cpp(probe: Probe, act: Act, window: int) -> None:
    kept, own = (act(probe(window=window, keep_graphs=keep)) for keep in (True, False))
    assert all((a == b).all() for a, b in zip(kept, own, strict=True))
    assert len({draft.tobytes() for draft in kept}) == len(kept), "each draft must differ, or nothing was compared"


def test_graphs_are_built_once_a_shape(probe: Probe) -> None:
    kept = probe()
    rounds(kept)
    assert kept.n_graphs_built == 9  # injections of 1 .. 8 rows, one block
    rounds(kept)
    assert kept.n_graphs_built == 9


def test_graphs_of_llama_cpp_are_not_counted(probe: Probe) -> None:
    own = probe(keep_graphs=False)
    rounds(own)
    assert own.n_graphs_built == 0


def test_few_graphs_are_kept(probe: Probe) -> None:
    """More shapes than are kept take the place of old ones, in memory and all."""
    kept = probe()
    rounds(kept, list(range(1, 36)))
    n_built, n_bytes = kept.n_graphs_built, kept.kept_bytes
    assert n_built == 38  # the block's is built anew past 256 and past 512 cells
    rounds(kept, [35])  # still there
    assert kept.n_graphs_built == n_built
    rounds(kept, [1])  # the oldest is not
    assert kept.n_graphs_built == n_built + 1
    assert kept.kept_bytes == n_bytes > 0


def test_memory_counts_what_is_kept(demo_target: Path, demo_drafter: Path) -> None:
    with LLM(demo_target, demo_drafter, policy="full", costs="none", n_threads=1) as llm:
        before = llm.engine.memory_bytes
        llm.generate("What is 2 plus 3?", SamplingParams(max_tokens=20, ignore_eos=True))
        after = llm.engine.memory_bytes
    for name in ("target_context", "draft_context"):
        assert after[name] > before[name] + 100_000
    assert after["target_weights"] == before["target_weights"]


Rows = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def target_probe(demo_target: Path) -> Probe:
    target = _core.Model.load_target(str(demo_target))
    return partial(_core._testing.TargetProbe, target, n_cells=1024, n_sequences=3, n_threads=1)


def test_all_shapes_of_a_target_are_kept(target_probe: Probe) -> None:
    """Else costs that are measured in turns, size after size, would be those of graphs built each time."""
    probe = target_probe()
    for _ in range(2):
        for n_rows in range(1, 33):
            probe.decode([(20 + i, i, 0) for i in range(n_rows)])
            probe.remove(0)
    assert probe.n_graphs_built == 32


def verify(probe: Any, n_rows: list[int], begin: int = 0) -> list[np.ndarray]:
    """Passes of these numbers of rows for each of three sequences: logits and inputs of a tapped layer."""
    out = []
    position = begin
    for n in n_rows:
        rows: Rows = [(20 + position + i + s, position + i, s) for s in range(3) for i in range(n)]
        out += [probe.decode(rows), probe.layer_input(2)]
        position += n
    return out


@pytest.mark.parametrize("n_rows", [[1, 3, 2, 1, 3, 2], [90, 1, 2, 1, 11, 10, 1]])
def test_kept_graphs_of_a_target_give_the_bits_of_llama_cpp(target_probe: Probe, n_rows: list[int]) -> None:
    kept, own = (target_probe(n_kept_rows=n) for n in (32, 0))
    for one in (kept, own):
        one.tap_layer(2)
    results = [verify(one, n_rows) for one in (kept, own)]
    assert all((a == b).all() for a, b in zip(*results, strict=True))
    assert kept.n_graphs_built > 0 == own.n_graphs_built


def test_one_graph_serves_one_number_of_rows(target_probe: Probe) -> None:
    """Whoever the rows belong to; graphs are built anew when a layer is tapped."""
    kept = target_probe()
    kept.tap_layer(2)
    kept.decode([(30 + s, 0, s) for s in range(3)])
    kept.decode([(40 + i, 1 + i, 0) for i in range(3)])
    assert kept.n_graphs_built == 1
    kept.tap_layer(1)
    kept.decode([(50 + s, 4 if s == 0 else 1, s) for s in range(3)])
    assert kept.n_graphs_built == 2
    assert kept.layer_input(1).shape == kept.layer_input(2).shape
    assert (kept.layer_input(1) != kept.layer_input(2)).any()
