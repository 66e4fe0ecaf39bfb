"""Shows the progress records of a pull on a terminal: a bar for each file, a line for every other step.

Must not know: where the records come from. Where nobody watches (a pipe, a log) each step is one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["follow"]

T = TypeVar("T")


def follow(records: Generator[dict[str, Any], None, T], console: Console | None = None) -> T:
    """Show records (`status`, for bytes also `digest`, `total`, `completed`) and return the generator's value."""
    console = Console(stderr=True) if console is None else console
    with contextlib.closing(records), _Display(console) as display:
        while True:
            try:
                record = next(records)
            except StopIteration as end:
                value: T = end.value
                return value
            display.show(record)


class _Display:
    """Bars that stand below the lines of finished steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = _make_progress(console)
        self._tasks: dict[str, TaskID] = {}
        self._last = ""

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._progress.stop()

    def show(self, record: dict[str, Any]) -> None:
        status = str(record.get("status", ""))
        if "digest" in record and self._console.is_terminal:
            self._move_bar(status, record)
        elif status != self._last:
            self._console.print(status, highlight=False, markup=False, soft_wrap=True)
        self._last = status

    def _move_bar(self, status: str, record: dict[str, Any]) -> None:
        digest, total, completed = record["digest"], record.get("total", 0), record.get("completed", 0)
        if digest not in self._tasks:
            self._tasks[digest] = self._progress.add_task(status, total=total, completed=completed)
        self._progress.update(self._tasks[digest], completed=completed)


def _make_progress(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}:", markup=False),
        TaskProgressColumn(),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, expand=True)
