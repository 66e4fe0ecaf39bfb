"""Calibration: the mathematics against plain loops, the record and its two files, and the command on the demo pair."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dspark_cpp.calibration import MAP_POINTS, Calibration, CalibrationEntry
from dspark_cpp.calibration_files import (
    find_calibration,
    read_gguf_keys,
    read_side_file,
    side_file,
    write_gguf_keys,
    write_side_file,
)
from dspark_cpp.calibration_fit import conditional_acceptance, fit_beyond_sts, fit_sts, measure_positions, survivals
from dspark_cpp.calibration_scores import (
    brier_score,
    expected_calibration_error,
    reliability,
    roc_auc,
    sample_ece,
)
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.errors import DSparkError, ModelLoadError, ModelMismatchError
from reference import calibration as oracle

DATA = Path(__file__).parent / "data" / "demo_pair"
DEMO_TARGET = Path(__file__).parents[1] / "python" / "dspark_cpp" / "demo" / "target.gguf"
GAMMA = 3
RNG = np.random.default_rng(1)


def draw_blocks(n: int, temperature: float) -> tuple[Any, Any]:
    """Logits whose truth is sigmoid(logit / temperature), and the accepted prefixes they lead to."""
    rng = np.random.default_rng(7)
    logits = rng.normal(1.5, 2.0, (n, GAMMA))
    survives = rng.random((n, GAMMA)) < 1 / (1 + np.exp(-logits / temperature))
    return logits, np.cumprod(survives, axis=1).sum(axis=1)


# ---- mathematics ----


def test_scores_equal_plain_loops() -> None:
    probs = np.round(RNG.random(400), 2)  # rounded: ties, and values on the edges of bins
    outcomes = RNG.random(400) < probs
    assert expected_calibration_error(probs, outcomes) == pytest.approx(oracle.ece(probs, outcomes), abs=1e-12)
    assert roc_auc(probs, outcomes) == pytest.approx(oracle.auc(probs, outcomes), abs=1e-12)
    assert brier_score([0.25, 1.0], [True, False]) == pytest.approx((0.75**2 + 1) / 2)


def test_scores_of_known_cases() -> None:
    assert expected_calibration_error([0.0, 1.0, 1.0], [False, True, True]) == 0
    assert expected_calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0)
    assert expected_calibration_error([0.9] * 4, [False] * 4) == pytest.approx(0.9)
    assert roc_auc([0.5, 0.5], [True, False]) == 0.5
    assert np.isnan(roc_auc([0.1, 0.2], [True, True]))
    bins = reliability([0.0, 0.04, 1.0], [False, True, True])
    assert (bins.n[0], bins.frequency[0], bins.n[19], bins.frequency[19]) == (2, 0.5, 1, 1.0)
    assert np.isnan(bins.confidence[1:19]).all()
    # One bin of n fair coins: E|mean - 1/2| = sqrt(1 / (2 pi n)) for large n; 200 draws settle it to 5 %.
    assert sample_ece([0.5] * 1000, n_repeats=200) == pytest.approx((2 * np.pi * 1000) ** -0.5, rel=0.2)


def test_sts_minimises_the_cost_of_plain_loops() -> None:
    logits, accepted = draw_blocks(150, 2.0)
    fitted = fit_sts(logits, accepted)
    before = [1.0] * len(logits)
    for k in range(GAMMA):
        costs = oracle.sts_costs(logits, accepted, before, k)
        best = min(costs, key=costs.__getitem__)
        assert fitted[k] == pytest.approx(best, rel=1e-9)
        before = [s * oracle.sigmoid(row[k] / best) for s, row in zip(before, logits, strict=True)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sts_finds_the_true_temperatures(temperature: float) -> None:
    """To 25 %: the ECE of 20,000 blocks is flat around its minimum."""
    assert fit_sts(*draw_blocks(20_000, temperature)) == pytest.approx([temperature] * GAMMA, rel=0.25)


def test_sts_stays_at_one_where_data_cannot_tell() -> None:
    assert fit_sts(np.zeros((0, GAMMA)), []).tolist() == [1.0] * GAMMA
    assert fit_sts(np.zeros((50, GAMMA)), [1] * 50)[0] == 1.0  # sigmoid(0 / T) is 1/2 at every T
    certain = np.tile([np.inf, np.inf, -np.inf], (50, 1))
    assert fit_sts(certain, [2] * 50).tolist() == [1.0] * GAMMA
    assert fit_sts([[2.0] * GAMMA], [GAMMA])[0] == pytest.approx(1.0, abs=0.1)
    # All accepted says that T < 1, but not that it is the end of the grid.
    assert 0.1 < fit_sts(np.full((1000, GAMMA), 2.0), [GAMMA] * 1000)[0] < 0.8


def test_unverified_tokens_say_nothing() -> None:
    logits, accepted = draw_blocks(2000, 2.0)
    more = (np.vstack([logits, logits[:500]]), np.concatenate([accepted, np.minimum(accepted[:500], 1)]))
    verified = np.array([GAMMA] * 2000 + [1] * 500)
    assert fit_sts(*more)[2] != fit_sts(logits, accepted)[2]  # taken for rejected, they would count
    assert fit_sts(*more, verified)[1:] == pytest.approx(fit_sts(logits, accepted)[1:], rel=0.05)
    rates = conditional_acceptance(*more[1:], GAMMA, verified)
    assert rates[1:] == pytest.approx(conditional_acceptance(accepted, GAMMA)[1:])


def test_survivals_equal_plain_loops() -> None:
    logits = RNG.normal(0.5, 2.0, (50, GAMMA))
    sts, offsets = RNG.uniform(0.5, 2.0, GAMMA), RNG.normal(0.0, 1.0, GAMMA)
    maps = np.sort(RNG.random((GAMMA, MAP_POINTS)), axis=1)
    ours = survivals(logits, sts, offsets, maps.ravel())
    for row, values in zip(logits, ours, strict=True):
        assert values.tolist() == pytest.approx(oracle.survivals(row, sts, offsets, maps), abs=1e-12)
    identity = np.tile(np.linspace(0, 1, MAP_POINTS), GAMMA)
    np.testing.assert_allclose(survivals(logits, sts, offsets, identity), survivals(logits, sts, offsets), atol=1e-12)


@pytest.mark.parametrize(("slope", "offset"), [(0.5, -1.0), (1.0, 0.0), (2.0, 1.5)])
def test_temperature_and_offset_are_found(slope: float, offset: float) -> None:
    """20,000 blocks, a tenth of which reach the last token: its slope's standard error is about 5 %."""
    rng = np.random.default_rng(5)
    logits = rng.normal(1.0, 1.5, (20_000, GAMMA))
    survives = rng.random(logits.shape) < 1 / (1 + np.exp(-(slope * logits + offset)))
    accepted = np.cumprod(survives, axis=1).sum(axis=1)
    temperatures, offsets, maps = fit_beyond_sts(logits, accepted, np.ones(GAMMA))
    assert 1 / temperatures == pytest.approx([slope] * GAMMA, rel=0.15)
    assert offsets == pytest.approx([offset] * GAMMA, abs=0.15)
    points = np.linspace(0, 1, MAP_POINTS)  # nothing is left for the maps to do
    assert np.abs(maps.reshape(GAMMA, -1) - points)[:, 2:-2].max() < 0.1


