"""`/v1/chat/completions` and `/v1/completions`: runs a call's choices and lays them out, streamed or whole."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from dspark_cpp.chat import TokenLogprob
from dspark_cpp.server import openai_api
from dspark_cpp.server.catalog import Entry
from dspark_cpp.server.context import ServerContext, token_bytes
from dspark_cpp.server.generation import Generation
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.openai_api import Call
from dspark_cpp.server.prompts import Job, prepare
from dspark_cpp.server.requests import GenerationRequest, Piece, ToolCall

__all__ = ["Answer"]


class Answer:
    """Runs one call.

    Parameters
    ----------
    context, request
        The server's parts; the exchange.
    call
        What is asked for.
    entry
        The model's recipe: its system message and opening go before the conversation.
    is_chat
        Which of the two endpoints.
    """

    def __init__(self, context: ServerContext, request: Request, call: Call, entry: Entry, *, is_chat: bool) -> None:
        self._context = context
        self._request = request
        self._call = call
        self._entry = entry
        self._is_chat = is_chat
        kind = "chat.completion" if is_chat else "text_completion"
        self._kind = f"{kind}.chunk" if is_chat and call.stream else kind
        self._id = openai_api.new_id("chatcmpl" if is_chat else "cmpl")
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}

    async def chunks(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield the stream's chunks in order: of every choice the role, its deltas, its end; then the usage."""
        async with self._context.pool.use(self._call.model) as model:
            generations = await self._start(model)
            async with aclosing(self._merged(generations)) as pieces:
                async for index, piece in pieces:
                    for chunk in self._choice_chunks(model, index, piece, generations[index]):
                        yield chunk
            if self._call.include_usage:
                yield self._head() | {"choices": [], "usage": self._usage(generations)}

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one object."""
        async with self._context.pool.use(self._call.model) as model:
            generations = await self._start(model)
            found: dict[int, list[Piece]] = {index: [] for index in range(len(generations))}
            async with aclosing(self._merged(generations)) as pieces:
                async for index, piece in pieces:
                    found[index].append(piece)
            choices = [self._choice(model, index, found[index]) for index in found]
            figures = self._timings(generations[0])
            return self._head() | {"choices": choices, "usage": self._usage(generations), "timings": figures}

    # ---- running ----

    async def _start(self, model: LoadedModel) -> list[Generation]:
        jobs = [await prepare(model, self._with_recipe(one)) for one in self._call.requests]
        return [Generation(model, _with_own_seed(job, choice)) for job in jobs for choice in range(self._call.n)]

    def _with_recipe(self, request: GenerationRequest) -> GenerationRequest:
        if request.chat is None:
            return request
        messages = [*self._entry.messages, *request.chat.messages]
        if self._entry.system and not any(message["role"] in ("system", "developer") for message in messages):
            messages.insert(0, {"role": "system", "content": self._entry.system})
        return replace(request, chat=replace(request.chat, messages=messages))

    async def _merged(self, generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
        """Pieces of all choices as they come."""
        inbox: asyncio.Queue[tuple[int, Piece] | Exception] = asyncio.Queue()

        async def read(index: int, generation: Generation) -> None:
            try:
                async with aclosing(generation.pieces()) as pieces:
                    async for piece in pieces:
                        inbox.put_nowait((index, piece))
            except Exception as error:
                inbox.put_nowait(error)

        tasks = [asyncio.ensure_future(read(*pair)) for pair in enumerate(generations)]
        n_open = len(tasks)
        try:
            while n_open:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item[1].is_last:
                    n_open -= 1
                    self._context.finish(self._request, generations[item[0]])
                yield item
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    # ---- layout ----

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self._kind,
            "created": self._created,
            "model": self._call.model,
            "system_fingerprint": "fp_dspark",
        }

    def _choice_chunks(
        self, model: LoadedModel, index: int, piece: Piece, generation: Generation
    ) -> list[dict[str, Any]]:
        chunks = []
        is_first = index not in self._offsets
        if is_first and self._is_chat:
            chunks.append(self._chunk(index, {"delta": {"role": "assistant", "content": ""}}))
        part = self._part(model, index, piece, is_first)
        if part is not None:
            chunks.append(self._chunk(index, part))
        if piece.is_last:
            end: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
            last = self._chunk(index, end, openai_api.finish_reason(piece.finish_reason))
            chunks.append(last | {"timings": self._timings(generation)})
        if self._call.include_usage:
            chunks = [chunk | {"usage": None} for chunk in chunks]
        return chunks

    def _chunk(self, index: int, part: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, **part}
        choice.setdefault("logprobs", None)
        return self._head() | {"choices": [choice | {"finish_reason": reason}]}

    def _part(self, model: LoadedModel, index: int, piece: Piece, is_first: bool) -> dict[str, Any] | None:
        """Return what one piece adds, None if nothing can be seen of it."""
        if self._is_chat:
            delta = openai_api.delta(piece)
            part: dict[str, Any] = {"delta": delta}
            is_empty = not delta
        else:
            text = (self._call.echo if is_first else "") + piece.content
            part, is_empty = {"text": text}, not text
        logprobs = self._logprobs(model, index, piece.logprobs)
        self._offsets[index] = self._offsets.get(index, len(self._call.echo)) + len(piece.content)
        return None if is_empty and logprobs is None else part | {"logprobs": logprobs}

    def _logprobs(self, model: LoadedModel, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._call.logprobs is None or not entries:
            return None
        texts = token_bytes(model, entries)
        if self._is_chat:
            return openai_api.chat_logprobs(entries, texts, self._call.logprobs)
        offset = self._offsets.get(index, len(self._call.echo))
        return openai_api.completion_logprobs(entries, texts, self._call.logprobs, offset)

    def _choice(self, model: LoadedModel, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = "".join(piece.content for piece in pieces)
        logprobs = self._logprobs(model, index, [entry for piece in pieces for entry in piece.logprobs])
        reason = openai_api.finish_reason(pieces[-1].finish_reason)
        if not self._is_chat:
            text = self._call.echo + content
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        message = _message(content, pieces)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        n_prompt = sum(len(one.job.prompt) for one in generations[:: self._call.n])
        stats = [one.last.stats for one in generations if one.last is not None]
        return openai_api.usage(n_prompt, sum(one.n_generated for one in generations), stats)

    @staticmethod
    def _timings(generation: Generation) -> dict[str, Any]:
        assert generation.last is not None
        return openai_api.timings(
            generation.last.stats, generation.n_generated, generation.prompt_ns, generation.decode_ns
        )


def _message(content: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if thinking := "".join(piece.thinking for piece in pieces):
        message["reasoning_content"] = thinking
    if calls := _whole_calls([call for piece in pieces for call in piece.tool_calls]):
        message["tool_calls"] = calls
        message["content"] = content or None
    return message


def _whole_calls(parts: Sequence[ToolCall]) -> list[dict[str, Any]]:
    whole: dict[int, dict[str, Any]] = {}
    for part in parts:
        call = whole.setdefault(
            part.index, {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}}
        )
        call["function"]["arguments"] += part.arguments
    return [call for _, call in sorted(whole.items())]


def _with_own_seed(job: Job, choice: int) -> Job:
    """Choices of one prompt must differ: each takes the next seed."""
    if choice == 0 or job.params.seed is None:
        return job
    return replace(job, params=replace(job.params, seed=(job.params.seed + choice) % 2**64))
