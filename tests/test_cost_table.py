"""The cost table: jagged curves stay, noise and outliers do not move them, a slow machine does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core

_costs = _core._scheduling  # type: ignore[attr-defined]

VERIFY = [(1, 24.0), (2, 46.0), (3, 66.0), (4, 74.0), (5, 142.0), (8, 150.0)]  # cliffs at 2 and at 5


def curves(**changes: Any) -> dict[str, Any]:
    return {
        "verify": VERIFY,
        "plain": [],
        "prefill": [(1, 20.0), (4, 60.0), (64, 400.0)],
        "draft": [(1, 10.0), (4, 25.0)],
        "inject": [],
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
        **changes,
    }


def test_known_sizes_keep_their_own_value_and_others_lie_between() -> None:
    table = _costs.CostTable(curves())
    assert [table.verify_ms(n) for n, _ in VERIFY] == [ms for _, ms in VERIFY]
    assert table.verify_ms(6) == pytest.approx(142 + 8 / 3)
    assert table.verify_ms(15) == pytest.approx(150 + 7 * (150 - 24) / 7)  # slope of the whole curve
    assert table.draft_ms(0) == 0
    assert table.draft_ms(2) == 15


def test_prefill_rows_bring_their_own_cost_and_decoding_rows_the_output_head() -> None:
    table = _costs.CostTable(curves())
    body = 400 - 2 * 340 / 60
    assert table.verify_ms(2, n_prefill_rows=60) == pytest.approx(body + 46 - (20 + 40 / 3))
    assert table.verify_ms(0, n_prefill_rows=64) == 400


def test_an_empty_table_costs_nothing_until_a_size_was_seen() -> None:
    table = _costs.CostTable()
    assert table.verify_ms(3) == table.draft_ms(1) == 0
    for _ in range(7):
        table.observe_draft(1, 5.0)
        table.observe_verify(1, 20.0)
    assert table.verify_ms(1) == 20
    assert table.draft_ms(1) == 5


def test_outliers_move_nothing() -> None:
    """Every seventh pass is held up twentyfold."""
    table = _costs.CostTable(curves())
    for step in range(60):
        table.observe_verify(1 + step % 5, dict(VERIFY)[1 + step % 5] * (20 if step % 7 == 0 else 1))
    assert [table.verify_ms(n) for n in range(1, 6)] == pytest.approx([ms for _, ms in VERIFY[:5]])


@pytest.mark.parametrize("sizes", [[1], [1, 5], [1, 2, 3, 4, 5, 8]])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_slow_machine_scales_all_sizes_within_a_few_steps_and_no_curve(sizes: list[int], factor: float) -> None:
    """Sizes that were not seen since are scaled too: else a plain step would look dear beside a drafted one."""
    rng = np.random.default_rng(0)
    table = _costs.CostTable(curves())
    known = dict(VERIFY)
    for step in range(40):
        n = sizes[step % len(sizes)]
        table.observe_draft(1, 10.0)
        table.observe_verify(n, known[n])
    for step in range(60):
        n = sizes[int(rng.integers(len(sizes)))]
        table.observe_draft(1, 10.0 * factor)
        table.observe_verify(n, known[n] * factor)
        if step >= 5:
            estimates = [table.verify_ms(size) for size, _ in VERIFY]
            assert estimates == pytest.approx([ms * factor for _, ms in VERIFY]), step
            assert table.draft_ms(1) == pytest.approx(10 * factor)
    fastest = min(factor, 1.0)  # what is kept for later processes
    assert [ms for _, ms in table.curves["verify"]] == pytest.approx([ms * fastest for _, ms in VERIFY])


def test_a_size_measured_wrong_at_load_is_put_right() -> None:
    table = _costs.CostTable(curves(verify=[(1, 24.0), (2, 90.0), (3, 66.0), (4, 74.0)]))
    for step in range(60):
        n = 1 + step % 4
        table.observe_verify(n, dict(VERIFY)[n])
    assert [table.verify_ms(n) for n in range(1, 5)] == pytest.approx([24, 46, 66, 74])


def test_a_pass_is_never_cheaper_than_a_smaller_one() -> None:
    """What a slow second of the machine did to some sizes at load is spread over those that contradict it."""
    table = _costs.CostTable(curves(verify=[(1, 85.5), (2, 108.0), (3, 95.0), (4, 80.0), (5, 86.0), (8, 150.0)]))
    assert [table.verify_ms(n) for n in (1, 2, 3, 4, 5, 8)] == pytest.approx([85.5, *[92.25] * 4, 150.0])
    for _ in range(20):
        table.observe_verify(1, 85.5)
        table.observe_verify(4, 80.0)
    assert table.verify_ms(4) == pytest.approx(81, abs=1)  # what was seen often counts more
    assert table.verify_ms(2) == pytest.approx(table.verify_ms(4))


def test_a_larger_pass_that_is_far_cheaper_is_a_cliff() -> None:
    """As where a GPU's kernels for many rows begin."""
    table = _costs.CostTable(curves(verify=[(1, 10.0), (8, 40.0), (9, 20.0), (16, 22.0)]))
    assert [table.verify_ms(n) for n in (1, 8, 9, 16)] == [10.0, 40.0, 20.0, 22.0]