def test_maps_mend_what_confidences_cannot() -> None:
    """Easy and hard blocks with the same confidences: true one by one, wrong in their product."""
    rng = np.random.default_rng(6)
    is_easy = rng.random(40_000) < 0.5
    rates = np.where(is_easy, 0.95, 0.45)[:, None]
    accepted = np.cumprod(rng.random((is_easy.size, GAMMA)) < rates, axis=1).sum(axis=1)
    logits = rng.normal(0.0, 0.5, (is_easy.size, GAMMA))
    halves = np.arange(is_easy.size) % 2 == 0
    sts = fit_sts(logits[halves], accepted[halves])
    fitted = fit_beyond_sts(logits[halves], accepted[halves], sts)
    alone, mapped = (
        measure_positions(logits[~halves], accepted[~halves], *each)[-1].ece for each in ((sts, 0.0, None), fitted)
    )
    assert alone > 0.05
    assert mapped < 0.02


def test_fit_beyond_sts_survives_odd_data() -> None:
    identity = np.tile(np.linspace(0, 1, MAP_POINTS), GAMMA)
    for logits, accepted in (
        (np.zeros((0, GAMMA)), []),
        (np.tile([np.inf, np.inf, -np.inf], (50, 1)), [2] * 50),
        (np.full((50, GAMMA), 2.0), [GAMMA] * 50),
        (np.full((50, GAMMA), -3.0), [0] * 50),
    ):
        temperatures, offsets, maps = fit_beyond_sts(logits, accepted, np.ones(GAMMA))
        CalibrationEntry("block", 1.0, tuple(temperatures), (0.5,) * GAMMA, 1, tuple(offsets), tuple(maps))
        if not len(accepted):
            assert temperatures.tolist() == [1.0] * GAMMA
            assert maps == pytest.approx(identity)


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="logits must be numbers, got NaN in 1 blocks"):
        fit_sts([[np.nan, 0.0]], [0])
    with pytest.raises(ValueError, match="accepted must be in 0"):
        fit_sts([[0.0, 0.0]], [3])
    with pytest.raises(ValueError, match=r"probs must be in \[0, 1\], got 1.5"):
        expected_calibration_error([1.5], [True])


