"""Where a step's time goes, as text bars: a flame graph of one level."""

from __future__ import annotations

from collections.abc import Mapping

from rich.text import Text

from dspark_cpp.bench.report import CellReport

__all__ = ["step_split"]

_WIDTH = 60
_NAMES = {
    "draft": "drafter: one pass over all blocks",
    "head": "drafter: sequential head",
    "verify": "target: one pass over all rows",
    "inject": "drafter: context rows",
    "sample": "host: sampling, acceptance",
    "host": "host: scheduling and the rest",
    "loop": "Python: events, queues",
}


def step_split(report: CellReport, way: str) -> Text:
    """Draw the parts of a step of one way of decoding, one bar each.

    Raises
    ------
    ValueError
        If the way was not measured.
    """
    if way not in report.ways:
        raise ValueError(f"way must be one of {', '.join(report.ways)}, got {way}")
    parts = report.ways[way].parts_ms
    total = sum(parts.values())
    text = Text(f"{report.cell.label}: {way}, {total:.2f} ms a step\n", style="bold")
    for line in _bars(parts, total):
        text.append(line, style="none")
    return text


def _bars(parts: Mapping[str, float], total: float) -> list[str]:
    lines = []
    for name, ms in parts.items():
        share = ms / total if total > 0 else 0.0
        bar = "\u2588" * round(share * _WIDTH)
        lines.append(f"  {_NAMES.get(name, name):<40} {ms:9.3f} ms {share:6.1%} {bar}\n")
    return lines
