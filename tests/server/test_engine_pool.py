"""The line of those whose model is not loaded: nobody is kept out for ever, one load serves all who wait for it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from dspark_cpp import LLM
from dspark_cpp.server.allocator import return_free_memory
from dspark_cpp.server.engine_pool import EnginePool
from dspark_cpp.server.problems import Problem
from dspark_cpp.server.settings import ServerConfig
from waiting import LIMIT_S


class Pool(EnginePool):
    """A pool whose models are names: what is loaded when can be watched."""

    def __init__(self, size: int = 10, **options) -> None:
        catalog = SimpleNamespace(get=lambda name: SimpleNamespace(name=name, digest=name, size=size, parameters={}))
        super().__init__(catalog, ServerConfig(max_memory=15, **options))
        self.loaded: list[str] = []

    async def _load(self, entry, n_ctx):
        await asyncio.sleep(0.01)
        self.loaded.append(entry.name)
        model = SimpleNamespace(n_ctx_train=4096)
        llm = SimpleNamespace(closed=False, n_ctx=min(max(n_ctx, 512), 4096), model=model)
        self._models[entry.name] = SimpleNamespace(
            entry=entry, llm=llm, n_users=0, last_used=0.0, memory_bytes=10, keep_alive=1e9, close=self.closed
        )

    async def closed(self):
        await asyncio.sleep(0)


async def visit(pool, name, seconds, order, n_ctx=0):
    async with pool.use(name, n_ctx=n_ctx):
        order.append(name)
        await asyncio.sleep(seconds)


async def stay(pool, name, order, until):
    async with pool.use(name):
        order.append(name)
        await until.wait()


async def happens(holds):
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0)


def test_a_busy_model_does_not_keep_others_out():
    async def work():
        pool, order, tasks = Pool(), [], []
        for _ in range(20):  # never a moment without a user of `a`
            tasks.append(asyncio.ensure_future(visit(pool, "a", 0.05, order)))
            if len(tasks) == 5:
                other = asyncio.ensure_future(visit(pool, "b", 0.01, order))
            await asyncio.sleep(0.02)
        await asyncio.wait_for(other, LIMIT_S)
        assert order.index("b") < 10
        await asyncio.gather(*tasks)
        assert pool.loaded == ["a", "b", "a"]
        assert pool.n_waiting == 0

    asyncio.run(work())


def test_room_is_made_for_what_a_model_took_before():
    """Files of 1 byte, 10 bytes when loaded: two of them fit into 15 until that is known."""

    async def work():
        pool, order = Pool(size=1), []
        leave = asyncio.Event()
        both = [asyncio.ensure_future(stay(pool, name, order, leave)) for name in "ab"]
        await happens(lambda: len(order) == 2)
        assert len(pool.models) == 2
        leave.set()
        await asyncio.gather(*both)
        for name in "ab":
            pool._models.pop(name)
        await asyncio.gather(visit(pool, "a", 0.1, order), visit(pool, "b", 0.1, order))
        assert [model.entry.name for model in pool.models] == ["b"]  # it waited until `a` could go
        assert pool.loaded == ["a", "b", "a", "b"]

    asyncio.run(work())


def test_one_load_serves_all_who_wait_for_it():
    async def work():
        pool, order = Pool(), []
        await asyncio.gather(*(visit(pool, "ab"[i % 2], 0.02, order) for i in range(20)))
        assert sorted(order) == ["a"] * 10 + ["b"] * 10
        assert pool.loaded == ["a", "b"]

    asyncio.run(work())


def test_a_longer_context_waits_until_the_model_is_free():
    async def work():
        pool, order = Pool(), []
        leave = asyncio.Event()
        first = asyncio.ensure_future(stay(pool, "a", order, leave))
        await happens(lambda: order)
        longer = asyncio.ensure_future(visit(pool, "a", 0, order, n_ctx=2048))
        await happens(lambda: pool.n_waiting == 1)
        await asyncio.sleep(0.05)
        assert order == ["a"]
        leave.set()
        await asyncio.wait_for(longer, LIMIT_S)
        assert first.done()
        assert pool.loaded == ["a", "a"]
        for n_ctx in (10**6, 4096, 10**6):  # more than it was trained for is no reason to load it again
            await visit(pool, "a", 0, order, n_ctx=n_ctx)
        assert pool.loaded == ["a", "a", "a"]

    asyncio.run(work())


def test_the_line_is_bounded_and_leaving_it_frees_the_place():
    async def work():
        pool, order = Pool(max_queue=2), []
        leave = asyncio.Event()
        holder = asyncio.ensure_future(stay(pool, "a", order, leave))
        await happens(lambda: order)
        waiting = [asyncio.ensure_future(visit(pool, "b", 0, order)) for _ in range(2)]
        await happens(lambda: pool.n_waiting == 2)
        with pytest.raises(Problem, match="maximum pending requests"):
            await visit(pool, "b", 0, order)
        waiting[0].cancel()
        await happens(lambda: pool.n_waiting == 1)
        waiting.append(asyncio.ensure_future(visit(pool, "b", 0, order)))
        await happens(lambda: pool.n_waiting == 2)
        leave.set()
        await asyncio.gather(holder, *waiting[1:])
        assert pool.loaded == ["a", "b"]

    asyncio.run(work())


def test_a_model_that_is_taken_while_another_is_unloaded_stays():
    async def work():
        pool, order, tasks = Pool(size=1), [], []
        leave = asyncio.Event()
        both = [asyncio.ensure_future(stay(pool, name, order, leave)) for name in "ab"]
        await happens(lambda: len(order) == 2)
        leave.set()
        await asyncio.gather(*both)

        async def close():
            leave.clear()
            tasks.append(asyncio.ensure_future(stay(pool, "b", order, leave)))
            await happens(lambda: len(order) == 3)

        pool._models["a"].close = close
        for model in pool.models:
            model.expires_in = 0.0
        async with pool._changed:
            await pool._unload_expired()
        assert [model.entry.name for model in pool.models] == ["b"]
        leave.set()
        await asyncio.gather(*tasks)

    asyncio.run(work())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_returns_when_models_go(demo_target, demo_drafter):
    def anonymous_mib():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    sizes = []
    for _ in range(6):
        with LLM(demo_target, demo_drafter, n_parallel=8, n_threads=1, costs="none"):
            pass
        return_free_memory()
        sizes.append(anonymous_mib())
    assert sizes[-1] < sizes[1] + 10  # without it: 80 MiB more after some of the loads