# ---- the record ----


MAPS = tuple(round(i / 10, 1) for i in range(MAP_POINTS)) * 7


@pytest.fixture
def calibration() -> Calibration:
    entries = tuple(
        CalibrationEntry(rule, temperature, (1.1, *[0.7] * 6), (0.9, *[0.85] * 6), 1000 + i, (-0.5,) * 7, MAPS)
        for i, (rule, temperature) in enumerate(
            [("exact", 0.0), ("rejection", 0.5), ("rejection", 1.0), ("block", 1.0)]
        )
    )
    return Calibration(7, "Täst, Q8_0", entries)


def test_entry_for_a_request(calibration: Calibration) -> None:
    def pick(rule: str, temperature: float) -> tuple[str, float]:
        entry = calibration.entry_for(rule, temperature)
        return entry.rule, entry.temperature

    assert pick("block", 0.0) == ("exact", 0.0)  # all rules are the same at 0
    assert pick("rejection", 0.6) == ("rejection", 0.5)
    assert pick("rejection", 0.75) == ("rejection", 1.0)  # as near: the higher
    assert pick("block", 0.1) == ("block", 1.0)
    only_exact = replace(calibration, entries=calibration.entries[:1])
    assert only_exact.entry_for("block", 1.0).rule == "exact"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sts", [1.0] * 6, "sts must have 7 values, got 6"),
        ("sts", [1.0] * 6 + [0], "sts must be finite and above 0, got 0"),
        ("sts", [float("nan")] * 7, "sts must be finite and above 0, got nan"),
        ("acceptance", [1.5] * 7, r"acceptance must be in \[0, 1\], got 1.5"),
        ("rule", "greedy", "rules must be one of exact, rejection, block, got greedy"),
        ("temperature", -1, "temperatures must be 0 or more, got -1"),
        ("n_blocks", 1.5, "n_blocks must be a count, got 1.5"),
        ("offsets", [0.0] * 6, "offsets must have 7 values, got 6"),
        ("offsets", [float("inf")] * 7, "offsets must be finite, got inf"),
        ("maps", [0.5] * 76, "maps must have 77 values, got 76"),
        ("maps", [0.5] * 76 + [0.4], "maps must never fall, got 0.4 after 0.5"),
        ("maps", [1.5] * 77, r"maps must be in \[0, 1\], got 1.5"),
    ],
)
def test_damaged_side_file_names_file_and_key(
    tmp_path: Path, calibration: Calibration, key: str, value: object, message: str
) -> None:
    data = json.loads(calibration.to_json())
    data["entries"][0][key] = value
    path = tmp_path / "d.calibration.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ModelLoadError, match=f"d.calibration.json: {message}"):
        read_side_file(path)


