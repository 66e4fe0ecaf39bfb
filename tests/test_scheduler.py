"""The scheduler as a whole, on an engine in miniature (scheduling_simulation.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from dspark_cpp import _core
from scheduling_machine import MachineSimulation, compare, n_tokens_of
from scheduling_oracle import OracleSimulation
from scheduling_simulation import BLOCK, Setting, Simulation, curves, draft_ms, fixed_lengths, row_ms

_scheduling = _core._scheduling  # type: ignore[attr-defined]
USELESS = Setting("linear", 0.0, draft_share=1.0)
GOOD = Setting("flat", 0.9)


def scheduler(setting: Setting = GOOD, **options: object) -> _scheduling.Scheduler:
    return _scheduling.Scheduler(costs=curves(setting), block_size=BLOCK, **options)


def test_a_useless_drafter_is_parked_and_probing_costs_less_than_a_hundredth() -> None:
    simulation = Simulation(USELESS)
    simulation.run(100)
    result = simulation.run(4000)
    assert result.parked_share > 0.97
    assert 0 < result.probe_share < 0.01


def test_drafts_that_cost_more_than_they_can_gain_are_parked_from_the_start() -> None:
    simulation = Simulation(Setting("linear", 0.9, draft_share=10.0))
    simulation.step()
    assert simulation.n_parked == 1
    n_tokens, extra_ms, plain_ms = simulation.scheduler.outlook
    assert extra_ms > 260  # ten plain steps for the draft alone
    assert 0 < n_tokens < BLOCK
    assert plain_ms >= 26


def test_it_recovers_when_the_drafter_becomes_good() -> None:
    simulation = Simulation(Setting("flat", 0.0, draft_share=0.5))
    simulation.run(300)
    assert simulation.run(100).parked_share > 0.9
    simulation.rates = [0.9]
    simulation.run(1200)
    assert simulation.run(100).parked_share < 0.1


@pytest.mark.parametrize("n_requests", [1, 4])
@pytest.mark.parametrize("curve", ["flat", "linear", "cliffs"])
@pytest.mark.parametrize("rate", [0.0, 0.6, 0.95])
def test_never_slower_than_plain_nor_than_the_best_fixed_length(curve: str, rate: float, n_requests: int) -> None:
    """From the 900th step on (near a tie, rare probes take that long to tell), against hindsight on the same rounds."""
    simulation = Simulation(Setting(curve, rate, n_requests))
    simulation.run(900)
    simulation.accepted.clear()
    result = simulation.run(500)
    fixed = fixed_lengths(simulation)
    assert result.tokens_per_ms > 0.98 * fixed[0]
    assert result.tokens_per_ms > 0.98 * max(fixed)


@pytest.mark.parametrize(
    ("machine", "drafter", "n_streams"),
    [("demo", "good", 8), ("demo", "useless", 16), ("cpu", "useless", 2), ("gpu", "good", 4), ("gpu", "useless", 4)],
)
def test_never_slower_than_plain_on_a_machine_that_is_not_what_it_was_at_load(
    machine: str, drafter: str, n_streams: int
) -> None:
    """Costs are off by a tenth, speeds change: the mean of four machines."""
    ratios = [
        MachineSimulation(machine, drafter, n_streams, seed, "off").run(10).ms
        / MachineSimulation(machine, drafter, n_streams, seed).run(10).ms
        for seed in range(4)
    ]
    assert np.mean(ratios) > 0.98


@pytest.mark.parametrize(("machine", "drafter", "n_streams"), [("demo", "mixed", 2), ("cpu", "mixed", 4)])
def test_the_oracle_beats_every_fixed_length_and_the_scheduler_comes_near(
    machine: str, drafter: str, n_streams: int
) -> None:
    """Where nothing is off, knowing the confidences is worth 5 to 8 % of the best length in hindsight."""
    to_best = compare(machine, drafter, n_streams, 0, is_ideal=True)[1]
    simulation = MachineSimulation(machine, drafter, n_streams, is_ideal=True)
    oracle = OracleSimulation(machine, drafter, n_streams)
    to_oracle = oracle.flow(n_tokens_of(n_streams)) / simulation.flow(n_tokens_of(n_streams))
    assert to_best > 1.0
    assert to_best / to_oracle > 1.02
    assert to_oracle > 0.97


def test_prices_from_load_that_are_too_high_are_found_out() -> None:
    """A size that looks too dear is tried: steps that keep away from it would never show what it takes."""
    rng, true = np.random.default_rng(0), [20.0 + n for n in range(1, 9)]
    given = curves(GOOD) | {"verify": [(n, ms + (1.2 if n == 8 else 0)) for n, ms in enumerate(true, 1)]}
    bound = _scheduling.Scheduler(costs=given | {"draft": [(1, 2.0)]}, block_size=BLOCK)
    lengths = []
    for _ in range(200):
        bound.select([{"id": 1}])
        [length] = bound.schedule([[1.5] * BLOCK])
        n_accepted = int(np.argmin([*(rng.random(length) < 0.82), False]))
        ms = true[length]
        bound.observe_round(0, length, n_accepted)
        bound.observe_step(
            n_drafting=1, n_drafted_rows=length, n_committed=1 + n_accepted, draft_ms=2, verify_ms=ms, total_ms=2 + ms
        )
        lengths.append(length)
    assert lengths.count(BLOCK) > 100


def test_plain_decoding_is_priced_as_passes_of_one_shape() -> None:
    """What a draft is weighed against is not a pass between drafts, whose graph is built anew, but plain steps in a
    row."""
    given = curves(Setting("linear", 0.9, draft_share=0.1)) | {"verify": [(n, 20.0 + n) for n in range(1, 9)]}
    request = [{"id": 1}]
    assert _scheduling.Scheduler(costs=given, block_size=BLOCK).select(request) == ["draft"]
    cheap = given | {"plain": [(1, 5.0)]}
    assert _scheduling.Scheduler(costs=cheap, block_size=BLOCK).select(request) == ["parked"]


def test_plain_steps_that_have_become_slow_do_not_make_drafted_ones_cheaper_than_themselves() -> None:
    """While nobody drafts, nothing tells whether drafted passes have become slow too."""
    useless = [("exact", 0.0, [1.0] * BLOCK, [0.01] * BLOCK, [], [])]
    bound = scheduler(USELESS, calibration=useless)

    def observe(n_drafted: int, draft_ms: float, verify_ms: float) -> None:
        bound.observe_step(
            n_drafting=n_drafted,
            n_drafted_rows=n_drafted,
            n_committed=1,
            draft_ms=draft_ms,
            verify_ms=verify_ms,
            total_ms=draft_ms + verify_ms,
        )

    for _ in range(10):
        bound.select([{"id": 1, "policy": "fixed:1"}])
        observe(1, 26, 42)
    for _ in range(40):
        bound.select([{"id": 1}])
        observe(0, 0, 3 * 26)
        assert bound.select([{"id": 1}]) == ["parked"]


def test_plain_steps_that_have_become_fast_again_are_found_out() -> None:
    """While drafts go on, no plain step shows what it takes: some are run now and then."""
    simulation = Simulation(Setting("linear", 0.6, draft_share=0.2), seed=1)
    simulation.plain_factor = 1.3
    simulation.run(600)
    assert simulation.run(100).parked_share < 0.2
    simulation.plain_factor = 1.0
    simulation.run(400)
    assert simulation.run(300).parked_share > 0.9


def test_comparing_with_plain_steps_costs_less_than_a_hundredth() -> None:
    simulation = Simulation(Setting("flat", 0.9, draft_share=3.0))  # drafting is 1.5 times as fast
    simulation.run(600)
    simulation.accepted.clear()
    result = simulation.run(2000)
    assert 0 < result.parked_share < 0.05
    assert result.tokens_per_ms > 0.99 * max(fixed_lengths(simulation))


def test_probing_costs_less_and_less_while_it_fails() -> None:
    simulation = Simulation(USELESS)
    simulation.run(1500)
    assert 0 < simulation.run(3000).probe_share < 0.003


def test_probes_that_could_show_nothing_are_hardly_ever_run() -> None:
    """Eight requests: a row costs as much as a token is worth, a draft four tokens, so no acceptance makes it pay."""
    simulation = Simulation(Setting("linear", 0.95, 8, draft_share=8.0))
    result = simulation.run(3000)
    assert result.parked_share > 0.99
    assert 0 < result.probe_share < 0.002


def test_plain_passes_of_changing_shapes_do_not_make_drafts_look_cheap() -> None:
    """A plain pass behind one of another number of rows is dearer than others, yet no drafted one."""
    setting = Setting("linear", 0.9, 4, draft_share=0.5)
    given = curves(setting) | {"plain": [(n, 0.95 * row_ms(setting, n)) for n in range(1, 5)]}
    bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)
    requests = [{"id": i} for i in range(1, 5)]
    bound.select(requests)
    extra_ms = bound.outlook[1]
    for step in range(40):
        n = 3 + step % 2
        ms = 1.1 * row_ms(setting, n)
        bound.select(requests[:n])
        bound.observe_step(n_drafting=0, n_drafted_rows=0, n_committed=n, draft_ms=0, verify_ms=ms, total_ms=ms)
    bound.select(requests)
    assert extra_ms <= bound.outlook[1] < 1.05 * extra_ms  # the way there and back counts by now


def test_a_prompt_is_not_injected_for_an_answer_that_is_nearly_over() -> None:
    given = curves(Setting("flat", 0.9, draft_share=0.3, n_prompt=1))
    given["inject"] = [(1, 1.0), (1000, 1000.0)]
    first = {"id": 1, "n_waiting": 300}  # 15 plain steps' worth of time
    bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)
    assert bound.select([first | {"n_left": 500}]) == ["draft"]
    assert bound.select([first | {"n_left": 6, "most": 5}]) == ["parked"]
    injected = {"id": 2, "n_left": 6, "most": 5, "n_waiting": 2}
    assert bound.select([injected]) == ["draft"]
    bound.finish(3, 6)  # one short answer does not make the next one short
    assert bound.select([first | {"n_left": 500}]) == ["draft"]
    for request_id in range(4, 30):
        bound.finish(request_id, 6)  # answers here are short, whatever they may be
    assert bound.select([first | {"n_left": 500}]) == ["parked"]
    long = {"id": 30, "n_left": 500, "n_waiting": 300, "n_written": 200}  # but not this one
    assert bound.select([long]) == ["draft"]


def test_the_price_of_time_does_not_swing_with_luck() -> None:
    """Twenty rounds in which all is accepted make later time no dearer than their text makes it."""
    setting = Setting("linear", 0.95, 1, 0.1)
    lucky, usual = Simulation(setting), Simulation(setting)
    usual.run(300)
    lucky.rates = [0.9999]
    lucky.run(20)
    lucky.rates = [setting.rate]
    lucky.run(280)
    assert lucky.run(300).parked_share < 0.3
    assert usual.run(300).parked_share < 0.3


@pytest.mark.parametrize("bias", [-2.0, 2.0])
@pytest.mark.parametrize("curve", ["flat", "linear", "cliffs"])
def test_a_wrong_calibration_costs_nothing_beside_plain_decoding(curve: str, bias: float) -> None:
    for rate in (0.2, 0.9):
        simulation = Simulation(Setting(curve, rate, 2, bias=bias))
        simulation.run(150)
        simulation.accepted.clear()
        result = simulation.run(400)
        assert result.tokens_per_ms > 0.98 * fixed_lengths(simulation)[0]


@pytest.mark.parametrize("n_requests", [1, 4])
@pytest.mark.parametrize("curve", ["flat", "linear", "cliffs"])
def test_short_answers_of_easy_and_hard_texts_are_never_slower_than_plain(curve: str, n_requests: int) -> None:
    """Every answer has 64 tokens behind a prompt of 30 that its first draft injects."""
    simulation = Simulation(Setting(curve, 0.8, n_requests, n_tokens=64, n_prompt=30))
    rng = np.random.default_rng(5)
    for step in range(500):
        if step % 20 == 0:
            simulation.rates = [float(rate) for rate in rng.choice([0.95, 0.2], n_requests)]
        simulation.step()
        if step == 100:
            simulation.accepted.clear()
            ms, tokens = simulation.ms, sum(simulation.n_tokens)
    speed = (sum(simulation.n_tokens) - tokens) / (simulation.ms - ms)
    assert speed > 0.98 * fixed_lengths(simulation)[0]


def test_latency_gives_the_slower_request_more() -> None:
    shares = {}
    for objective in ("throughput", "latency"):
        simulation = Simulation(Setting("linear", 0.9, 2, 0.05), objective=objective)
        simulation.rates = [0.97, 0.6]
        simulation.run(600)
        shares[objective] = simulation.n_tokens[1] / sum(simulation.n_tokens)
    assert shares["latency"] >= shares["throughput"]


def test_every_request_has_its_own_policy_and_limit() -> None:
    requests = [
        {"id": 1, "policy": "off"},
        {"id": 2, "policy": "fixed:3"},
        {"id": 3, "policy": "fixed:3", "most": 2},
        {"id": 4, "policy": "threshold:0.5"},
        {"id": 5, "policy": "algorithm1", "most": 1},
        {"id": 6, "most": 2},
        {"id": 7, "most": 0},
    ]
    mixed = scheduler(Setting("flat", 0.9, 7, 0.05))
    decisions = mixed.select(requests)
    assert decisions == ["none", "draft", "draft", "draft", "draft", "draft", "none"]
    confident = [3.0] * BLOCK
    logits = [[], confident, confident, [3.0, 3.0, -3.0, 3.0, 3.0, 3.0, 3.0], confident, confident, []]
    assert mixed.schedule(logits) == [0, 3, 2, 2, 1, 2, 0]


def test_threshold_reads_the_raw_confidence_whatever_was_learned() -> None:
    bound = scheduler(policy="threshold:0.5", calibration=[("exact", 0.0, [9.0] * BLOCK, [0.01] * BLOCK, [], [])])
    assert bound.select([{"id": 1}]) == ["draft"]
    assert bound.schedule([[0.1] * 4 + [-0.1] * 3]) == [4]


def test_equal_lengths_are_of_all_requests_or_none() -> None:
    bound = scheduler(Setting("flat", 0.9, 3, 0.05), equal_lengths=True)
    assert bound.select([{"id": 1}, {"id": 2}, {"id": 3, "most": 5}]) == ["draft"] * 3
    lengths = bound.schedule([[2.0] * BLOCK] * 3)
    assert len(set(lengths)) == 1
    assert 1 <= lengths[0] <= 5
    assert bound.select([{"id": 1}, {"id": 2}, {"id": 3, "most": 0}]) == ["parked", "parked", "none"]
    assert bound.select([{"id": 1, "policy": "fixed:2"}, {"id": 2, "policy": "off"}]) == ["parked", "none"]


def test_a_parked_group_of_equal_lengths_is_probed_together() -> None:
    simulation = Simulation(Setting("flat", 0.0, 2, 4.0), equal_lengths=True)
    decisions = set()
    for _ in range(2000):
        simulation.step()
        decisions.add(tuple(simulation.decisions))
    assert ("probe", "probe") in decisions
    assert decisions <= {("probe", "probe"), ("parked", "parked"), ("draft", "draft"), ("timed", "timed")}


def test_prefill_rows_in_the_step_make_rows_dearer_or_cheaper_as_measured() -> None:
    """64 prompt rows fill a tile of 64: one more row is another tile, and nobody drafts."""
    given = {
        "verify": [(n, 10.0) for n in range(1, 9)],
        "prefill": [(1, 10.0), (65, 100.0), (66, 800.0), (72, 800.0)],
        "draft": [(1, 1.0)],
        "inject": [],
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
    }
    bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)
    assert bound.select([{"id": 1}]) == ["draft"]
    assert bound.select([{"id": 1}], n_prefill_rows=64) == ["parked"]
    assert bound.select([{"id": 1}]) == ["draft"]


def test_prompts_beside_rounds_do_not_make_time_look_cheap() -> None:
    """7 rows more are worth less than their time, whatever prompts take in the same step."""
    given = {
        "verify": [(n, 10.0 * n) for n in range(1, 9)],
        "plain": [(1, 10.0)],
        "prefill": [(n, 10.0 * n) for n in (1, 8, 16, 64, 128)],
        "draft": [(1, 1.0)],
        "inject": [],
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
    }
    for n_prefill_rows in (0, 1, 8, 100):
        bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)
        assert bound.select([{"id": 1}], n_prefill_rows=n_prefill_rows) == ["parked"]


def test_parked_requests_are_looked_at_again_after_eight_steps_or_when_others_come() -> None:
    setting = Setting("linear", 0.9, 2, draft_share=10.0)
    bound = scheduler(setting)
    assert bound.select([{"id": 1}]) == ["parked"]
    bound.observe_step(n_drafting=0, n_drafted_rows=0, n_committed=1, draft_ms=0, verify_ms=26, total_ms=26)
    assert bound.select([{"id": 1}, {"id": 2, "policy": "fixed:1"}]) == ["parked", "draft"]
    assert bound.select([{"id": 1}, {"id": 3}]) == ["parked", "parked"]
    cheap = scheduler(Setting("flat", 0.9, 2, draft_share=0.1))
    assert cheap.select([{"id": 1, "most": 0}]) == ["none"]  # nobody parked: nothing to go on with
    assert cheap.select([{"id": 1}]) == ["draft"]


def test_of_many_parked_requests_one_may_come_or_go_before_the_next_look() -> None:
    def select(bound: Any, ids: Sequence[int]) -> list[str]:
        """A new request would be drafted for if it was looked at: it alone may have more than one token drafted."""
        decisions: list[str] = bound.select([{"id": i, "most": 7 if i > 4 else 1} for i in ids])
        return decisions

    near, far = Setting("flat", 0.9, 8, draft_share=0.42), Setting("flat", 0.9, 8, draft_share=0.6)
    ids = [1, 2, 3, 4]
    for setting, later in (
        (near, [1, 2, 3, 5]),
        (near, [1, 2, 3, 4, 5]),
        (near, [2, 3, 4]),
        (far, [1, 2, 5, 6]),  # it would take more than two to make drafts pay
    ):
        bound = scheduler(setting)
        assert select(bound, ids) == ["parked"] * 4
        assert select(bound, later) == ["parked"] * len(later)
    for setting, later in ((near, [1, 2, 5, 6]), (near, [1, 5]), (far, [1, 5, 6, 7])):
        bound = scheduler(setting)
        assert select(bound, ids) == ["parked"] * 4
        assert "draft" in select(bound, later)


def test_what_drafted_steps_take_beside_their_passes_makes_no_plain_step_dearer() -> None:
    bound = scheduler(Setting("flat", 0.9, draft_share=0.1))

    def step(n_drafting: int, n_rows: int, beside_ms: float) -> float:
        bound.select([{"id": 1}])
        passes = {"draft_ms": 2.0 * n_drafting, "verify_ms": 20 + 0.2 * n_rows}
        figures = {"n_drafting": n_drafting, "n_drafted_rows": n_rows, "n_committed": 1 + n_rows}
        bound.observe_step(**figures, **passes, total_ms=sum(passes.values()) + beside_ms)
        return float(bound.outlook[2])

    for _ in range(20):
        step(0, 0, 1.0)
    for i in range(200):
        plain_ms = step(1, 6 + i % 2, 8.5 - i % 2)  # of all rows or nearly: how it grows with them cannot be seen
    assert plain_ms == pytest.approx(21, rel=0.01)


def test_nothing_is_known_and_nothing_breaks() -> None:
    bound = _scheduling.Scheduler(block_size=BLOCK)
    for _ in range(20):
        assert bound.select([]) == []
        bound.observe_step(n_drafting=0, n_drafted_rows=0, n_committed=0, draft_ms=0, verify_ms=0, total_ms=0)
        bound.select([{"id": 1}])
        bound.schedule([[]])
        bound.observe_step(n_drafting=0, n_drafted_rows=0, n_committed=1, draft_ms=0, verify_ms=1, total_ms=1)
    assert bound.speedup == pytest.approx(1, abs=1e-9)


def test_plain_steps_count_once_they_have_settled() -> None:
    """The first ones behind others take longer: drafts are not weighed against them."""
    given = curves(Setting("linear", 0.9, draft_share=0.2)) | {"plain": [(1, 26.0)]}
    bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)

    def run(n_steps: int, *verify_ms: float) -> None:
        for step in range(n_steps):
            bound.select([{"id": 1, "policy": "off"}])
            ms = verify_ms[min(step, len(verify_ms) - 1)]
            bound.observe_step(
                n_drafting=0, n_drafted_rows=0, n_committed=1, draft_ms=0, verify_ms=ms, total_ms=ms
            )  # fmt: skip

    for _ in range(20):
        bound.select([{"id": 1, "policy": "fixed:1"}])
        bound.observe_step(
            n_drafting=1, n_drafted_rows=1, n_committed=2, draft_ms=5.2, verify_ms=42, total_ms=47.2
        )  # fmt: skip
        run(4, 26.0, 60.0, 60.0, 60.0)
    bound.select([{"id": 1}])
    assert bound.outlook[2] == pytest.approx(26, rel=0.1)
    run(12, 60.0)
    bound.select([{"id": 1}])
    assert bound.outlook[2] == pytest.approx(60, rel=0.1)


def test_plain_steps_that_never_settle_show_the_end_of_a_slow_moment() -> None:
    """Requests come and go, so that passes of one shape are few in a row."""
    given = curves(Setting("linear", 0.9, draft_share=0.2)) | {"plain": [(1, 26.0), (2, 30.0)]}
    bound = _scheduling.Scheduler(costs=given, block_size=BLOCK)

    def step(n_requests: int, ms: float) -> None:
        bound.select([{"id": i, "policy": "off"} for i in range(n_requests)])
        bound.observe_step(
            n_drafting=0, n_drafted_rows=0, n_committed=n_requests, draft_ms=0, verify_ms=ms, total_ms=ms
        )  # fmt: skip

    for _ in range(20):
        step(1, 52.0)
    bound.select([{"id": 1}])
    assert bound.outlook[2] == pytest.approx(52, rel=0.1)
    for _ in range(9):
        for n_requests, ms in ((2, 33.0), (2, 33.0), (1, 28.0), (1, 28.0)):
            step(n_requests, ms)
    bound.select([{"id": 1}])
    assert bound.outlook[2] == pytest.approx(28, rel=0.1)


def test_what_drafted_steps_take_beyond_their_price_is_priced() -> None:
    overrun = _scheduling.Overrun()
    assert overrun.n_steps == 0
    for _ in range(60):
        overrun.learn(0.5)
    assert overrun.n_steps == pytest.approx(0.5, rel=0.02)
    overrun.learn(100.0)  # held up
    assert overrun.n_steps < 0.7
    for _ in range(400):  # parked: what it was is no reason to stay so
        overrun.fade()
    assert overrun.n_steps == pytest.approx(0, abs=0.1)


def n_parked_before(trial: Any, promised: float, entry_ms: float = 20.0) -> int:
    """Milliseconds of plain steps until a trial of steps of 10 ms begins, which then runs to its end; 50,000: none."""
    for ms in range(50_000):
        if trial.goes_on(promised, 10.0, entry_ms):
            n_steps = 1
            while trial.goes_on(0.0, 10.0, entry_ms):
                n_steps += 1
            assert n_steps == 8
            return ms
        trial.earn(1.0)
    return 50_000


def test_a_trial_costs_a_small_share_of_the_time_and_less_after_others_have_failed() -> None:
    trial = _scheduling.Trial()
    first = n_parked_before(trial, 1.0)
    assert (80 * 0.03 + 20) / first <= 0.01
    assert n_parked_before(trial, 1.0) == pytest.approx(2 * first, rel=0.01)
    assert n_parked_before(_scheduling.Trial(), 0.95) > first  # it is to lose more
    assert n_parked_before(_scheduling.Trial(), 0.8) == 50_000


def test_a_trial_that_has_led_to_drafts_makes_the_next_one_sooner() -> None:
    waits = []
    for succeeds in (False, True):
        trial = _scheduling.Trial()
        n_parked_before(trial, 1.0)
        while not trial.goes_on(1.0, 10.0, 20.0):
            trial.earn(1.0)
        if succeeds:
            trial.succeed()
            assert not trial.goes_on(1.0, 10.0, 20.0)  # no trial any more
        else:
            while trial.goes_on(0.0, 10.0, 20.0):
                pass
        waits.append(n_parked_before(trial, 1.0))
    assert waits[1] < 0.7 * waits[0]


def test_what_drafts_have_gained_pays_for_the_way_back() -> None:
    """A fifth of it at most, and no more than 64 plain steps: a trial here is to lose 22.4 ms."""
    for gained_ms, is_enough in ((110.0, False), (113.0, True)):
        trial = _scheduling.Trial()
        for _ in range(100):
            trial.gain(gained_ms / 100, 10.0)
        assert trial.goes_on(1.0, 10.0, 20.0) == is_enough
    lost = _scheduling.Trial()
    lost.gain(113.0, 10.0)
    lost.gain(-10.0, 10.0)  # drafted steps that were slower
    assert not lost.goes_on(1.0, 10.0, 20.0)
    rich = _scheduling.Trial()
    rich.gain(1e6, 10.0)
    assert rich.goes_on(1.0, 10.0, 620.0)  # 64 plain steps of 10 ms
    rich.gain(1e6, 1.0)
    while rich.goes_on(0.0, 10.0, 620.0):
        pass
    assert not rich.goes_on(1.0, 10.0, 620.0)


def drafted_price(steps: Sequence[tuple[int, float]]) -> float:
    """What a draft of seven tokens is expected to cost after steps of so many drafted rows, times their price."""
    setting = Setting("linear", 0.9, draft_share=0.2)
    bound = scheduler(setting)
    for n_rows, factor in steps:
        bound.select([{"id": 1, "policy": f"fixed:{n_rows}"}])
        passes = {
            "draft_ms": factor * draft_ms(setting, 1) if n_rows else 0.0,
            "verify_ms": factor * row_ms(setting, 1 + n_rows),
        }
        figures = {"n_drafting": int(n_rows > 0), "n_drafted_rows": n_rows, "n_committed": 1}
        bound.observe_step(**figures, **passes, total_ms=sum(passes.values()))
    bound.select([{"id": 1}])
    return float(bound.outlook[1])


def test_a_draft_behind_many_plain_steps_tells_nothing_of_drafts_that_go_on() -> None:
    """Caches are cold, once: what such drafts take counts for entering, by as long as drafts go on."""
    plain, slow = [(0, 1.0)] * 20, [(7, 1.5)]
    usual = drafted_price(plain)
    assert drafted_price((plain + slow) * 12 + [(7, 1.0)] * 3) == pytest.approx(usual, rel=0.03)
    assert drafted_price(plain + slow * 60) > 1.3 * usual
    entering = drafted_price((plain + slow) * 12 + plain)
    assert usual * 1.05 < entering < 2 * usual  # they went on for one step each


def test_a_place_that_stays_empty_counts_by_what_a_step_without_it_saves() -> None:
    """Of four answers of 12 tokens one ends every few rounds, but a round without it takes a fifth less."""
    n = 4
    costs = {
        "verify": [(rows, 8.0 + rows) for rows in range(1, 8 * n + 1)],
        "plain": [(requests, 8.0 + requests) for requests in range(1, n + 1)],
        "prefill": [(1, 9.0)],
        "draft": [(blocks, 8.0 * blocks) for blocks in range(1, n + 1)],
        "inject": [],
        "verify_ms_per_row_cell": 0.0,
        "draft_ms_per_block_cell": 0.0,
    }
    calibration = [("block", 1.0, [1.0] * BLOCK, [0.97] * BLOCK, [], [])]
    bound = _scheduling.Scheduler(costs=costs, block_size=BLOCK, calibration=calibration)
    for request_id in range(100, 130):
        bound.finish(request_id, 12)
    assert bound.select([{"id": i} for i in range(n)]) == ["draft"] * n


def test_a_price_that_steps_keep_is_left_alone() -> None:
    simulation = Simulation(Setting("flat", 0.6, n_requests=4, draft_share=0.3))
    simulation.run(200)
    simulation.accepted.clear()
    result = simulation.run(600)
    assert result.tokens_per_ms > 0.98 * max(fixed_lengths(simulation))
