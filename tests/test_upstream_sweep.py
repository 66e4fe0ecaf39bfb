"""The comparison with upstream's server: its arithmetic on scripted answers, its commands. No server is started."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from upstream_drafting import read_draft_ms
from upstream_server import server_command
from upstream_sweep import (
    OURS,
    OURS_FULL,
    OURS_PLAIN,
    UPSTREAM_PLAIN,
    Reply,
    Sample,
    Sweep,
    _turn,
    as_table,
    parse_way,
    ratio,
    summary,
)


def make_options(**changes: object) -> argparse.Namespace:
    options = {"target": "t.gguf", "drafter": "d.gguf", "n_ctx": 512, "threads": 2, "n_gpu_layers": 0, "n_tokens": 8}
    options |= {"flash_attention": "off", "lengths": [1, 7], "p_min": "0.3,0.5", "random_weights": False}
    return argparse.Namespace(**(options | changes))


def make_sweep(n_prompts: int) -> Sweep:
    return Sweep(Path("server"), make_options(), None, [[1]] * n_prompts)  # type: ignore[arg-type]


def test_ways_hold_every_setting_of_upstream() -> None:
    ways = make_sweep(1).ways()
    assert ways == [
        UPSTREAM_PLAIN,
        "upstream n=1",
        "upstream n=7",
        "upstream n=7 p=0.3",
        "upstream n=7 p=0.5",
        OURS_PLAIN,
        OURS,
        OURS_FULL,
    ]
    assert [parse_way(way) for way in ways[:-3]] == [(0, 0.0), (1, 0.0), (7, 0.0), (7, 0.3), (7, 0.5)]
    with pytest.raises(ValueError, match="way must be upstream's"):
        parse_way(OURS)


def test_server_command_has_room_for_every_stream() -> None:
    command = server_command(Path("server"), make_options(), 1234, 7, n_streams=4, p_min=0.5)
    pairs = dict(pairwise(command))
    assert (pairs["--parallel"], pairs["--ctx-size"]) == ("4", "2048")
    assert (pairs["--spec-draft-n-max"], pairs["--spec-draft-p-min"]) == ("7", "0.5")
    assert "--spec-type" not in server_command(Path("server"), make_options(), 1234, 0)


def test_speeds_add_up_over_streams_and_times_over_waves() -> None:
    waves = iter([[Reply(10, 1000.0, 5), Reply(20, 1000.0, 5)], [Reply(10, 2000.0, 10), Reply(0, 0.0, 0)]])

    def answer(prompts: Sequence[Sequence[int]], temperature: float, n_tokens: int, seed: int) -> list[Reply]:
        assert len(prompts) == 2
        return next(waves)

    sample = _turn(make_sweep(5), answer, OURS, 2, 0.0, 0)  # the fifth prompt has no partner
    # 30 tokens at 30 a second, then 10 at 5 a second: 40 tokens in 3 seconds.
    assert sample.tokens_per_second == pytest.approx(40 / 3)
    assert sample.accepted_length == pytest.approx(2.0)
    assert sample.round_ms == pytest.approx(200.0)


def test_ratios_are_medians_within_repetitions() -> None:
    def samples(way: str, speeds: Sequence[float]) -> dict[int, Sample]:
        return {i: Sample(1, 0.0, way, i, speed, 1.0, 1.0) for i, speed in enumerate(speeds)}

    ours, theirs = samples(OURS, (20, 10, 30)), samples(UPSTREAM_PLAIN, (10, 5, 30))
    assert ratio(ours, theirs) == 2.0
    table = as_table([*ours.values(), *theirs.values()], "title")
    assert list(table.columns[2].cells) == ["2.000", "1.000"]


def test_summary_takes_upstream_s_best_in_hindsight() -> None:
    def sample(way: str, speed: float, length: float) -> Sample:
        return Sample(1, 1.0, way, 0, speed, length, 1.0)

    table = summary(
        [
            sample(UPSTREAM_PLAIN, 100.0, 1.0),
            sample("upstream n=1", 80.0, 1.5),
            sample("upstream n=7", 50.0, 2.0),
            sample(OURS, 120.0, 1.2),
            sample(OURS_FULL, 60.0, 4.0),
        ]
    )
    [row] = zip(*(column.cells for column in table.columns), strict=True)
    assert row == ("1", "1", UPSTREAM_PLAIN, "1.200", "upstream n=1", "1.500", "2.00", "4.00", "2.00")


def test_draft_time_is_read_from_the_last_statistics() -> None:
    line = (
        "statistics draft-dspark: #calls(b,g,a) =    1     {n}     9, #gen drafts = 8, dur(b,g,a) = 0.001, {ms}, 0.2 ms"
    )
    log = "\n".join([line.format(n=4, ms="100.0"), "other", line.format(n=10, ms="500.0")])
    assert read_draft_ms(log) == 50.0
    assert read_draft_ms("nothing") is None
