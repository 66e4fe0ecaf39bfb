"""What stands between an engine and its callers: they put requests in and get events out.

Owns: the engine, who waits for which request, how everything ends. Must not know: text, options, what an event means
beyond whose it is and whether it is the last. `submit`, `cancel` and `close` may be called from any thread; `take_turn`
is called by the compute thread alone.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from dspark_cpp import _core
from dspark_cpp.compute_thread import POLL_SECONDS, compute_thread
from dspark_cpp.errors import DSparkError, EngineClosedError

__all__ = ["Deliver", "EngineLoop", "RequestGroup", "SteppedEngine"]

_log = logging.getLogger(__name__)

# Of a turn. Steps of small models take a tenth of it or less; waking a receiver for each would cost more than they do.
_TURN_MS = 4.0

# Called in the compute thread with each event of a request, or with the error that ended it; must not block.
Deliver = Callable[["_core.Event | DSparkError"], None]


class SteppedEngine(Protocol):
    """The part of `_core.Engine` that the loop uses."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""

    def submit(self, prompt: Sequence[int], options: _core.RequestOptions) -> int:
        """Queue a request, return its id."""

    def turn(self, budget_ms: float) -> list[_core.Event]:
        """Run as many steps as begin within `budget_ms`, at least one; return what they did."""

    def cancel(self, request_id: int) -> bool:
        """End a request within one step."""

    def close(self) -> None:
        """Free everything."""


class EngineLoop:
    """Runs an engine in the process's compute thread until `close`.

    An error of the engine reaches everyone who waits, and everyone who comes later. The thread is a daemon, and `close`
    runs at interpreter exit, so that an open loop neither keeps a program from ending nor crashes it. It does not
    survive a fork: the child has no such thread, and is told so.

    Parameters
    ----------
    engine : SteppedEngine
        The engine; the loop owns it from here on.
    """

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        # The three below are guarded by compute_thread.wake.
        self._deliver: dict[int, Deliver] = {}
        self._is_closing = False
        self._failure: DSparkError | None = None
        self._has_ended = threading.Event()
        self._pid = os.getpid()
        compute_thread.join(self)
        atexit.register(self.close)

    @property
    def is_closed(self) -> bool:
        """Whether requests are refused: after `close` or a failure of the engine."""
        return self._is_closing

    def submit(self, prompt: Sequence[int], options: _core.RequestOptions, deliver: Deliver) -> int:
        """Queue a request.

        Parameters
        ----------
        prompt : sequence of int, shape (n_prompt,)
            Token ids.
        options : RequestOptions
            The engine's form of the options.
        deliver : callable
            Gets every event of the request, and an error if the engine ends before the request does. Called in the
            compute thread; must not block.

        Returns
        -------
        int
            The request's id.

        Raises
        ------
        EngineClosedError
            After `close`, after the engine failed, or in a forked process.
        ValueError, ContextFullError, QueueFullError
            As the engine finds.
        """
        if os.getpid() != self._pid:
            raise EngineClosedError("cannot submit a request: an engine does not survive a fork; make one per process")
        with compute_thread.wake:
            self._check_open()
            request_id = self._engine.submit(prompt, options)
            self._deliver[request_id] = deliver
            compute_thread.wake.notify_all()
            return request_id

    def cancel(self, request_id: int) -> bool:
        """End a request within one step; its last event still comes. False if it has already ended."""
        return not self._is_closing and os.getpid() == self._pid and self._engine.cancel(request_id)

    def close(self, *, wait: bool = True) -> None:
        """Finish the step in progress, give every waiting caller EngineClosedError, free the engine. Idempotent.

        Parameters
        ----------
        wait : bool
            Return when that is done. A garbage collector must not: it may run anywhere, also with `wake` held.
        """
        if os.getpid() != self._pid:
            return  # a forked copy: the thread and the engine belong to the parent
        with compute_thread.wake:
            self._is_closing = True
            compute_thread.wake.notify_all()
        if wait and not compute_thread.is_current:
            self._has_ended.wait()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineClosedError(f"cannot submit a request: the engine failed: {self._failure}")
        if self._is_closing:
            raise EngineClosedError("cannot submit a request: the engine is closed")

    # ---- the compute thread ----

    @property
    def has_turn(self) -> bool:
        """Whether the engine has work, or is to end."""
        return self._is_closing or self._engine.has_work

    def take_turn(self) -> None:
        """Run steps for a moment and hand their events over; ends the loop when it is closed or the step fails."""
        if self._is_closing:
            self._end(EngineClosedError("the engine was closed before the request ended"))
            return
        try:
            for event in self._engine.turn(_TURN_MS):
                self._dispatch(event)
        except Exception as cause:
            self._failure = _as_dspark_error(cause)
            self._end(self._failure)

    def _dispatch(self, event: _core.Event) -> None:
        with compute_thread.wake:  # submit registers under this lock, so that no event comes before its receiver
            is_last = event.finish_reason is not None
            take = self._deliver.pop if is_last else self._deliver.get
            deliver = take(event.request_id, None)
        if deliver is not None and not _call(deliver, event) and not is_last:
            self._engine.cancel(event.request_id)

    def _end(self, error: DSparkError) -> None:
        with compute_thread.wake:
            self._is_closing = True
            waiting, self._deliver = self._deliver, {}
        with contextlib.suppress(Exception):  # a failed engine may fail here too; the first error is the one to tell
            self._engine.close()
        for deliver in waiting.values():
            _call(deliver, error)
        compute_thread.leave(self)
        atexit.unregister(self.close)
        self._has_ended.set()


class RequestGroup:
    """The requests of one caller, who waits for them in its own thread. Leaving the group cancels what still runs.

    Parameters
    ----------
    loop : EngineLoop
        Where the requests go.
    """

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._inbox: queue.SimpleQueue[_core.Event | DSparkError] = queue.SimpleQueue()
        self._open: set[int] = set()

    def __enter__(self) -> RequestGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for request_id in self._open:
            self._loop.cancel(request_id)

    @property
    def n_open(self) -> int:
        """Requests whose last event has not been read yet."""
        return len(self._open)

    def submit(self, prompt: Sequence[int], options: _core.RequestOptions) -> int:
        """Queue a request; see `EngineLoop.submit`."""
        request_id = self._loop.submit(prompt, options, self._inbox.put)
        self._open.add(request_id)
        return request_id

    def cancel(self, request_id: int) -> None:
        """End a request early; its last event is still to be read."""
        self._loop.cancel(request_id)

    def next_event(self) -> _core.Event:
        """Wait for the next event of any of the requests.

        Raises
        ------
        DSparkError
            The engine ended before the requests did: EngineClosedError after `close`, else what made it fail.
        """
        while True:
            try:
                event = self._inbox.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(event, DSparkError):
                raise type(event)(str(event)) from event  # one error goes to many threads: each raises its own
            if event.finish_reason is not None:
                self._open.discard(event.request_id)
            return event


def _call(deliver: Deliver, event: _core.Event | DSparkError) -> bool:
    """Hand an event over; a receiver that raises must not take the other requests down with it."""
    try:
        deliver(event)
    except Exception:
        _log.exception("cannot deliver an event: its receiver raised")
        return False
    return True


def _as_dspark_error(cause: Exception) -> DSparkError:
    if isinstance(cause, DSparkError):
        return cause
    error = DSparkError(f"cannot run the engine: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
