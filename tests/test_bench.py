"""The benchmark: its arithmetic on made-up runs, and the structure of what tiny real ones give. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from dspark_cpp.bench.cases import MIXED, PLAIN, Cell, Workload, read_questions, request_options, ways_of
from dspark_cpp.bench.cost_report import best_lengths, cliff_sizes, cost_at
from dspark_cpp.bench.plots import conditional_acceptance, draw_all
from dspark_cpp.bench.published import PUBLISHED, conditional_rate, parse_rates
from dspark_cpp.bench.report import as_json, cell_table, report_cell, summary
from dspark_cpp.bench.runner import Pair, Plan, Run, _without_far, is_settled, measure, standard_error
from dspark_cpp.bench.step_split import step_split
from dspark_cpp.bench.traffic import Stream, Traffic, answer_all
from dspark_cpp.bench_kernels import KernelTiming
from dspark_cpp.cli import app
from dspark_cpp.errors import DSparkError
from dspark_cpp.llm import LLM
from typer.testing import CliRunner

CELL = Cell("code", 0.0, 2)


def make_run(way: str, repeat: int, speed: float, n_rounds: int = 10, cell: Cell = CELL) -> Run:
    counts = dict.fromkeys(("n_prompt", "n_drafted", "n_scheduled", "n_accepted"), 0)
    counts |= {"n_rounds": n_rounds, "n_committed": 30, "n_steps": 5}
    if way != PLAIN:
        counts |= {"n_drafted": 7 * n_rounds, "n_scheduled": 4 * n_rounds}
    steps = {"draft": 10.0, "head": 5.0, "verify": 50.0, "inject": 5.0, "sample": 1.0, "host": 2.5}
    return Run(cell, way, repeat, 100, 100 / speed, speed / 2, 8.0, counts, [10, 10, 0], [8, 4, 0], steps, 5.0)


def test_ratios_are_taken_within_a_repetition() -> None:
    """A machine at half the speed in the second repetition changes no ratio."""
    speeds = {PLAIN: (100, 50, 100), "fixed:2": (120, 60, 120), "adaptive": (150, 75, 111)}
    report = report_cell([make_run(way, i, speed) for way, each in speeds.items() for i, speed in enumerate(each)])
    assert report.ways["fixed:2"].ratio == pytest.approx(1.2)
    adaptive = report.ways["adaptive"]
    assert (adaptive.ratio, adaptive.ratio_low, adaptive.ratio_high) == pytest.approx((1.5, 1.11, 1.5))
    assert report.best == "fixed:2"
    assert report.adaptive_to_plain == pytest.approx(1.5)
    assert report.adaptive_to_best == pytest.approx(1.25)
    assert adaptive.tokens_per_second == pytest.approx(111)
    assert adaptive.accepted_length == pytest.approx(3.0)
    assert adaptive.scheduled_length == pytest.approx(4.0)
    assert adaptive.parts_ms == pytest.approx(
        {"draft": 2, "head": 1, "verify": 10, "inject": 1, "sample": 0.2, "host": 0.5, "loop": 1}
    )
    assert adaptive.accepted_per_position == [24, 12, 0]


def test_hindsight_chooses_among_fixed_lengths_and_plain_alone() -> None:
    report = report_cell(
        [make_run(way, 0, speed) for way, speed in ((PLAIN, 100), ("threshold:0.5", 200), ("off", 99))]
    )
    assert report.best == PLAIN
    assert report.adaptive_to_best is None


def test_the_best_choice_is_judged_by_other_runs_than_those_that_chose_it() -> None:
    """Two lengths of the same speed: whichever was lucky in one half is an ordinary one in the other half."""
    speeds = {
        PLAIN: (100,) * 4,
        "fixed:2": (120, 100, 120, 100),
        "fixed:3": (100, 120, 100, 120),
        "adaptive": (110,) * 4,
    }
    report = report_cell([make_run(way, i, speed) for way, each in speeds.items() for i, speed in enumerate(each)])
    assert report.adaptive_to_best == pytest.approx(1.1)


def test_answers_of_many_streams_end_at_different_times() -> None:
    workload = Workload({"a": [[1]], "b": [[2]]})
    limits = [workload.answer_limit("b", number, 25) for number in range(2000)]
    assert (min(limits), max(limits)) == (13, 25)
    assert np.mean(limits) == pytest.approx(19, abs=0.5)


def test_summary_takes_the_worst_cell() -> None:
    speeds = {CELL: (100, 120, 110), replace(CELL, domain=MIXED): (100, 100, 90)}
    reports = [
        report_cell(
            [make_run(way, 0, v, cell=cell) for way, v in zip((PLAIN, "fixed:1", "adaptive"), each, strict=True)]
        )
        for cell, each in speeds.items()
    ]
    figures = summary(reports)
    assert figures["adaptive_to_plain_min"] == pytest.approx(0.9)
    assert figures["adaptive_to_best_min"] == pytest.approx(0.9)
    assert figures["adaptive_to_best_median"] == pytest.approx((110 / 120 + 0.9) / 2)
    assert figures["adaptive_to_best_mixed_min"] == pytest.approx(0.9)


def test_a_cell_is_repeated_until_the_default_policy_is_known_to_a_hundredth() -> None:
    def runs_of(*ratios: float) -> list[Run]:
        pairs = [(make_run(PLAIN, i, 100), make_run("adaptive", i, 100 * ratio)) for i, ratio in enumerate(ratios)]
        return [run for pair in pairs for run in pair]

    assert is_settled(runs_of(1.0, 1.005, 1.5))  # an outlier counts as one
    assert not is_settled(runs_of(0.9, 1.0, 1.1))
    assert is_settled([make_run(PLAIN, 0, 100), make_run("fixed:2", 0, 300)])
    assert report_cell(runs_of(0.9, 1.0, 1.1)).error == pytest.approx(1.253 * 1.483 * 0.1 / 3**0.5)


def test_the_standard_error_is_that_of_the_median_of_normal_values() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(1.0, 0.05, (400, 15))
    true = np.median(samples, axis=1).std()
    assert np.mean([standard_error(list(one)) for one in samples]) == pytest.approx(true, rel=0.15)


def test_fixed_lengths_far_behind_rest_after_two_repetitions() -> None:
    speeds = {PLAIN: 100, "adaptive": 90, "fixed:1": 120, "fixed:7": 140}
    runs = [make_run(way, repeat, speed) for way, speed in speeds.items() for repeat in (0, 1)]
    assert _without_far(list(speeds), runs) == [PLAIN, "adaptive", "fixed:7"]
    report = report_cell([*runs, make_run(PLAIN, 2, 50), make_run("adaptive", 2, 50), make_run("fixed:7", 2, 70)])
    assert report.ways["fixed:1"].n_runs == 2
    assert (report.best, report.ways["fixed:7"].ratio) == ("fixed:7", pytest.approx(1.4))


def test_runs_are_made_long_enough(demo_target: Path, demo_drafter: Path) -> None:
    pair = Pair(str(demo_target), str(demo_drafter), n_threads=1)
    workload = Workload.build({"a": ["1 + 1"]}, pair.target.tokenize)
    plan = Plan(n_tokens=6, n_prompts=1, n_repeats=1, budget_s=1e9, ignores_end=True, run_s=0.05)
    [runs] = measure(pair, workload, [Cell("a", 0.0, 1)], [PLAIN, "fixed:2"], plan)
    n_tokens = {run.n_tokens for run in runs}
    assert len(n_tokens) == 1  # all ways do the same work
    assert n_tokens.pop() > 5


def test_ways_are_expanded_and_cut_at_the_block() -> None:
    assert ways_of("off,fixed:1..9,adaptive,off", 3) == [PLAIN, "adaptive", "off", "fixed:1", "fixed:2", "fixed:3"]


def test_policies_are_the_engines() -> None:
    for way in ways_of("off,fixed:1..2,threshold:0.5,algorithm1,adaptive", 7):
        request_options(way, 0.0, 4, 0)
    with pytest.raises(ValueError, match="policy"):
        request_options("sometimes", 0.0, 4, 0)


def test_workload_takes_domains_in_turns_and_pads_to_a_length() -> None:
    questions = {"a": ["xy", "z"], "b": ["uvw"]}
    workload = Workload.build(questions, lambda text: [ord(c) for c in text])
    assert [domain for domain, _ in workload.take(MIXED, 5)] == ["a", "b", "a", "b", "a"]
    assert [list(prompt) for _, prompt in workload.take("a", 3, 1)] == [[122], [120, 121], [122]]
    assert [workload.seed("b", n) % 2 for n in range(3)] == [1, 1, 1]
    padded = Workload.build(questions, lambda text: [ord(c) for c in text], 5)
    assert padded.prompts["a"][1] == [120, 121, 122, 120, 122]
    assert {len(prompt) for prompts in padded.prompts.values() for prompt in prompts} == {5}


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": []}', '{"a": "b"}'])
def test_bad_prompt_files_are_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="prompts must be a JSON object"):
        read_questions(path)


def test_published_lengths_come_back_from_their_rates() -> None:
    for domains in PUBLISHED.values():
        for length in domains.values():
            rate = conditional_rate(length)
            assert sum(rate**k for k in range(8)) == pytest.approx(length)
    assert list(parse_rates("qwen3-4b:gsm8k,alpaca")) == ["gsm8k", "alpaca"]
    assert parse_rates("0.9,0.8;0.5") == {"rates-1": [0.9, 0.8], "rates-2": [0.5]}
    for text in ("llama", "0.5,x", "qwen3-4b:poetry"):
        with pytest.raises(ValueError, match="must be"):
            parse_rates(text)


def test_conditional_acceptance_of_answers_that_end_early() -> None:
    assert conditional_acceptance([100, 100, 50, 0], [80, 40, 20, 0]) == pytest.approx([0.8, 0.5, 1.0])


def test_cliffs_and_costs_between_sizes() -> None:
    points = [(1, 10.0), (2, 11.0), (3, 12.0), (4, 20.0), (8, 24.0)]
    assert cliff_sizes(points) == [4]
    assert [cost_at(points, size) for size in (1, 4, 6, 12)] == [10.0, 20.0, 22.0, 28.0]


def test_best_length_stops_before_a_cliff_and_is_off_without_gain() -> None:
    costs = {"verify": [(1, 10.0), (4, 12.0), (5, 40.0), (8, 44.0)], "draft": [(1, 2.0)], "prefill": [], "plain": []}
    high, low = best_lengths(costs, 7, [1], [0.7, 0.05])
    # By hand: 1 + 0.7 + 0.49 + 0.343 tokens for 2 + 12 ms, against one for 10.
    assert (high.length, high.ratio) == (3, pytest.approx(2.533 * 10 / 14))
    assert (low.length, low.ratio) == (0, 1.0)
    [against_repeats] = best_lengths(costs | {"plain": [(1, 8.0)]}, 7, [1], [0.7])
    assert against_repeats.ratio == pytest.approx(2.533 * 8 / 14)


@pytest.fixture(scope="module")
def runs(demo_target: Path, demo_drafter: Path) -> list[Run]:
    pair = Pair(str(demo_target), str(demo_drafter), n_threads=1)
    workload = Workload.build({"a": ["1 + 1", "2"], "b": ["def"]}, pair.target.tokenize)
    plan = Plan(n_tokens=6, n_prompts=3, n_repeats=2, budget_s=1e9, ignores_end=True)
    [found] = measure(pair, workload, [Cell(MIXED, 0.0, 2)], [PLAIN, "off", "fixed:2", "adaptive"], plan)
    return found


def test_every_way_runs_once_a_repetition_there_and_back(runs: list[Run]) -> None:
    order = [[run.way for run in runs if run.repeat == repeat] for repeat in (0, 1)]
    assert sorted(order[0]) == sorted(order[1])
    assert order[0] == order[1][::-1]
    for run in runs:
        n_written = next(plain.counts["n_committed"] for plain in runs if plain.repeat == run.repeat)
        assert run.counts["n_committed"] == n_written  # the same answers, of whatever length
        assert 4 * 2 <= n_written <= 4 * 5  # two answers of two streams; the first token is the prefill's
        assert 0 < run.n_tokens <= 20
        assert run.seconds > 0
        assert run.counts["n_rounds"] == n_written or run.way not in (PLAIN, "off")
        assert max(run.scheduled_per_position[2:], default=0) == 0 or run.way == "adaptive"


def test_report_of_real_runs_is_whole(runs: list[Run], tmp_path: Path) -> None:
    report = report_cell(runs)
    stored = json.loads(json.dumps(as_json(runs, [report], {"asked": {}})))
    assert len(stored["runs"]) == 8
    assert stored["cells"][0]["ways"]["fixed:2"]["n_runs"] == 2
    assert cell_table(report).row_count == 4
    assert "100.0%" not in str(step_split(report, "adaptive"))
    with pytest.raises(ValueError, match="way must be one of"):
        step_split(report, "fixed:7")
    pytest.importorskip("matplotlib")
    paths = draw_all([report], tmp_path, "a note")
    assert {path.name for path in paths} == {
        f"{name}.{kind}" for name in ("throughput", "accepted", "scheduled") for kind in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in paths)


def test_command_measures_a_useless_drafter_with_synthetic_acceptance(demo_target: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    arguments = ["bench", str(demo_target), "--draft", "random", "--synthetic-acceptance", "1;0", "--repeats", "1"]
    arguments += ["--policies", "fixed:7", "--temperatures", "0", "--n-tokens", "9", "--n-prompts", "1"]
    arguments += ["--run-seconds", "0"]
    result = CliRunner().invoke(app, [*arguments, "--n-threads", "1", "--profile", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "NO TEXT" in result.output
    stored = json.loads(path.read_text())
    assert "NO TEXT" in stored["about"]["no_text"]
    lengths = {(run["cell"]["domain"], run["way"]): run["counts"]["n_rounds"] for run in stored["runs"]}
    # 8 tokens after the first: one round where every draft stands, 8 where none does.
    assert lengths["rates-1", "fixed:7"] == 1
    assert lengths["rates-2", "fixed:7"] == lengths["rates-2", "plain"] == 8


def test_streams_ask_on_when_their_answer_has_ended(demo_target: Path) -> None:
    lengths = [9, 3, 3, 3, 2]
    options = [request_options(PLAIN, 0.0, n, 0, ignores_end=True) for n in lengths]
    with LLM(demo_target, n_parallel=4, n_threads=1) as llm:
        traffic = answer_all(llm.loop, [[5, 6]] * 5, options, n_streams=2)
        together = answer_all(llm.loop, [[5, 6]] * 5, options)
    streams = traffic.streams
    assert [sum(n for _, n in stream.arrivals) for stream in streams] == lengths
    for i, stream in enumerate(streams):
        n_open = sum(before.last > stream.submitted for before in streams[:i])
        assert n_open == min(i, 1), "the other stream is still at it"
    assert traffic.begin == max(stream.first for stream in streams[:2])
    assert traffic.end >= min(stream.last for stream in streams[3:])
    assert max(stream.submitted for stream in together.streams) < min(stream.last for stream in together.streams)


def test_only_the_time_in_which_all_streams_are_busy_counts() -> None:
    first, second = Stream(0.0, arrivals=[(1.0, 1), (2.0, 2), (3.0, 4)]), Stream(0.0, arrivals=[(2.0, 8), (2.5, 16)])
    assert Traffic([first, second], begin=2.0, end=2.9).n_tokens == 16


def test_answers_without_text_have_no_speed() -> None:
    empty, one = Stream(1.0), Stream(1.0)
    one.feed(SimpleNamespace(tokens=[5], finish_reason=None, stats=None), 2.0)
    one.feed(SimpleNamespace(tokens=[6, 7], finish_reason="length", stats=None), 3.0)
    assert (empty.speed, one.speed) == (0.0, 2.0)
    with pytest.raises(DSparkError, match="cannot measure: broken"):
        empty.feed(SimpleNamespace(finish_reason="error", error="broken"), 4.0)


def test_plots_without_matplotlib_are_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "demo", "--plots", "nowhere"])
    assert isinstance(result.exception, ImportError)
    assert "dspark-cpp[plots]" in str(result.exception)


def test_command_names_bad_options() -> None:
    bad = (
        ["bench", "demo", "--domains", "poetry"],
        ["bench", "x.gguf"],
        ["profile", "x.gguf"],
        ["profile", "demo", "--cpu-kernels", "none"],
    )
    for arguments in bad:
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, ValueError)
        assert "must be" in str(result.exception)


def test_kernel_figures_are_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timing = KernelTiming(type_name="q8_0", n_rows=2, milliseconds={"kernels": 1.0, "plain": 3.0}, ratio=3.0)
    monkeypatch.setattr("dspark_cpp.bench_kernels.run_kernel_bench", lambda **options: [timing])
    result = CliRunner().invoke(app, ["bench", "--kernels", "--json", str(tmp_path / "kernels.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "kernels.json").read_text())["rows"] == [asdict(timing)]


def test_profile_command_shows_and_stores_curves(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    result = CliRunner().invoke(
        app, ["profile", "demo", "--n-ctx", "256", "--concurrency", "2", "--n-threads", "1", "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    stored = json.loads(path.read_text())
    assert stored["costs"]["verify"][0][0] == 1
    assert {one["n_streams"] for one in stored["best_lengths"]} == {1, 2}
    assert "acceptance" in result.output
