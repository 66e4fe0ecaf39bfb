"""What the measured cost curves say: cliffs, and the draft length that pays at a given acceptance. Knows no engine."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.table import Table

from dspark_cpp.bench.plots import new_figure, save_figure

if TYPE_CHECKING:
    from dspark_cpp._core import CostCurves

__all__ = ["BestLength", "best_lengths", "cliff_sizes", "cost_table", "draw_costs", "length_table"]

Points = Sequence[tuple[int, float]]  # (size, milliseconds), ascending sizes

ACCEPTANCE_LEVELS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# A cliff: one more row costs this many times the median row, and at least this share of a pass over one row.
_CLIFF_FACTOR = 2.0
_CLIFF_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class BestLength:
    """The draft length that gives the most tokens per time, when each draft is accepted with probability `rate`.

    `ratio` is its throughput over plain decoding's; length 0 is plain decoding.
    """

    n_streams: int
    rate: float
    length: int
    accepted_length: float
    ratio: float


def cliff_sizes(points: Points) -> list[int]:
    """Return the sizes that cost far more than the size before them."""
    steps = [(b, (y - x) / (b - a)) for (a, x), (b, y) in pairwise(points)]
    if not steps:
        return []
    least = max(_CLIFF_FACTOR * median(step for _, step in steps), _CLIFF_SHARE * points[0][1])
    return [size for size, step in steps if step > least]


def cost_at(points: Points, size: int) -> float:
    """Return the cost of a size: measured, between two neighbours, or along the last slope."""
    sizes = [at for at, _ in points]
    right = min(max(bisect_left(sizes, size), 1), len(points) - 1)
    if len(points) == 1:
        return points[0][1] * size / sizes[0]
    (a, x), (b, y) = points[right - 1], points[right]
    return x + (y - x) * (size - a) / (b - a)


def best_lengths(
    costs: CostCurves, block_size: int, n_streams: Sequence[int], rates: Sequence[float] = ACCEPTANCE_LEVELS
) -> list[BestLength]:
    """Return the best fixed draft length for every number of streams and every acceptance rate.

    Notes
    -----
    Throughput of R streams at length l: R (1 + p + ... + p^l) / (T_draft(R) + T_verify(R (1 + l))), of plain decoding
    R / T_plain(R).
    """
    return [_best_length(costs, block_size, streams, rate) for streams in n_streams for rate in rates]


def _best_length(costs: CostCurves, block_size: int, n_streams: int, rate: float) -> BestLength:
    plain_ms = cost_at(costs["plain"] or costs["verify"], n_streams)
    draft_ms = cost_at(costs["draft"], n_streams)
    best = BestLength(n_streams, rate, 0, 1.0, 1.0)
    for length in range(1, block_size + 1):
        accepted_length = sum(rate**k for k in range(length + 1))
        ratio = accepted_length * plain_ms / (draft_ms + cost_at(costs["verify"], n_streams * (1 + length)))
        if ratio > best.ratio:
            best = BestLength(n_streams, rate, length, accepted_length, ratio)
    return best


def cost_table(costs: CostCurves) -> Table:
    """Show T_verify by rows, cliffs marked, with T_draft by blocks beside it."""
    table = Table(title="Measured costs (milliseconds)", title_justify="left", title_style="bold", box=SIMPLE)
    for heading in ("size", "verify", "per row", "to one row", "plain", "prefill", "draft (blocks)", ""):
        table.add_column(heading, justify="right")
    points, cliffs = costs["verify"], cliff_sizes(costs["verify"])
    others = [dict(costs["plain"]), dict(costs["prefill"]), dict(costs["draft"])]
    for size in sorted({size for size, _ in points}.union(*others)):
        ms = dict(points).get(size)
        verify = ("", "", "") if ms is None else (f"{ms:.2f}", f"{ms / size:.2f}", f"{ms / points[0][1]:.2f}x")
        cells = (f"{curve[size]:.2f}" if size in curve else "" for curve in others)
        is_cliff = size in cliffs
        table.add_row(str(size), *verify, *cells, "cliff" if is_cliff else "", style="yellow" if is_cliff else None)
    return table


def length_table(lengths: Sequence[BestLength]) -> Table:
    """Show the best draft lengths: a row per acceptance rate, a column per number of streams."""
    table = Table(title="Best fixed draft length", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("acceptance", justify="right")
    streams = list(dict.fromkeys(one.n_streams for one in lengths))
    for n in streams:
        table.add_column("1 stream" if n == 1 else f"{n} streams", justify="right")
    for rate in dict.fromkeys(one.rate for one in lengths):
        row = [one for n in streams for one in lengths if (one.n_streams, one.rate) == (n, rate)]
        table.add_row(f"{rate:g}", *(f"{one.length} ({one.ratio:.2f}x)" if one.length else "off" for one in row))
    return table


def draw_costs(costs: CostCurves, lengths: Sequence[BestLength], folder: Path) -> list[Path]:
    """Draw the curves with their cliffs, and the best lengths; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with new_figure((9.6, 3.8), 2) as (figure, (left, right)):
        sizes, times = zip(*costs["verify"], strict=True)
        left.plot(sizes, times, marker="o", markersize=3.5, color="#111111", label="verify: rows with logits")
        left.plot(
            *zip(*costs["draft"], strict=True), marker="s", markersize=3.5, color="#2e6f95", label="draft: blocks"
        )
        if costs["plain"]:
            left.plot(*zip(*costs["plain"], strict=True), color="#e9a23b", label="plain: one row a request")
        for i, size in enumerate(cliff_sizes(costs["verify"])):
            label = "cliff" if i == 0 else None
            left.axvline(size, color="#d1495b", linewidth=1.0, linestyle="--", label=label, zorder=1)
            offset = {"xytext": (2, 3 + 8 * (i % 2)), "textcoords": "offset points"}
            left.annotate(str(size), (size, 0), color="#d1495b", fontsize=7, **offset)
        left.set_xlabel("rows or blocks in one pass")
        left.set_ylabel("milliseconds")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)
        left.set_title("Cost of a pass", fontsize=9)
        for n in dict.fromkeys(one.n_streams for one in lengths):
            own = [one for one in lengths if one.n_streams == n]
            label = "1 stream" if n == 1 else f"{n} streams"
            line = right.plot(
                [one.rate for one in own], [one.ratio for one in own], marker="o", markersize=3.5, label=label
            )
            for one in own:
                if one.length:
                    at, offset = (one.rate, one.ratio), {"xytext": (0, 4), "textcoords": "offset points"}
                    right.annotate(str(one.length), at, fontsize=7, ha="center", color=line[0].get_color(), **offset)
        right.set_xlabel("acceptance of each draft")
        right.set_ylabel("throughput over plain decoding")
        right.set_title("Best fixed draft length (numbers; none: decode plainly)", fontsize=9)
        right.legend(frameon=False)
        return save_figure(figure, folder / "costs")