def test_json_with_wrong_keys_is_refused(calibration: Calibration) -> None:
    data = json.loads(calibration.to_json())
    with pytest.raises(ValueError, match="calibration must be JSON"):
        Calibration.from_json("{")
    with pytest.raises(ValueError, match="none of target"):
        Calibration.from_json(json.dumps({key: value for key, value in data.items() if key != "target"}))
    with pytest.raises(ValueError, match="also extra"):
        Calibration.from_json(json.dumps(data | {"extra": 1}))


# ---- files ----


@pytest.fixture
def drafter(tmp_path: Path, demo_drafter: Path) -> Path:
    return Path(shutil.copy(demo_drafter, tmp_path / "drafter.gguf"))


@pytest.mark.parametrize("missing", [(), ("maps",), ("maps", "offsets"), ("maps", "offsets", "sts")], ids=str)
def test_gguf_round_trip_keeps_all_else(drafter: Path, calibration: Calibration, missing: tuple[str, ...]) -> None:
    """Also what older versions wrote: temperatures alone, and nothing but acceptance."""
    without: dict[str, Any] = dict.fromkeys(missing, ())
    calibration = replace(calibration, entries=tuple(replace(entry, **without) for entry in calibration.entries))
    old_bytes = drafter.read_bytes()
    old = GGUFFile(drafter)
    write_gguf_keys(calibration, drafter)
    new = GGUFFile(drafter)
    assert read_gguf_keys(drafter) == calibration == Calibration.from_json(calibration.to_json())
    assert drafter.read_bytes()[new.data_offset :] == old_bytes[old.data_offset :]
    others = [key for key in old.values if not key.startswith("dspark.calibration.")]
    assert [key for key in new.values if not key.startswith("dspark.calibration.")] == others
    assert all(new.encoded(key) == old.encoded(key) for key in others)
    size = drafter.stat().st_size
    write_gguf_keys(calibration, drafter)  # replaces, does not pile up
    assert drafter.stat().st_size == size


def test_other_readers_take_the_written_file(drafter: Path, calibration: Calibration, demo_target: Path) -> None:
    gguf, core = pytest.importorskip("gguf"), pytest.importorskip("dspark_cpp._core")
    write_gguf_keys(calibration, drafter)
    fields = gguf.GGUFReader(drafter).fields
    assert fields["dspark.calibration.rules"].contents() == ["exact", "rejection", "rejection", "block"]
    assert fields["dspark.calibration.n_blocks"].contents() == [1000, 1001, 1002, 1003]
    target = core.Model.load_target(str(demo_target))
    assert core.Model.load_drafter(str(drafter), target).drafter_info.block_size == 7


