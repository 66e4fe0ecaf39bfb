"""How a calibration is shown: tables on the terminal, and the reliability diagram as a picture.

Owns: columns, axes, words. matplotlib is an optional extra and imported only when a picture is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from dspark_cpp.calibrate_run import CaseResult
from dspark_cpp.calibration_fit import PositionFigures, prefix_events, survivals
from dspark_cpp.calibration_scores import reliability

__all__ = ["case_table", "draw_reliability", "mean_ece", "mean_noise", "require_matplotlib"]

_COLUMNS = (
    *("accepted", "T", "offset", "ECE\nbefore", "\nT alone", "\nafter", "noise"),
    *("AUC\nbefore", "\nafter", "Brier\nbefore", "\nafter"),
)


def mean_ece(figures: Sequence[PositionFigures]) -> float:
    """Mean ECE over the positions that have blocks."""
    return float(np.nanmean([position.ece for position in figures]))


def mean_noise(figures: Sequence[PositionFigures]) -> float:
    """Mean ECE that perfectly calibrated confidences would show with as many blocks."""
    return float(np.nanmean([position.noise for position in figures]))


def case_table(case: CaseResult) -> Table:
    """Return the table of one rule and temperature: a row per position, figures of the held-out blocks."""
    entry = case.entry
    title = f"{entry.rule}, temperature {entry.temperature:g}: {entry.n_blocks} blocks for the fit, "
    title += f"{len(case.held_out.accepted)} held out ({case.n_held_out_prompts} prompts)"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    for heading in ("token", *(_COLUMNS if case.after else _COLUMNS[:1])):
        table.add_column(heading, justify="right", no_wrap=True)
    for k, acceptance in enumerate(entry.acceptance):
        table.add_row(str(k + 1), f"{acceptance:.3f}", *(_figures(case, k) if case.after else ()))
    if case.after:
        errors = [mean_ece(figures) for figures in (case.before, case.sts, case.after)]
        table.add_row("mean", *[""] * 3, *(f"{e:.4f}" for e in (*errors, mean_noise(case.after))), style="bold")
    return table


def _figures(case: CaseResult, k: int) -> list[str]:
    before, scaled, after = case.before[k], case.sts[k], case.after[k]
    errors = (before.ece, scaled.ece, after.ece, after.noise)
    values = (*errors, before.auc, after.auc, before.brier, after.brier)
    return [f"{case.entry.sts[k]:.3f}", f"{case.entry.offsets[k]:.3f}", *(f"{value:.4f}" for value in values)]


def require_matplotlib() -> Any:
    """Return matplotlib.

    Raises
    ------
    ImportError
        Saying how to install it.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError('a plot needs matplotlib: pip install "dspark-cpp[plots]"') from None
    matplotlib.use("agg")  # files only: no display is needed
    return matplotlib


def draw_reliability(cases: Sequence[CaseResult], path: Path) -> None:
    """Draw confidence against frequency, before and after: a row per case, a column per position.

    Parameters
    ----------
    cases : sequence of CaseResult
        Those of a drafter with a confidence head.
    path : Path
        Picture to write; its ending names the format (.png, .svg).
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    gamma = len(cases[0].entry.sts)
    figure = Figure(figsize=(1.9 * gamma, 2.2 * len(cases) + 0.6), layout="constrained")
    grid = figure.subplots(len(cases), gamma, sharex=True, sharey=True, squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        for k, axes in enumerate(row):
            _draw_position(axes, case, k)
        row[0].set_ylabel(f"{case.entry.rule}, T = {case.entry.temperature:g}\naccepted")
    for axes in grid[-1]:
        axes.set_xlabel("confidence")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)


def _draw_position(axes: Any, case: CaseResult, k: int) -> None:
    blocks = case.held_out
    is_known = blocks.verified > k
    events = prefix_events(blocks.accepted, len(case.entry.sts))[is_known, k]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, label="perfect")
    for label, parameters, color in (
        ("before", (np.ones(len(case.entry.sts)),), "tab:orange"),
        ("after", (case.entry.sts, case.entry.offsets, case.entry.maps), "tab:blue"),
    ):
        bins = reliability(survivals(blocks.logits, *parameters)[is_known, k], events)
        is_drawn = bins.n >= max(5, len(events) // 500)  # a bin of a few blocks shows noise alone
        points = (bins.confidence[is_drawn], bins.frequency[is_drawn])
        axes.plot(*points, marker="o", markersize=2.5, linewidth=1, color=color, label=label)
    axes.set_title(f"first {k + 1}: ECE {case.before[k].ece:.3f} → {case.after[k].ece:.3f}", fontsize=7)
