"""One HTTP exchange: reading a body within limits, giving up when the client leaves or the time is over, streaming.

Starlette notices a client who leaves only when it writes; a long prompt is read without a word written. So whoever
works for a client here is watched: the work is cancelled as soon as the connection is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark_cpp.server.problems import ClientGoneError, Problem

__all__ = ["Deadline", "StreamReply", "attended", "body_chunks", "read_body", "record"]

T = TypeVar("T")
_LAST_WORD_SECONDS = 2.0


class Deadline:
    """When a request's time is over.

    Parameters
    ----------
    seconds
        From now; 0: never.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds if seconds else None

    @property
    def left(self) -> float | None:
        """Seconds that are left; None: no limit."""
        return None if self._end is None else max(self._end - time.monotonic(), 0.0)

    @property
    def problem(self) -> Problem:
        """What the client is told when it is over."""
        return Problem(503, f"request timed out after {self.seconds:g} s", code="timeout")


def record(scope: Scope) -> dict[str, Any]:
    """Return what is logged about the request of this scope; may be added to."""
    found: dict[str, Any] = scope.setdefault("dspark", {})
    return found


async def body_chunks(request: Request, limit: int, seconds: float) -> AsyncIterator[bytes]:
    """Yield a body as it comes.

    Raises
    ------
    Problem
        413 when it is longer than `limit`, 408 when nothing comes for `seconds`.
    """
    n_bytes = 0
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise Problem(413, f"request body must have at most {limit} bytes, got {declared}")
    chunks = request.stream()
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks), seconds)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Problem(408, "request body came too slowly") from None
        except ClientDisconnect:
            raise ClientGoneError from None
        n_bytes += len(chunk)
        if n_bytes > limit:
            raise Problem(413, f"request body must have at most {limit} bytes")
        yield chunk


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Return a whole body; raises as `body_chunks`."""
    return b"".join([chunk async for chunk in body_chunks(request, limit, seconds)])


async def attended(receive: Receive, deadline: Deadline, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a client who is there; the body must have been read.

    Raises
    ------
    ClientGoneError
        The client left; the work was cancelled.
    Problem
        503 when the time was over; likewise.
    """
    task = asyncio.ensure_future(work)
    try:
        await _race(task, receive, deadline)
    finally:
        await _cancel(task)
    return task.result()


async def _race(task: asyncio.Future[Any], receive: Receive, deadline: Deadline) -> None:
    watcher = asyncio.ensure_future(_disconnect(receive))
    try:
        done, _ = await asyncio.wait({task, watcher}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(watcher)
    if task not in done:
        raise ClientGoneError if watcher in done else deadline.problem


async def _cancel(task: asyncio.Future[Any]) -> None:
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamReply(Response):
    """Sends chunks as they come, to a client who is there.

    Parameters
    ----------
    chunks
        The stream; closed at the end, however it comes.
    media_type
        Of the stream.
    deadline
        When it must be over.
    last_word
        What is sent when the time is over.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes],
        media_type: str,
        deadline: Deadline,
        last_word: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self._chunks = chunks
        self._deadline = deadline
        self._last_word = last_word

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, the client's leaving, or the deadline."""
        task = asyncio.ensure_future(self._send_all(send))
        try:
            await _race(task, receive, self._deadline)
            task.result()
        except ClientGoneError:
            record(scope)["status"] = 499
        except Problem:
            await _cancel(task)
            record(scope)["status"] = 503
            await _say(send, self._last_word)
        finally:
            await _cancel(task)
            await self._chunks.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _say(send: Send, text: bytes) -> None:
    """Send, but not to a client that does not read."""
    message = {"type": "http.response.body", "body": text, "more_body": False}
    with contextlib.suppress(TimeoutError, RuntimeError):
        await asyncio.wait_for(send(message), _LAST_WORD_SECONDS)