def test_failed_write_leaves_the_file(drafter: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    before = drafter.read_bytes()
    monkeypatch.setattr("dspark_cpp.calibration_files._copy_rest", lambda source, output: None)
    with pytest.raises(DSparkError):
        write_gguf_keys(calibration, drafter)
    short = replace(calibration, block_size=1, entries=(CalibrationEntry("exact", 0.0, (1.0,), (0.5,), 1),))
    with pytest.raises(ModelMismatchError, match="block_size must be the drafter's 7, got 1"):
        write_gguf_keys(short, drafter)
    assert drafter.read_bytes() == before
    assert os.listdir(drafter.parent) == ["drafter.gguf"]


def test_order_of_places(drafter: Path, calibration: Calibration, tmp_path: Path) -> None:
    in_file, beside, own = (replace(calibration, target=name) for name in ("gguf", "beside", "own"))
    write_gguf_keys(in_file, drafter)
    assert find_calibration(drafter, 7) == in_file
    write_side_file(beside, side_file(drafter))
    assert find_calibration(drafter, 7) == beside
    write_side_file(own, tmp_path / "own.json")
    assert find_calibration(drafter, 7, calibration=tmp_path / "own.json") == own
    assert find_calibration(drafter, 7, calibration=own) is own
    with pytest.raises(ModelMismatchError, match=r"must be the drafter's 5, got 7 from .*calibration.json"):
        find_calibration(drafter, 5)


def test_damaged_keys_name_file_and_key(drafter: Path, calibration: Calibration) -> None:
    write_gguf_keys(calibration, drafter)
    data = bytearray(drafter.read_bytes())
    value = GGUFFile(drafter).values["dspark.calibration.sts"]
    data[value.start : value.start + 4] = np.float32(np.nan).tobytes()
    drafter.write_bytes(data)
    with pytest.raises(
        ModelLoadError, match=r"drafter.gguf: dspark.calibration.sts must be finite and above 0, got nan"
    ):
        read_gguf_keys(drafter)


def test_side_file_of_an_older_version_is_read(tmp_path: Path, calibration: Calibration) -> None:
    data = json.loads(calibration.to_json())
    for entry in data["entries"]:
        del entry["offsets"], entry["maps"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    assert not read_side_file(path).has_offsets
    assert read_side_file(path).entries[0].sts == calibration.entries[0].sts


# ---- the command ----


def run_command(drafter: Path, *options: str, target: str = "demo") -> subprocess.CompletedProcess[str]:
    pytest.importorskip("dspark_cpp._core")
    command = [sys.executable, "-m", "dspark_cpp.cli", "calibrate", target, "--draft", str(drafter)]
    few = ["--n-tokens", "300", "--max-tokens", "48", "--rules", "block", "--n-threads", "1"]
    return subprocess.run([*command, *few, *options], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("own.txt", "Once upon a time there was a cow.\n\nTo sort a list, write a loop.\n\nFirst add 3 and 4."),
        (
            "own.jsonl",
            '{"prompt": "What is 12 x 12?"}\n\n{"messages": [{"role": "user", "content": "Tell me a story."}]}\n'
            '{"text": "def add(a, b): return a + b  # a function that adds two numbers"}\n',
        ),
    ],
)
def test_own_prompts(tmp_path: Path, drafter: Path, name: str, text: str) -> None:
    data = tmp_path / name
    data.write_text(text, encoding="utf-8")
    result = run_command(drafter, "--data", str(data), "--temperatures", "0,1")
    assert result.returncode == 0, result.stderr
    assert "(1 prompts)" in result.stdout  # of three, two are fitted on
    assert [entry.rule for entry in read_side_file(side_file(drafter)).entries] == ["exact", "block"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"question": "y"}\n', "a.jsonl, line 2 must be an object with a"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "a.jsonl, line 2: "),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "a.jsonl, line 1 must be an object with a"),
        ("a.jsonl", b'["x"]\n', "a.jsonl, line 1 must be an object with a"),
        ("a.jsonl", b"\n", "data must hold prompts, got none"),
        ("a.txt", b"  \n\n ", "data must hold prompts, got none"),
        ("a.txt", b"one text alone", "prompts must hold at least 2 different ones, got 1"),
        ("a.txt", b"\xff\xfe", "a.txt must be UTF-8 text, got byte 0xff at 0"),
        ("a.json", b'{"code": "x"}', "a.json must hold a JSON object of lists of questions"),
        ("a.json", b"{", "a.json must hold a JSON object of lists of questions"),
        ("missing.txt", None, "cannot read .*missing.txt: No such file"),
    ],
)
def test_bad_prompts_name_file_and_rule(tmp_path: Path, name: str, text: bytes | None, message: str) -> None:
    core = pytest.importorskip("dspark_cpp._core")
    from dspark_cpp.calibration_prompts import read_prompts, split_prompts

    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    target = core.Model.load_target(str(DEMO_TARGET))
    with pytest.raises(ValueError, match=message):
        split_prompts(read_prompts(target, path), seed=0)


