"""The one thread of a process that computes: it gives every engine its turn and runs single jobs between the turns.

Owns: the thread, the order of turns. Must not know: engines, requests, events. Any thread may call.

Why one: each thread that computes gets an OpenMP team of its own, and libgomp lets its threads sleep instead of spin
once they outnumber the processors. A second team, even an idle one, made every step 4 to 7 times slower.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

__all__ = ["POLL_SECONDS", "ComputeThread", "Member", "compute_thread"]

Result = TypeVar("Result")

# A wait without an end cannot be interrupted by Ctrl-C everywhere; one this long costs nothing and can.
POLL_SECONDS = 0.1


class Member(Protocol):
    """Something that wants turns on the thread."""

    @property
    def has_turn(self) -> bool:
        """Whether a turn would do anything. Called with `wake` held; must not block."""

    def take_turn(self) -> None:
        """Compute for one turn. Must not raise."""


class ComputeThread:
    """A daemon thread that lives while it has members or jobs, and its team with it.

    A fork leaves it behind: the child starts with no members and no thread.
    """

    def __init__(self) -> None:
        self._forget_all()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_all)

    def _forget_all(self) -> None:
        self.wake = threading.Condition()  # notify when a member's `has_turn` may have become true
        self._members: list[Member] = []
        self._jobs: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def is_current(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def join(self, member: Member) -> None:
        """Give `member` turns from now on, each after one of every other member's."""
        with self.wake:
            self._members.append(member)
            self._rouse()

    def leave(self, member: Member) -> None:
        """Give `member` no more turns; one in progress goes on."""
        with self.wake:
            self._members.remove(member)
            self._rouse()

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Run a job between two turns; its result or error comes as a future."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self.wake:
            self._jobs.append(run)
            self._rouse()
        return future

    def run(self, job: Callable[[], Result]) -> Result:
        """Run a job between two turns and wait for its result; its error is raised here."""
        if self.is_current:
            return job()
        future = self.submit(job)
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)
            except TimeoutError:
                if future.done():
                    return future.result()  # the error may be the job's own

    def _rouse(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="dspark-compute", daemon=True)
            self._thread.start()
        self.wake.notify_all()

    def _run(self) -> None:
        while True:
            with self.wake:
                while not self._jobs and not any(member.has_turn for member in self._members):
                    if not self._members:
                        self._thread = None
                        return
                    self.wake.wait()
                job = self._jobs.popleft() if self._jobs else None
                members = [member for member in self._members if member.has_turn]
            if job is not None:
                job()
            for member in members:
                member.take_turn()
            del job, members  # a closed engine must not live on until the next turn


compute_thread = ComputeThread()
