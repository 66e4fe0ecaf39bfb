"""The loaded models: loaded when asked for, kept for a while, unloaded for others but never while in use.

Owns: which models are in memory, and the line of requests whose model is not. One model is loaded or unloaded at a
time. Event loop only; the loading itself runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from dataclasses import asdict, dataclass

from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.llm import LLM
from dspark_cpp.server.allocator import return_free_memory
from dspark_cpp.server.catalog import Catalog, Entry
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.problems import Problem
from dspark_cpp.server.settings import ServerConfig

__all__ = ["EnginePool"]

_log = logging.getLogger(__name__)
_MEMORY_SHARE = 0.9
_OVERHEAD = 1.1  # files to memory, before the caches are known
_USUAL_CTX = 4096  # what n_ctx = 0 stands for, as far as the model was trained for it


@dataclass(eq=False, slots=True)
class _Ticket:
    """A request in the line; `may_join`: its model was loaded for one before it."""

    entry: Entry
    n_ctx: int
    may_join: bool = False


class EnginePool:
    """Loads models and hands them out.

    Parameters
    ----------
    catalog
        Which models there are.
    config
        Engine options, memory limit, keep_alive, queue.
    """

    def __init__(self, catalog: Catalog, config: ServerConfig) -> None:
        self._catalog = catalog
        self._config = config
        self._limit = config.max_memory or int(_MEMORY_SHARE * _installed_bytes())
        self._models: dict[str, LoadedModel] = {}
        self._known_bytes: dict[str, int] = {}  # what models took when they were loaded, by digest
        self._changed = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()
        self._line: deque[_Ticket] = deque()  # who waits, in the order of coming
        self._is_blocked = False  # its head waits until models in use are free
        self._is_closed = False

    @property
    def models(self) -> list[LoadedModel]:
        """What is loaded, in the order of loading."""
        return list(self._models.values())

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a model."""
        return len(self._line)

    @contextlib.asynccontextmanager
    async def use(self, name: str, keep_alive: float | None = None, n_ctx: int = 0) -> AsyncIterator[LoadedModel]:
        """Hold a loaded model for the time of the block.

        Parameters
        ----------
        name
            Its name.
        keep_alive
            Seconds it stays after its last use; None: as configured.
        n_ctx
            Tokens that one request needs. A model that was loaded with fewer, and was trained for more, is loaded again
            as soon as nobody uses it.

        Raises
        ------
        Problem
            404 without such a model, 503 when too many wait already.
        """
        entry = self._catalog.get(name)
        model = None if self._is_blocked else self._usable(entry, n_ctx)
        if model is None:
            model = await self._wait_for(entry, n_ctx)
        model.n_users += 1
        if keep_alive is not None:
            model.keep_alive = keep_alive
        try:
            yield model
        finally:
            model.n_users -= 1
            model.last_used = time.monotonic()
            if model.n_users == 0:
                self._announce()

    async def unload(self, name: str) -> None:
        """Unload a model as soon as nobody uses it; nothing happens if it is not loaded."""
        entry = self._catalog.get(name)
        model = self._models.get(entry.name)
        if model is not None:
            model.keep_alive = 0.0
            self._announce()

    async def run(self) -> None:
        """Unload what was not used for its time; runs until cancelled."""
        while True:
            async with self._changed:
                await self._unload_expired()
                wait = min((model.expires_in for model in self._idle()), default=math.inf)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), None if math.isinf(wait) else max(wait, 0.01))

    async def close(self) -> None:
        """Unload everything, also what is in use: requests end with EngineClosedError."""
        self._is_closed = True
        for model in self.models:
            await self._drop(model)

    def _usable(self, entry: Entry, n_ctx: int) -> LoadedModel | None:
        model = self._models.get(entry.name)
        if model is None or model.entry.digest != entry.digest or model.llm.closed:
            return None
        return model if model.llm.n_ctx >= min(n_ctx, model.llm.model.n_ctx_train) else None

    def _idle(self) -> list[LoadedModel]:
        return [model for model in self._models.values() if model.n_users == 0]

    def _announce(self) -> None:
        """Wake who waits; in a task of its own, because a model that is being loaded holds the lock for a while."""
        task = asyncio.ensure_future(self._notify())
        self._notices.add(task)
        task.add_done_callback(self._notices.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _wait_for(self, entry: Entry, n_ctx: int) -> LoadedModel:
        """Wait in line. Whoever comes while its head is blocked stands behind it, even if their model is loaded.

        Otherwise a model that is always in use would keep all others out. Once a model is loaded for the head, all in
        the line that want it come along: they are finite, and a load serves more than one.
        """
        if len(self._line) >= self._config.max_queue:
            raise Problem(503, "server busy, please try again.  maximum pending requests exceeded", code="server_busy")
        ticket = _Ticket(entry, n_ctx)
        self._line.append(ticket)
        try:
            async with self._changed:
                while True:
                    if self._is_closed:
                        raise Problem(503, "the server is shutting down", code="server_busy")
                    if ticket.may_join and (model := self._usable(entry, n_ctx)) is not None:
                        return model
                    if self._line[0] is ticket and (model := await self._obtain(entry, n_ctx)) is not None:
                        return model
                    await self._changed.wait()
        finally:
            if self._line[0] is ticket:
                self._is_blocked = False
            self._line.remove(ticket)
            self._announce()

    async def _obtain(self, entry: Entry, n_ctx: int) -> LoadedModel | None:
        """Load a model if need be; None: those in use leave no room for now. For the head of the line."""
        model = self._usable(entry, n_ctx)
        if model is None:
            self._is_blocked = not await self._make_room(entry)
            if not self._is_blocked:
                await _uninterrupted(self._load(entry, n_ctx))
                model = self._models[entry.name]
                self._known_bytes[entry.digest] = model.memory_bytes
                for ticket in self._line:
                    ticket.may_join = ticket.entry.name == entry.name
        return model

    async def _make_room(self, entry: Entry) -> bool:
        """Unload idle models until this one fits; False: those in use leave no room for now."""
        old = self._models.get(entry.name)  # the same name with other files, or with a shorter context
        if old is not None:
            if old.n_users:
                return False
            await self._drop(old)
        least = int(_OVERHEAD * entry.size)
        if least > self._limit:
            raise Problem(500, f"model requires more memory ({least} bytes) than it may take ({self._limit} bytes)")
        needed = self._known_bytes.get(entry.digest, least)
        for model in sorted(self._idle(), key=lambda model: model.last_used):
            if self._used_bytes() + needed <= self._limit:
                break
            await self._drop_if_idle(model)
        return not self._models or self._used_bytes() + needed <= self._limit

    async def _shrink(self, newest: LoadedModel) -> None:
        """Unload idle models while all take too much: what caches take is known only after the first loading."""
        for model in sorted(self._idle(), key=lambda model: model.last_used):
            if model is not newest and self._used_bytes() > self._limit:
                await self._drop_if_idle(model)

    def _used_bytes(self) -> int:
        return sum(model.memory_bytes for model in self._models.values())

    async def _load(self, entry: Entry, n_ctx: int) -> None:
        begin = time.monotonic()
        try:
            llm = await asyncio.to_thread(self._open, entry, n_ctx)
        except Exception as error:
            _log.warning("cannot load model %s: %s", entry.name, error)
            self._catalog.get(entry.name)  # 404 where it was deleted meanwhile
            raise
        engine = self._config.engine
        model = LoadedModel(entry, llm, self._config.keep_alive, engine.n_parallel, engine.n_gpu_layers)
        await model.warm_up()
        model.load_seconds = time.monotonic() - begin
        self._models[entry.name] = model
        await self._shrink(model)
        _log.info("loaded model %s in %.2f s, %d bytes", entry.name, model.load_seconds, model.memory_bytes)

    def _open(self, entry: Entry, n_ctx: int) -> LLM:
        self._catalog.check(entry)
        options = asdict(self._config.engine) | {"max_queue": self._config.max_queue}
        options["n_ctx"] = options["n_ctx"] or int(entry.parameters.get("num_ctx", 0))
        if n_ctx:
            n_trained = _trained_length(entry)
            options["n_ctx"] = max(options["n_ctx"] or min(_USUAL_CTX, n_trained), min(n_ctx, n_trained))
        return LLM(entry.target, entry.draft, **options)

    async def _unload_expired(self) -> None:
        for model in self._idle():
            if model.expires_in <= 0:
                await self._drop_if_idle(model)
                self._changed.notify_all()

    async def _drop_if_idle(self, model: LoadedModel) -> None:
        """Unload a model unless it was taken since the caller looked: unloading another one takes time."""
        if model.n_users == 0:
            await self._drop(model)

    async def _drop(self, model: LoadedModel) -> None:
        self._models.pop(model.entry.name, None)
        await model.close()
        await asyncio.to_thread(return_free_memory)
        _log.info("unloaded model %s", model.entry.name)


async def _uninterrupted(work: Awaitable[None]) -> None:
    """Finish work that a client who leaves must not cut in half, then let it be cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await task
        raise


def _trained_length(entry: Entry) -> int:
    file = GGUFFile(entry.target)
    length = file.get(f"{file.get('general.architecture')}.context_length")
    return length if isinstance(length, int) else _USUAL_CTX


def _installed_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
