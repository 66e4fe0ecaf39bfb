"""Context rows wait in memory until a draft needs them: what is drafted must not depend on how long they waited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core
from pairs import exact_engine, greedy, run

EAGER, LAZY = 0, 1 << 30
N_PROMPT = 300  # more than one injection pass of 256 rows

# The same rows in passes of another size are summed in another order: 3e-5 on logits of magnitude 10.
TOLERANCE = 1e-4

Probe = Callable[..., Any]


@pytest.fixture(scope="module")
def probe(f32_target: Path, f32_drafter: Path) -> Probe:
    target = _core.Model.load_target(str(f32_target))
    drafter = _core.Model.load_drafter(str(f32_drafter), target)
    tokens = np.random.default_rng(5).integers(20, 2000, N_PROMPT + 100).tolist()
    return lambda queue_bytes, window=4096: _core._testing.ContextProbe(target, drafter, tokens, queue_bytes, window)


def extend(probe: Any, steps: list[int]) -> np.ndarray:
    """Decode in steps of these sizes, then draft."""
    for n_rows in steps:
        probe.extend(n_rows)
    return probe.draft()


@pytest.mark.parametrize("steps", [[1], [N_PROMPT], [N_PROMPT, 3, 1, 1], [100, 200, *[1] * 60]])
def test_lazy_drafts_as_eager_does(probe: Probe, steps: list[int]) -> None:
    eager, lazy = (extend(probe(queue_bytes), steps) for queue_bytes in (EAGER, LAZY))
    assert np.abs(lazy - eager).max() < TOLERANCE
    assert (lazy.argmax(1) == eager.argmax(1)).all()


def test_parked_request_drafts_as_one_that_always_did(probe: Probe) -> None:
    """Drafting now and then and drafting never until now leave the same context."""
    parked, drafting = probe(LAZY), probe(LAZY)
    drafting.extend(N_PROMPT)
    for _ in range(40):
        drafting.extend(1)
        drafting.draft()
    assert np.abs(extend(parked, [N_PROMPT, *[1] * 40]) - drafting.draft()).max() < TOLERANCE


def test_rows_wait_until_a_draft(probe: Probe) -> None:
    lazy = probe(LAZY)
    lazy.extend(N_PROMPT)
    assert lazy.positions == (N_PROMPT - 1, N_PROMPT, -1, -1)
    lazy.draft()
    assert lazy.positions == (N_PROMPT - 1, 0, 0, N_PROMPT - 1)
    lazy.extend(2)
    assert lazy.positions == (N_PROMPT + 1, 2, 0, N_PROMPT - 1)
    lazy.forget()
    assert lazy.positions == (-1, 0, -1, -1)


def test_full_queue_is_injected(probe: Probe) -> None:
    row_bytes = 4 * 256 * 3
    small = probe(50 * row_bytes)
    for n_rows in (50, 1, 49):
        small.extend(n_rows)
    assert small.positions == (99, 49, 0, 50)


@pytest.mark.parametrize("steps", [[N_PROMPT, 1], [40, *[1] * 50], [20, 100, 5]])
def test_window_is_the_same(probe: Probe, steps: list[int]) -> None:
    """32 rows are kept, whether the others were injected and removed or never injected."""
    window = 32
    for queue_bytes in (EAGER, LAZY):
        some = probe(queue_bytes, window)
        logits = extend(some, steps)
        end = sum(steps)
        assert some.positions == (end - 1, 0, end - window, end - 1)
        if queue_bytes == EAGER:
            eager = logits
    assert np.abs(logits - eager).max() < TOLERANCE


def test_rows_behind_the_window_are_never_computed(probe: Probe) -> None:
    lazy = probe(LAZY, 32)
    lazy.extend(N_PROMPT)
    assert lazy.positions == (N_PROMPT - 1, 32, -1, -1)


def test_start_after_a_gap(probe: Probe) -> None:
    """A sequence whose first rows are missing drafts on what came after them."""
    some = probe(LAZY)
    some.extend(50)
    some.forget()
    some.extend(30)
    assert some.positions == (79, 30, -1, -1)
    some.draft()
    assert some.positions == (79, 0, 50, 79)


# ---- the engine ----


def test_engine_that_never_drafts_injects_nothing(f32_target: Path, f32_drafter: Path) -> None:
    """A drafter is loaded, and nothing is kept for it."""
    target = _core.Model.load_target(str(f32_target))
    drafter = _core.Model.load_drafter(str(f32_drafter), target)
    prompt = target.tokenize("What is the sum of 12 and 30?")
    off = exact_engine(target, drafter, n_ctx=512, policy="off")
    assert run(off, [prompt], lambda i: greedy(8, ignore_eos=True), has_drafter=False)[0].tokens
    assert off.stats.inject_ms == 0


def test_requests_that_never_draft_leave_no_context(f32_target: Path, f32_drafter: Path) -> None:
    """Side by side with one that drafts; then the sequence goes to a request that drafts from the start."""
    target = _core.Model.load_target(str(f32_target))
    drafter = _core.Model.load_drafter(str(f32_drafter), target)
    engine = exact_engine(target, drafter, n_ctx=512, n_parallel=2)
    prompts = [target.tokenize(f"What is the sum of {i} and 30?") for i in range(6)]
    limits = [0, -1, -1, 0, 3, -1]
    answers = run(
        engine, prompts, lambda i: greedy(24, draft_limit=limits[i], ignore_eos=True)
    )  # run() checks both caches
    assert [answer.stats.n_drafted > 0 for answer in answers] == [limit != 0 for limit in limits]
    alone = run(exact_engine(target, drafter, n_ctx=512), [prompts[5]], lambda i: greedy(24, ignore_eos=True))
    assert answers[5].tokens == alone[0].tokens
