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
from dspark_cpp.calibration import Calibration, CalibrationEntry
from dspark_cpp.calibration_files import (
    find_calibration,
    read_gguf_keys,
    read_side_file,
    side_file,
    write_gguf_keys,
    write_side_file,
)
from dspark_cpp.calibration_fit import (
    brier_score,
    conditional_acceptance,
    expected_calibration_error,
    fit_sts,
    reliability,
    roc_auc,
    sample_ece,
)
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.errors import DSparkError, ModelLoadError, ModelMismatchError
from reference import calibration as oracle

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


def test_bad_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="logits must be numbers, got NaN in 1 blocks"):
        fit_sts([[np.nan, 0.0]], [0])
    with pytest.raises(ValueError, match="accepted must be in 0"):
        fit_sts([[0.0, 0.0]], [3])
    with pytest.raises(ValueError, match=r"probs must be in \[0, 1\], got 1.5"):
        expected_calibration_error([1.5], [True])


# ---- the record ----


@pytest.fixture
def calibration() -> Calibration:
    entries = tuple(
        CalibrationEntry(rule, temperature, (1.1, *[0.7] * 6), (0.9, *[0.85] * 6), 1000 + i)
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


@pytest.mark.parametrize("has_sts", [True, False])
def test_gguf_round_trip_keeps_all_else(drafter: Path, calibration: Calibration, has_sts: bool) -> None:
    if not has_sts:
        calibration = replace(calibration, entries=tuple(replace(entry, sts=()) for entry in calibration.entries))
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


# ---- the command ----


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
    from dspark_cpp.calibrate_run import split_prompts

    fit, held_out = split_prompts([[i % 7, 1] for i in range(20)], seed=3)
    assert sorted(map(tuple, fit + held_out)) == [(i, 1) for i in range(7)]
    with pytest.raises(ValueError, match="at least 2 different ones, got 1"):
        split_prompts([[1], [1]], seed=0)