def test_command_names_a_bad_line(tmp_path: Path, drafter: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text('{"prompt": "x"}\n{"prompt": 3}\n')
    result = run_command(drafter, "--data", str(data))
    assert result.returncode == 1
    assert "own.jsonl, line 2 must be an object" in "".join(result.stderr.split("\n")).replace("  ", " ")
    assert "Traceback" not in result.stderr
    assert not side_file(drafter).exists()


def test_drafter_without_confidence_head(tmp_path: Path, no_confidence_drafter: Path) -> None:
    """Acceptance is measured and stored; figures and plot, which need confidences, are left out."""
    drafter = Path(shutil.copy(no_confidence_drafter, tmp_path))
    result = run_command(drafter, "--temperatures", "0,1", "--write", "--plot", str(tmp_path / "plot.png"))
    assert result.returncode == 0, result.stderr
    assert "no confidence head" in result.stdout
    stored = read_gguf_keys(drafter)
    assert stored == read_side_file(side_file(drafter))
    assert stored is not None
    assert not stored.has_sts
    assert all(len(entry.acceptance) == 7 for entry in stored.entries)
    assert not (tmp_path / "plot.png").exists()


def test_command_on_the_demo_pair(tmp_path: Path, drafter: Path) -> None:
    pytest.importorskip("dspark_cpp._core")
    command = [sys.executable, "-m", "dspark_cpp.cli", "calibrate", "demo", "--draft", str(drafter), "--write"]
    options = [
        "--n-tokens",
        "300",
        "--max-tokens",
        "48",
        "--rules",
        "block",
        "--temperatures",
        "0,1",
        "--n-threads",
        "1",
    ]
    result = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "mean ECE, block at 1:" in result.stdout
    stored = read_side_file(side_file(drafter))
    assert [(entry.rule, entry.temperature) for entry in stored.entries] == [("exact", 0.0), ("block", 1.0)]
    assert stored == read_gguf_keys(drafter)
    assert stored.has_sts
    assert all(entry.n_blocks > 10 for entry in stored.entries)


def test_halves_share_no_prompt() -> None:
    pytest.importorskip("dspark_cpp._core")
    from dspark_cpp.calibration_prompts import split_prompts

    domains = [[[i % 7, 1] for i in range(20)], [[i, 2] for i in range(5)], [[3, 1], [9, 3]]]
    fit, held_out = split_prompts(domains, seed=3)
    assert sorted(map(tuple, fit + held_out)) == sorted(
        {(i, 1) for i in range(7)} | {(i, 2) for i in range(5)} | {(9, 3)}
    )
    assert abs(sum(prompt[1] == 2 for prompt in fit) - 2.5) == 0.5  # every domain is halved
    with pytest.raises(ValueError, match="at least 2 different ones, got 1"):
        split_prompts([[[1], [1]]], seed=0)


def test_bundled_prompts_do_not_judge_themselves() -> None:
    """Prompts that calibrate are none of those that the demo and the benchmarks show."""
    own = json.loads((DEMO_TARGET.parent / "calibration_prompts.json").read_text(encoding="utf-8"))
    shown = json.loads((DEMO_TARGET.parent / "prompts.json").read_text(encoding="utf-8"))
    judged = {prompt["text"] for prompt in json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["prompts"]}
    questions = [question for domain in own.values() for question in domain]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & {question for domain in shown.values() for question in domain}
    assert not {f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in questions} & judged
