"""Plots of a benchmark, as PNG and SVG. The only file that needs matplotlib (`pip install dspark-cpp[plots]`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from operator import mul
from pathlib import Path
from typing import Any

from dspark_cpp.bench.cases import PLAIN
from dspark_cpp.bench.report import CellReport, WayReport

__all__ = ["check_drawing", "conditional_acceptance", "draw_all", "new_figure", "save_figure"]

_FULL = 7
_PANEL_INCHES = (3.4, 2.9)
_GREY = "#b8bec6"
_COLORS = {
    PLAIN: "#111111",
    "off": "#7a7a7a",
    "adaptive": "#d1495b",
    "algorithm1": "#2e6f95",
    "threshold:0.5": "#e9a23b",
}

Panel = Callable[[Any, Sequence[CellReport]], None]


def draw_all(reports: Sequence[CellReport], folder: Path, note: str = "") -> list[Path]:
    """Draw every plot that the cells have data for.

    Parameters
    ----------
    reports
        Cells of one benchmark.
    folder
        Where the files go.
    note
        A line for the foot of every plot.

    Returns
    -------
    list of Path
        The files: `<plot>.png` and `<plot>.svg`.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = _draw(folder / "throughput", reports, _throughput, "Throughput against speed per user", note)
    if any(_scheduled(report) for report in reports):
        paths += _draw(folder / "accepted", reports, _accepted, "Drafts accepted, by position in the block", note)
        paths += _draw(folder / "scheduled", reports, _lengths, "Drafted tokens verified per round and stream", note)
    return paths


def save_figure(figure: Any, stem: Path, note: str = "") -> list[Path]:
    """Save a figure as PNG and SVG beside each other; returns the paths."""
    if note:
        figure.text(0.01, 0.005, note, fontsize=7, color="#8a4b00")
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


@contextmanager
def new_figure(inches: tuple[float, float], n_panels: int) -> Iterator[tuple[Any, Any]]:
    """Open a figure with panels side by side; yields it and its axes.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    with _pyplot() as pyplot:
        figure, axes = pyplot.subplots(1, n_panels, figsize=inches, squeeze=False, layout="constrained")
        yield figure, axes[0]


def check_drawing() -> None:
    """Raise ImportError if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("cannot draw plots: matplotlib is missing, pip install dspark-cpp[plots]")


@contextmanager
def _pyplot() -> Iterator[Any]:
    check_drawing()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    style |= {"grid.color": "#e6e8eb", "grid.linewidth": 0.6, "axes.axisbelow": True, "svg.fonttype": "none"}
    with pyplot.rc_context(style):
        yield pyplot
    pyplot.close("all")


def _draw(stem: Path, reports: Sequence[CellReport], panel: Panel, title: str, note: str) -> list[Path]:
    """One row of panels per temperature, one column per domain, a common legend on the right."""
    temperatures = list(dict.fromkeys(report.cell.temperature for report in reports))
    domains = list(dict.fromkeys(report.cell.domain for report in reports))
    with _pyplot() as pyplot:
        width, height = _PANEL_INCHES[0] * len(domains) + 1.6, _PANEL_INCHES[1] * len(temperatures) + 0.6
        figure, axes = pyplot.subplots(
            len(temperatures), len(domains), figsize=(width, height), squeeze=False, layout="constrained"
        )
        for row, temperature in zip(axes, temperatures, strict=True):
            for axis, domain in zip(row, domains, strict=True):
                own = [r for r in reports if (r.cell.domain, r.cell.temperature) == (domain, temperature)]
                axis.set_title(f"{domain}, T = {temperature:g}", fontsize=9)
                panel(axis, own)
        handles = {
            label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        return save_figure(figure, stem, note)


def _style(way: str) -> dict[str, Any]:
    """Give fixed lengths greys that darken with the length, and policies colours of their own."""
    if way.startswith("fixed:"):
        shade = 0.82 - 0.5 * min(int(way.partition(":")[2]), _FULL) / _FULL
        return {"color": str(round(shade, 2)), "linewidth": 1.0, "markersize": 3, "zorder": 2}
    is_ours = way == "adaptive"
    return {"color": _COLORS.get(way, "#6a4c93"), "linewidth": 2.2 if is_ours else 1.4, "zorder": 4 if is_ours else 3}


def _ways(reports: Sequence[CellReport]) -> list[str]:
    return list(dict.fromkeys(way for report in reports for way in report.ways))


def _points(reports: Sequence[CellReport], way: str) -> list[tuple[int, WayReport]]:
    return sorted(((r.cell.n_streams, r.ways[way]) for r in reports if way in r.ways), key=lambda point: point[0])


def _throughput(axis: Any, reports: Sequence[CellReport]) -> None:
    for way in _ways(reports):
        points = _points(reports, way)
        xs, ys = [report.user_speed for _, report in points], [report.tokens_per_second for _, report in points]
        axis.plot(xs, ys, marker="o", label=way, **({"markersize": 4} | _style(way)))
        if way in (PLAIN, "adaptive"):
            for (n_streams, _), x, y in zip(points, xs, ys, strict=True):
                axis.annotate(str(n_streams), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=6.5)
    axis.set_xlabel("tokens/s of one user (numbers: streams)")
    axis.set_ylabel("tokens/s of all")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


def _accepted(axis: Any, reports: Sequence[CellReport]) -> None:
    """Bars: of the drafts sent to the target at a position, how many were accepted; line: the whole prefix."""
    way = _longest_fixed(reports)
    own = [report.ways[way] for report in reports]
    scheduled = [sum(column) for column in zip(*(one.scheduled_per_position for one in own), strict=True)]
    accepted = [sum(column) for column in zip(*(one.accepted_per_position for one in own), strict=True)]
    conditional = conditional_acceptance(scheduled, accepted)
    positions = range(1, len(conditional) + 1)
    axis.bar(positions, conditional, width=0.62, color="#c9d7e3", label="given that all before it were")
    axis.plot(positions, list(accumulate(conditional, mul)), marker="o", color="#2e6f95", label="whole prefix")
    axis.set_xticks(positions)
    axis.set_ylim(0, 1.04)
    axis.set_xlabel(f"position in the block ({way})")
    axis.set_ylabel("accepted")


def conditional_acceptance(scheduled: Sequence[int], accepted: Sequence[int]) -> list[float]:
    """Return P(draft k accepted | all before it were), as far as drafts were verified.

    Rounds at the end of an answer verify fewer drafts; they are taken to have been accepted like the others.
    """
    prefix = [a / s for a, s in zip(accepted, scheduled, strict=True) if s > 0]
    return [min(one / before, 1.0) if before > 0 else 0.0 for before, one in pairwise([1.0, *prefix])]


def _longest_fixed(reports: Sequence[CellReport]) -> str:
    """Return the way that shows the most positions: the longest fixed length, else whatever verified most."""
    return max(_ways(reports), key=lambda way: reports[0].ways[way].scheduled_length)


def _scheduled(report: CellReport) -> list[int]:
    return max((way.scheduled_per_position for way in report.ways.values()), key=sum, default=[])


def _lengths(axis: Any, reports: Sequence[CellReport]) -> None:
    for way in _ways(reports):
        if way in (PLAIN, "off"):
            continue
        points = _points(reports, way)
        axis.plot(
            [n for n, _ in points],
            [report.scheduled_length for _, report in points],
            marker="o",
            label=way,
            **({"markersize": 4} | _style(way)),
        )
    counts = sorted({report.cell.n_streams for report in reports})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel("streams")
    axis.set_ylabel("verified length")
    axis.set_ylim(bottom=0)