def test_a_new_size_counts_after_three_passes() -> None:
    table = _costs.CostTable(curves())
    for _ in range(2):
        table.observe_verify(7, 200.0)
    for _ in range(4):
        table.observe_verify(1, 24.0)
    assert table.verify_ms(7) < 150
    for _ in range(3):
        table.observe_verify(7, 200.0)
    for _ in range(4):
        table.observe_verify(1, 24.0)
    assert table.verify_ms(7) == pytest.approx(200, rel=0.05)  # 8 rows, at load 150, were not seen since


def test_outliers_of_a_new_size_teach_nothing() -> None:
    """Three passes, two of them held up: the guess from its neighbours stands."""
    table = _costs.CostTable(curves())
    for ms in (3000.0, 148.0, 3000.0):
        table.observe_verify(7, ms)
        table.observe_verify(1, 24.0)
    for _ in range(8):
        table.observe_verify(1, 24.0)
    assert table.verify_ms(7) == pytest.approx(148, rel=0.01)


def test_plain_decoding_repeats_a_shape_and_has_a_curve_of_its_own() -> None:
    table = _costs.CostTable(curves(plain=[(1, 20.0), (2, 40.0)]))
    assert table.verify_ms(1) == 24
    assert table.verify_ms(1, is_repeat=True) == 20
    for _ in range(20):
        table.observe_verify(2, 30.0, is_repeat=True)
        table.observe_verify(1, 20.0, is_repeat=True)
        table.observe_verify(1, 24.0)
    assert table.verify_ms(2, is_repeat=True) == pytest.approx(30)
    assert table.verify_ms(2) == pytest.approx(46)
    assert dict(table.curves["plain"])[2] == pytest.approx(30)
    assert _costs.CostTable(curves()).verify_ms(1, is_repeat=True) == 24  # not measured: as any other pass


def test_overhead_is_a_line_over_drafted_rows_whatever_holds_a_step_up() -> None:
    rng = np.random.default_rng(1)
    line = _costs.OverheadLine()
    assert line.at(5) == 0
    for step in range(200):
        n_rows = int(rng.integers(0, 20))
        ms = 0.1 + 0.01 * n_rows + 0.01 * rng.normal()
        line.push(n_rows, 50.0 if step % 29 == 28 else max(0.0, ms))
    assert line.at(0) == pytest.approx(0.1, abs=0.05)
    assert line.at(20) == pytest.approx(0.3, abs=0.08)


def test_overhead_of_steps_that_all_draft_alike_counts_for_every_step() -> None:
    """Nothing tells what the rows have of it: both alternatives are charged the same."""
    line = _costs.OverheadLine()
    for _ in range(30):
        line.push(7, 0.4)
    assert line.at(0) == line.at(7) == pytest.approx(0.4)


