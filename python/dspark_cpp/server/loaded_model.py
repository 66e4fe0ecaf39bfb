"""One model in memory: its engine, its templates, its embedder, and how long it stays. Event loop only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from typing import Any

from dspark_cpp import _core
from dspark_cpp.compute_thread import compute_thread
from dspark_cpp.config import SamplingParams
from dspark_cpp.llm import LLM
from dspark_cpp.server.catalog import Entry
from dspark_cpp.server.chat_template import TOOLS_TEMPLATE, can_borrow_tools
from dspark_cpp.server.template_sandbox import TemplateSandbox

__all__ = ["LoadedModel"]

_FAR = datetime(9999, 1, 1, tzinfo=UTC)
_PLAIN_TOKENS = 24
_PLAIN_SECONDS = 1.0


class LoadedModel:
    """A model that can answer.

    Attributes
    ----------
    n_users
        Requests that hold it.
    n_tokens
        Tokens of the requests that hold it: how full the cache is.
    plain_tokens_per_second
        Measured speed without drafts, of one request alone; None while unknown.
    """

    def __init__(self, entry: Entry, llm: LLM, keep_alive: float, n_parallel: int = 1, n_gpu_layers: int = -1) -> None:
        self.entry = entry
        self.llm = llm
        self.keep_alive = keep_alive
        self.n_parallel = n_parallel
        self._n_gpu_layers = n_gpu_layers
        self.n_users = 0
        self.n_tokens = 0
        self.last_used = time.monotonic()
        self.load_seconds = 0.0
        self.plain_tokens_per_second: float | None = None
        self.supports_tools = False
        self.supports_thinking = False
        self.sandbox = TemplateSandbox()
        self._embedder: _core.Embedder | None = None
        self._embedder_lock = asyncio.Lock()
        metadata = llm.model.metadata
        self._template = entry.template or llm.model.chat_template or ""
        self._tools_template = metadata.get("tokenizer.chat_template.tool_use") or self._template
        self._special = {
            name: llm.model.token_to_piece(token, True).decode("utf-8", "replace") if token >= 0 else ""
            for name, token in (("bos_token", llm.model.bos_token), ("eos_token", llm.model.eos_token))
        }

    @property
    def expires_in(self) -> float:
        """Seconds until it is unloaded, if nobody uses it before."""
        return self.last_used + self.keep_alive - time.monotonic()

    @property
    def expires_at(self) -> datetime:
        """The same as a time."""
        seconds = self.keep_alive if self.n_users else self.expires_in
        return _FAR if math.isinf(seconds) else datetime.now(UTC) + timedelta(seconds=seconds)

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights and caches."""
        return sum(self.llm.engine.memory_bytes.values())

    @property
    def gpu_bytes(self) -> int:
        """Of these, bytes on GPUs: layers that were sent there take their share."""
        n_layers = self.llm.model.n_layer + 1  # the output counts as one
        n_sent = n_layers if self._n_gpu_layers < 0 else min(self._n_gpu_layers, n_layers)
        return self.memory_bytes * n_sent // n_layers if _has_gpu() else 0

    @property
    def cache_share(self) -> float:
        """Share of the cache's places that requests fill."""
        return min(self.n_tokens / (self.llm.n_ctx * self.n_parallel), 1.0)

    @property
    def has_template(self) -> bool:
        """Whether it can chat."""
        return bool(self._template)

    async def warm_up(self) -> None:
        """Find out what the template knows and how fast plain decoding is."""
        if self.has_template:
            try:
                plan = await self.plan_chat({"messages": [{"role": "user", "content": "Hi"}]})
                self.supports_tools = bool(plan["supports_tools"])
                self.supports_thinking = bool(plan["supports_thinking"])
            except ValueError:
                self._template = ""  # nobody can use it
            except Exception:
                pass
        self.plain_tokens_per_second = await asyncio.to_thread(self._measure_plain)

    async def plan_chat(self, request: dict[str, Any]) -> dict[str, Any]:
        """Render a conversation; see `_core.plan_chat`."""
        template = self._template
        if request.get("tools"):
            template = self._tools_template
            if not self.supports_tools and can_borrow_tools(template):
                template = TOOLS_TEMPLATE
        return await self.sandbox.plan_chat({"template": template, **self._special, **request})

    @property
    def can_call_tools(self) -> bool:
        """Whether conversations with tools can be rendered."""
        return self.supports_tools or can_borrow_tools(self._tools_template)

    async def embed(self, tokens: Sequence[int]) -> list[float]:
        """Return the pooled state of a text (n_embd,), not normalised."""
        async with self._embedder_lock:
            if self._embedder is None:
                self._embedder = await asyncio.to_thread(_core.Embedder, self.llm.model)
            embed = partial(self._embedder.embed, tokens)
            return await asyncio.wrap_future(compute_thread.submit(embed))

    @property
    def n_ctx_embedding(self) -> int:
        """Most tokens of a text to embed."""
        return min(8192, self.llm.model.n_ctx_train)

    async def close(self) -> None:
        """Free everything; running requests end with EngineClosedError."""
        await self.sandbox.close()
        await asyncio.to_thread(self.llm.close)
        self._embedder = None

    def _measure_plain(self) -> float | None:
        """Tokens per second of a short request without drafts."""
        params = SamplingParams(max_tokens=_PLAIN_TOKENS, temperature=0, draft="off", ignore_eos=True)
        n_tokens, begin = 0, time.perf_counter()
        for chunk in self.llm.stream([max(self.llm.model.bos_token, 0)] * 2, params):
            if n_tokens == 0:
                begin = time.perf_counter()  # the first token comes out of the prefill
            n_tokens += len(chunk.token_ids)
            if time.perf_counter() - begin > _PLAIN_SECONDS:
                break
        seconds = time.perf_counter() - begin
        return (n_tokens - 1) / seconds if n_tokens > 1 and seconds > 0 else None


@cache
def _has_gpu() -> bool:
    return any(device.kind in ("gpu", "igpu") for device in _core.build_info().devices)
