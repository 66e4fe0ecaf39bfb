"""One request at the engine: submitted, read piece by piece, cancelled when nobody waits for it. Event loop only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from dspark_cpp import _core
from dspark_cpp.errors import DSparkError
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.prompts import Job
from dspark_cpp.server.replies import ReplyReader
from dspark_cpp.server.requests import Piece

__all__ = ["Generation"]


class Generation:
    """Runs a job and counts what it did.

    Parameters
    ----------
    model
        A model that the caller holds.
    job
        What to generate.

    Attributes
    ----------
    n_generated, token_ids
        Tokens so far.
    first_ns, last_ns
        When the first token and the end came, by `time.perf_counter_ns`.
    last
        The last piece, when it has come.
    """

    def __init__(self, model: LoadedModel, job: Job) -> None:
        self.model = model
        self.job = job
        self.n_generated = 0
        self.token_ids: list[int] = []
        self.started_ns = time.perf_counter_ns()
        self.first_ns = self.last_ns = self.started_ns
        self.last: Piece | None = None

    @property
    def prompt_ns(self) -> int:
        """Nanoseconds until the first token."""
        return max(self.first_ns - self.started_ns, 1)

    @property
    def decode_ns(self) -> int:
        """Nanoseconds from the first token to the end."""
        return max(self.last_ns - self.first_ns, 1)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Submit the job and yield what each step adds; leaving the iterator early cancels the request.

        Raises
        ------
        QueueFullError, ContextFullError, EngineClosedError, DecodeError
            As the engine finds.
        """
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[_core.Event | DSparkError] = asyncio.Queue()

        def deliver(event: _core.Event | DSparkError) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, event)

        llm = self.model.llm
        reader = ReplyReader(llm.model, self.job)
        n_held = len(self.job.prompt)
        request_id = llm.submit(self.job.prompt, self.job.params, deliver, grammar=self.job.grammar)
        self.model.n_tokens += n_held
        try:
            while self.last is None:
                piece = reader.feed(_checked(await inbox.get()))
                n_new = len(piece.token_ids)
                self._count(piece)
                n_held += n_new
                self.model.n_tokens += n_new
                if reader.is_stopped and not piece.is_last:
                    llm.cancel(request_id)
                yield piece
        finally:
            self.model.n_tokens -= n_held
            if self.last is None:
                llm.cancel(request_id)

    def _count(self, piece: Piece) -> None:
        now = time.perf_counter_ns()
        if self.n_generated == 0:
            self.first_ns = now
        self.last_ns = now
        self.n_generated += len(piece.token_ids)
        self.token_ids += piece.token_ids
        if piece.is_last:
            self.last = piece


def _checked(event: _core.Event | DSparkError) -> _core.Event:
    if isinstance(event, DSparkError):
        raise type(event)(str(event)) from event
    return event