def test_context_buckets_double() -> None:
    cells = [0, 512, 513, 1024, 1025, 4096, 4097]
    assert [_costs.context_bucket(n) for n in cells] == [0, 0, 1, 1, 2, 3, 4]


def test_context_adds_per_row_and_cell_until_its_bucket_was_seen() -> None:
    table = _costs.CostTable(curves(verify_ms_per_row_cell=0.001, draft_ms_per_block_cell=0.002))
    assert table.verify_ms(2, n_cells=300) == pytest.approx(46 + 0.001 * (1 + 1 / 3) * 300)
    assert table.verify_ms(2, n_cells=2000) == pytest.approx(46 + 0.001 * (1 + 1 / 3) * 2000)
    assert table.draft_ms(1, 2000) == pytest.approx(10 + 0.002 * 2000)
    for _ in range(8):
        table.observe_verify(2, 50.0, n_cells=2000)
    assert table.verify_ms(2, n_cells=2000) == 50
    assert table.verify_ms(2) == 46


def test_what_steps_of_some_context_take_says_the_same_of_others() -> None:
    table = _costs.CostTable(curves(verify_ms_per_row_cell=0.05))
    for _ in range(20):
        table.observe_verify(1, 26.0 + 0.05 * 300, n_cells=300)  # load timed 24
    assert table.verify_ms(1) == pytest.approx(26, rel=0.05)
    assert table.verify_ms(1, n_cells=500) == pytest.approx(26 + 0.05 * 500, rel=0.05)


def test_slope_of_the_context_is_learned_where_load_did_not_measure_it() -> None:
    table = _costs.CostTable(curves())
    for _ in range(8):
        table.observe_verify(1, 24.0 + 4.0, n_cells=2000)
    assert table.verify_ms(4, n_cells=4000) == pytest.approx(74 + 0.002 * (1 + 3 / 3) * 4000)


def test_plain_steps_in_a_deep_context_correct_what_verifying_is_taken_to_cost_there() -> None:
    table = _costs.CostTable(curves(plain=[(1, 20.0)], verify_ms_per_row_cell=0.01))
    dear_ms = table.verify_ms(4, n_cells=4000)
    for _ in range(8):
        table.observe_verify(1, 20.0 + 0.002 * 4000, n_cells=4000, is_repeat=True)
    assert table.verify_ms(4, n_cells=4000) == pytest.approx(74 + 0.002 * (1 + 3 / 3) * 4000)
    assert dear_ms == pytest.approx(74 + 0.01 * (1 + 3 / 3) * 4000)


def test_rows_read_the_cells_of_their_own_sequence() -> None:
    table = _costs.CostTable(curves(verify_ms_per_row_cell=0.001))
    alone = table.verify_ms(2, n_cells=4000) - 46
    assert alone == pytest.approx(0.001 * (1 + 1 / 3) * 4000)
    assert table.verify_ms(2, n_cells=4000, n_sequences=2) - 46 == pytest.approx(0.001 * 4000)
    assert table.verify_ms(4, n_cells=4000, n_sequences=2) - 74 == pytest.approx(0.001 * (1 + 1 / 3) * 4000)
    # One of four that decodes, while three still read their prompts: its own cells alone.
    assert table.verify_ms(1, n_cells=4000, n_sequences=4) - 24 == pytest.approx(0.001 * 1000)


def test_what_plain_steps_of_many_show_prices_their_drafts() -> None:
    table = _costs.CostTable(curves())
    for _ in range(12):
        table.observe_verify(4, 74 + 0.002 * 4000, n_cells=4000, n_sequences=4)
    assert table.verify_ms(2, n_cells=4000) == pytest.approx(46 + 0.002 * (1 + 1 / 3) * 4000)


