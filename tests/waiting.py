"""Waiting for an event, never for a time. The limit is for what hangs: a busy machine may stand still for minutes."""

from __future__ import annotations

import time
from collections.abc import Callable

LIMIT_S = 300.0


def wait_until(holds: Callable[[], object], seconds: float = LIMIT_S) -> None:
    """Return as soon as it holds; AssertionError if that does not happen."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
