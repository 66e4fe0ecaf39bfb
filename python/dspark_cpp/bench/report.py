"""From runs to figures: medians, ratios within a repetition, tables, JSON. Knows no engine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, median
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from dspark_cpp import _core
from dspark_cpp.bench.cases import ADAPTIVE, MIXED, PLAIN, Cell
from dspark_cpp.bench.runner import PARTS, Run, best_fixed, ratios, ratios_to_best, standard_error

__all__ = ["CellReport", "WayReport", "as_json", "cell_table", "report_cell", "summary", "summary_table"]

_HEADINGS = ("tokens/s", "per user", "ratio", "spread", "accepted\nlength", "verified\nlength", "rounds\ndrafted")


@dataclass(frozen=True, slots=True)
class WayReport:
    """One way of decoding in one cell: medians over repetitions.

    Attributes
    ----------
    ratio, ratio_low, ratio_high
        Throughput over that of plain decoding in the same repetition: median, least, most.
    parts_ms
        Milliseconds per step by part; "loop" is the time outside the engine.
    accepted_per_position, scheduled_per_position
        Sums over all runs, by position in the block.
    """

    way: str
    n_runs: int
    tokens_per_second: float
    user_speed: float
    first_token_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    accepted_length: float
    scheduled_length: float
    drafted_share: float
    parts_ms: dict[str, float]
    scheduled_per_position: list[int]
    accepted_per_position: list[int]


@dataclass(frozen=True, slots=True)
class CellReport:
    """All ways in one cell, and the default policy against the best fixed choice made in hindsight.

    Attributes
    ----------
    best
        Of plain, off and the fixed lengths, the one with the largest median ratio to plain.
    adaptive_to_plain, adaptive_to_best
        Throughput of `adaptive` over that of plain decoding and of `best`, median over repetitions; None without it.
    error, best_error
        Standard errors of the two.
    """

    cell: Cell
    ways: dict[str, WayReport]
    best: str
    adaptive_to_plain: float | None
    adaptive_to_best: float | None
    error: float = 0.0
    best_error: float = 0.0


def report_cell(runs: Sequence[Run]) -> CellReport:
    """Summarize the runs of one cell; plain decoding must have run in every repetition."""
    by_way: dict[str, list[Run]] = {}
    for run in runs:
        by_way.setdefault(run.way, []).append(run)
    ways = {way: _report_way(way, own, ratios(runs, way, PLAIN)) for way, own in by_way.items()}
    best = best_fixed(runs)
    if ADAPTIVE not in by_way:
        return CellReport(runs[0].cell, ways, best, None, None)
    to_plain, to_best = ratios(runs, ADAPTIVE, PLAIN), ratios_to_best(runs)
    return CellReport(
        runs[0].cell, ways, best, median(to_plain), median(to_best), standard_error(to_plain), standard_error(to_best)
    )


def _report_way(way: str, runs: Sequence[Run], to_plain: Sequence[float]) -> WayReport:
    return WayReport(
        way,
        len(runs),
        median(run.tokens_per_second for run in runs),
        median(run.user_speed for run in runs),
        median(run.first_token_ms for run in runs),
        median(to_plain),
        min(to_plain),
        max(to_plain),
        mean(run.accepted_length for run in runs),
        mean(run.scheduled_length for run in runs),
        mean(_drafted_share(run) for run in runs),
        _parts(runs),
        _sum_columns([run.scheduled_per_position for run in runs]),
        _sum_columns([run.accepted_per_position for run in runs]),
    )


def _drafted_share(run: Run) -> float:
    """Share of the rounds that drafted a block."""
    n_blocks = run.counts["n_drafted"] / max(len(run.scheduled_per_position), 1)
    return n_blocks / max(run.counts["n_rounds"], 1)


def _parts(runs: Sequence[Run]) -> dict[str, float]:
    def per_step(total: float, run: Run) -> float:
        return total / max(run.counts["n_steps"], 1)

    parts = {name: median(per_step(run.steps_ms[name], run) for run in runs) for name in PARTS}
    return parts | {"loop": median(per_step(run.loop_ms, run) for run in runs)}


def _sum_columns(rows: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


# ---- tables ----


def cell_table(report: CellReport, title: str = "") -> Table:
    """Show all ways of one cell; the best fixed choice in bold."""
    n_runs = report.ways[PLAIN].n_runs
    title = f"{title}{report.cell.label} (medians of {n_runs}; milliseconds per step without prompts)"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("way")
    for heading in (*_HEADINGS, *PARTS, "loop"):
        table.add_column(heading, justify="right")
    for way in report.ways.values():
        speeds = (f"{way.tokens_per_second:.1f}", f"{way.user_speed:.1f}", f"{way.ratio:.3f}")
        spread = f"{way.ratio_low:.2f}..{way.ratio_high:.2f}"
        lengths = (f"{way.accepted_length:.2f}", f"{way.scheduled_length:.2f}", f"{way.drafted_share:.0%}")
        parts = (f"{value:.2f}" for value in way.parts_ms.values())
        style = "bold green" if way.way == report.best else None
        table.add_row(way.way, *speeds, spread, *lengths, *parts, style=style)
    return table


def summary_table(reports: Sequence[CellReport]) -> Table:
    """Show the default policy in every cell against plain decoding and against the best choice in hindsight."""
    table = Table(title="Default policy, cell by cell", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("cell")
    for heading in ("plain\ntokens/s", "adaptive\nto plain", "best in\nhindsight", "adaptive\nto best"):
        table.add_column(heading, justify="right")
    for report in reports:
        plain = f"{report.ways[PLAIN].tokens_per_second:.1f}"
        to_plain = _ratio(report.adaptive_to_plain, report.error)
        to_best = _ratio(report.adaptive_to_best, report.best_error)
        table.add_row(report.cell.label, plain, to_plain, report.best, to_best)
    return table


def _ratio(value: float | None, error: float) -> str:
    return "-" if value is None else f"{value:.3f} \u00b1 {error:.3f}"


def summary(reports: Sequence[CellReport]) -> dict[str, float | int | None]:
    """Return the least and the middle of the default policy's ratios over all cells, and the least on mixed traffic."""
    to_plain = [report.adaptive_to_plain for report in reports if report.adaptive_to_plain is not None]
    to_best = [report.adaptive_to_best for report in reports if report.adaptive_to_best is not None]
    mixed = [r.adaptive_to_best for r in reports if r.cell.domain == MIXED and r.adaptive_to_best is not None]
    return {
        "n_cells": len(reports),
        "adaptive_to_plain_min": min(to_plain, default=None),
        "adaptive_to_plain_median": median(to_plain) if to_plain else None,
        "adaptive_to_best_min": min(to_best, default=None),
        "adaptive_to_best_median": median(to_best) if to_best else None,
        "adaptive_to_best_mixed_min": min(mixed, default=None),
    }


# ---- JSON ----


def as_json(runs: Sequence[Run], reports: Sequence[CellReport], about: dict[str, Any]) -> dict[str, Any]:
    """Return everything: what was asked for, the machine, every run, every cell, the summary."""
    info = _core.build_info()
    machine = {
        "n_cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "system_info": info.system_info,
        "devices": [f"{device.kind}: {device.description}" for device in info.devices],
        "dspark_cpp": info.version,
        "llama_cpp_commit": info.llama_cpp_commit,
    }
    return {
        "kind": "dspark bench",
        "machine": machine,
        "about": about,
        "summary": summary(reports),
        "cells": [asdict(report) for report in reports],
        "runs": [asdict(run) for run in runs],
    }