def test_a_free_pass_is_no_division_by_zero() -> None:
    table = _costs.CostTable(curves(verify=[(1, 0.0), (2, 10.0)]))
    for _ in range(20):
        table.observe_verify(1, 3.0)
    assert math.isfinite(table.verify_ms(1))
    assert table.verify_ms(2) == pytest.approx(10)


def test_curves_go_round() -> None:
    given = curves(verify_ms_per_row_cell=0.25)
    assert _costs.CostTable(given).curves == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verify": [(0, 1.0)]}, "cost curve verify must have ascending sizes"),
        ({"plain": [(1, -1.0)]}, "cost curve plain must have ascending sizes"),
        ({"draft": [(2, 1.0), (2, 1.0)]}, "cost curve draft must have ascending sizes"),
        ({"prefill": [(1, -1.0)]}, "times of 0 ms or more, got -1"),
        ({"verify": [(1, math.nan)]}, "cost curve verify"),
        ({"verify": [(1, math.inf)]}, "cost curve verify"),
        ({"verify_ms_per_row_cell": -1.0}, "must be 0 or more"),
        ({"draft_ms_per_block_cell": math.nan}, "must be 0 or more"),
    ],
)
def test_curves_are_validated(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _costs.CostTable(curves(**change))


# ---- wrong prices ----


def settle(table: Any) -> None:
    for _ in range(5):
        table.observe_verify(1, 24.0)


def test_one_pass_that_is_far_cheaper_proves_a_price_wrong_and_those_of_smaller_sizes() -> None:
    """Noise only adds. Those that were timed since load stay."""
    table = _costs.CostTable(curves(verify=[(1, 24.0), (2, 46.0), (3, 400.0), (4, 700.0), (8, 1500.0)]))
    settle(table)
    table.observe_draft(1, 10.0)
    table.observe_verify(4, 74.0)
    settle(table)
    assert [table.verify_ms(n) for n in (1, 2, 3, 4, 8)] == pytest.approx([24, 46, 74, 74, 1500])


def test_a_size_that_is_priced_wrong_is_no_change_of_the_machine() -> None:
    """The draft, which takes what it should, shows which of the two it is."""
    table = _costs.CostTable(curves(verify=[(1, 24.0), (4, 7.4), (8, 150.0)]))
    for _ in range(12):
        table.observe_draft(1, 10.0)
        table.observe_verify(4, 74.0)
    assert table.slowdown() == 1
    assert [table.verify_ms(n) for n in (1, 4, 8)] == pytest.approx([24, 74, 150])
    assert table.draft_ms(1) == 10


def test_plain_passes_are_never_priced_above_drafted_ones() -> None:
    table = _costs.CostTable(curves(plain=[(1, 240.0), (2, 400.0)]))
    for _ in range(5):
        table.observe_draft(1, 10.0)
        table.observe_verify(2, 46.0)
    assert table.verify_ms(1, is_repeat=True) == table.verify_ms(2, is_repeat=True) == 46


# ---- measured on the demo pair ----

AMPLE_MS = 1e6  # a second is enough, and a machine that stands still meanwhile leaves no size out


@pytest.fixture(scope="module")
def engine(demo_target: Path, demo_drafter: Path) -> Iterator[_core.Engine]:
    target = _core.Model.load_target(str(demo_target))
    drafter = _core.Model.load_drafter(str(demo_drafter), target)
    engine = _core.Engine(target, drafter, n_ctx=1024, n_parallel=2, n_threads=1)
    yield engine
    engine.close()


def test_measured_costs_reach_every_size_and_leave_the_engine_as_it_was(engine: _core.Engine) -> None:
    measured = engine.measure_costs(budget_ms=AMPLE_MS)
    assert [size for size, _ in measured["verify"]] == list(range(1, 17))
    assert [size for size, _ in measured["draft"]] == [1, 2]
    assert [size for size, _ in measured["plain"]] == [1, 2]
    assert [size for size, _ in measured["prefill"]][:4] == [1, 2, 4, 8]
    assert all(ms > 0 for name in ("verify", "plain", "prefill", "draft") for _, ms in measured[name])  # type: ignore[literal-required]
    assert engine.costs == measured
    options = _core.RequestOptions(max_tokens=4, temperature=0)
    engine.submit([1, 2, 3], options)  # any row left in a cache would be a gap
    reasons = []
    while engine.has_work:
        reasons += [event.finish_reason for event in engine.step() if event.finish_reason]
    assert reasons in (["length"], ["stop"])


def test_a_look_times_few_sizes_and_leaves_the_costs_alone(engine: _core.Engine) -> None:
    measured = engine.measure_costs(budget_ms=AMPLE_MS)
    look = engine.measure_costs(budget_ms=AMPLE_MS, look=True)
    assert [size for size, _ in look["verify"]] == [4, 8, 16]
    assert [size for size, _ in look["plain"]] == [size for size, _ in look["draft"]] == [1]
    assert look["prefill"] == look["inject"] == []
    assert engine.costs == measured


def test_costs_are_not_measured_beside_requests(engine: _core.Engine) -> None:
    engine.submit([1, 2, 3], _core.RequestOptions(max_tokens=50, ignore_eos=True))
    engine.step()
    with pytest.raises(_core_error(), match="requests are running"):
        engine.measure_costs()
    while engine.has_work:
        engine.step()


def _core_error() -> type[Exception]:
    from dspark_cpp.errors import DSparkError

    return DSparkError


def test_what_slows_plain_passes_alone_makes_drafted_ones_no_dearer() -> None:
    table = _costs.CostTable(curves(plain=[(1, 20.0)]))
    for _ in range(20):
        table.observe_verify(1, 30.0, is_repeat=True)
    assert table.draft_ms(1) == pytest.approx(10 * 1.5**0.5)  # not known yet
    for _ in range(5):
        table.observe_verify(4, 74.0)  # probes
        for _ in range(20):
            table.observe_verify(1, 30.0, is_repeat=True)
    assert table.verify_ms(1, is_repeat=True) == pytest.approx(30)
    assert table.verify_ms(8) == pytest.approx(150)
    assert table.draft_ms(1) == pytest.approx(10)


def test_a_slow_moment_fades_while_the_other_kind_runs() -> None:
    table = _costs.CostTable(curves(plain=[(1, 20.0)]))
    for _ in range(9):
        table.observe_verify(1, 60.0, is_repeat=True)  # three times what load measured
    assert table.verify_ms(1, is_repeat=True) == pytest.approx(60)
    for _ in range(64):
        table.observe_verify(4, 74.0)  # as at load
    assert table.verify_ms(1, is_repeat=True) == pytest.approx(20 * 3 ** np.exp(-1))


def test_a_slow_moment_of_drafted_passes_fades_down_to_what_is_usual() -> None:
    table = _costs.CostTable(curves(plain=[(1, 20.0)]))
    for _ in range(9):
        table.observe_verify(4, 3 * 74.0)
    assert table.verify_ms(4) == pytest.approx(3 * 74)
    for _ in range(100):
        table.observe_verify(1, 20.0, is_repeat=True)
    assert table.verify_ms(4) == pytest.approx(74 * 1.5 * 2 ** np.exp(-1))


def test_a_size_that_load_took_for_too_cheap_makes_plain_decoding_of_another_no_dearer() -> None:
    """The last request of a crowd, slower than load said, was taken for a slow machine when the next crowd came."""
    table = _costs.CostTable(curves(plain=[(1, 20.0), (16, 60.0)], verify_ms_per_row_cell=0.01))
    for _ in range(30):
        table.observe_verify(16, 40.0, is_repeat=True)
    for _ in range(9):
        table.observe_verify(1, 30.0, is_repeat=True)
    assert table.verify_ms(16, is_repeat=True) == pytest.approx(40)
    deep = table.verify_ms(16, is_repeat=True, n_cells=4096) / table.verify_ms(16, is_repeat=True)
    assert deep > 2  # what it took is no bound for a context that it did not have
