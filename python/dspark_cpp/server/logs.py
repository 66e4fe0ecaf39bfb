"""One line per request, and the middleware that writes it. Nothing of a prompt or an answer is ever part of it."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_cpp.server.exchange import record
from dspark_cpp.server.metrics import Metrics

__all__ = ["RequestLog", "set_up_logging"]

_log = logging.getLogger("dspark.request")
_SILENT = ("uvicorn.access",)


class RequestLog:
    """Logs and counts every exchange when it is over.

    Parameters
    ----------
    app
        What stands behind.
    metrics
        Where it is counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        found = record(scope)

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                found.setdefault("status", message["status"])
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            self._finish(scope, found, time.perf_counter() - begin)

    def _finish(self, scope: Scope, found: dict[str, Any], seconds: float) -> None:
        status = int(found.pop("status", 500))
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.count_request(route, status, seconds)
        client = scope.get("client") or ("-", 0)
        fields = {
            "client": client[0],
            "method": scope["method"],
            "path": _printable(scope["path"]),
            "status": status,
            "seconds": round(seconds, 4),
            **found,
        }
        _log.info("request", extra={"fields": fields})


class _TextFormatter(logging.Formatter):
    def format(self, entry: logging.LogRecord) -> str:
        """Return `time level message key=value ...`."""
        fields = getattr(entry, "fields", {})
        rest = "".join(f" {name}={value}" for name, value in fields.items())
        text = f"{_time_of(entry)} {entry.levelname.lower()} {entry.getMessage()}{rest}"
        return text if entry.exc_info is None else f"{text}\n{self.formatException(entry.exc_info)}"


class _JsonFormatter(logging.Formatter):
    def format(self, entry: logging.LogRecord) -> str:
        """Return one JSON object."""
        fields = {"time": _time_of(entry), "level": entry.levelname.lower(), "message": entry.getMessage()}
        if entry.exc_info is not None:
            fields["exception"] = self.formatException(entry.exc_info)
        return json.dumps(fields | getattr(entry, "fields", {}))


def set_up_logging(log_format: str, level: int = logging.INFO) -> None:
    """Send all logs to standard error in one format."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _SILENT:
        logging.getLogger(name).disabled = True


def _time_of(entry: logging.LogRecord) -> str:
    return datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _printable(path: str) -> str:
    """Return a path without what could fake a line of the log."""
    text = "".join(char if char.isprintable() and char != " " else "?" for char in path[:200])
    return text if len(path) <= 200 else text + "..."
