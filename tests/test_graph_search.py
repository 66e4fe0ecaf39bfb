"""The largest logits that a drafter's pass finds itself: those of the rows it leaves, and the same drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core
from dspark_cpp.convert import ConvertOptions, convert
from pairs import DATA

N_REDUCED = 256


@pytest.fixture(scope="module", params=[0, N_REDUCED], ids=["all tokens", "reduced"])
def drafter(request: pytest.FixtureRequest, f32_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("drafter") / "drafter.gguf"
    convert(ConvertOptions(DATA / "vanilla", f32_target, output, "f32", draft_vocab=request.param))
    return output


def make_probe(target: Path, drafter: Path, *, keep_graphs: bool = True) -> Any:
    model = _core.Model.load_target(str(target))
    tokens = np.random.default_rng(3).integers(20, 2000, 200).tolist()
    head = _core.Model.load_drafter(str(drafter), model)
    return _core._testing.ContextProbe(model, head, tokens, 1 << 30, keep_graphs=keep_graphs)


def test_a_pass_finds_the_largest_of_its_rows(f32_target: Path, drafter: Path) -> None:
    probe = make_probe(f32_target, drafter)
    for n_rows in (5, 1, 40):
        probe.extend(n_rows)
        for slot, row in enumerate(probe.draft()):
            ids, logits = probe.largest(slot)
            order = np.lexsort((np.arange(row.size), -row))[: len(ids)]
            assert len(ids) >= 64
            assert ids == sorted(order.tolist())
            assert np.array_equal(np.array(logits, np.float32), row[ids])


def test_drafts_are_those_of_a_head_that_searches(f32_target: Path, drafter: Path) -> None:
    searched, plain = (make_probe(f32_target, drafter, keep_graphs=keep) for keep in (True, False))
    for n_rows in (4, 2, 7, 30):
        for probe in (searched, plain):
            probe.extend(n_rows)
            probe.draft()
        assert searched.drafted == plain.drafted
        assert searched.drafted
        assert plain.largest(0) == ([], [])
