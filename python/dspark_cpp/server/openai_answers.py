"""`/v1/chat/completions` and `/v1/completions`: runs a call's choices and lays them out, streamed or whole."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from dspark_cpp.results import TokenLogprob
from dspark_cpp.server import openai_objects
from dspark_cpp.server.catalog import Entry
from dspark_cpp.server.context import ServerContext, token_bytes
from dspark_cpp.server.generation import Generation
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.openai_api import Call
from dspark_cpp.server.prompts import Job, checked_tokens, prepare
from dspark_cpp.server.requests import GenerationRequest, Piece

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
        self._id = openai_objects.new_id("chatcmpl" if is_chat else "cmpl")
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}
        self._echoes: list[str] = []  # what each prompt's answers begin with

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
            shown = [one for group in self._groups(found) for one in self._likeliest(group)]
            choices = [self._choice(model, index, pieces) for index, pieces in enumerate(shown)]
            figures = self._timings(generations[0])
            return self._head() | {"choices": choices, "usage": self._usage(generations), "timings": figures}

    # ---- running ----

    async def _start(self, model: LoadedModel) -> list[Generation]:
        self._echoes = [_text_of(model, one) if self._call.echo else "" for one in self._call.requests]
        jobs = [await prepare(model, self._with_recipe(one)) for one in self._call.requests]
        if self._call.best_of > self._call.n:
            jobs = [_with_logprobs(job) for job in jobs]
        return [Generation(model, _with_own_seed(job, choice)) for job in jobs for choice in range(self._call.best_of)]

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

    def _groups(self, found: Mapping[int, Sequence[Piece]]) -> list[list[Sequence[Piece]]]:
        """Answers by prompt."""
        n = self._call.best_of
        return [[found[i] for i in range(begin, begin + n)] for begin in range(0, len(found), n)]

    def _likeliest(self, answers: Sequence[Sequence[Piece]]) -> Sequence[Sequence[Piece]]:
        """Return the `n` answers with the largest log-probability per token."""
        return answers if len(answers) == self._call.n else sorted(answers, key=_likelihood)[-self._call.n :][::-1]

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
            last = self._chunk(index, end, openai_objects.finish_reason(piece.finish_reason))
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
            delta = openai_objects.delta(piece)
            part: dict[str, Any] = {"delta": delta}
            is_empty = not delta
        else:
            text = (self._echo(index) if is_first else "") + piece.content
            part, is_empty = {"text": text}, not text
        logprobs = self._logprobs(model, index, piece.logprobs)
        self._offsets[index] = self._offsets.get(index, 0) + len(piece.content)
        return None if is_empty and logprobs is None else part | {"logprobs": logprobs}

    def _logprobs(self, model: LoadedModel, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._call.logprobs is None or not entries:
            return None
        texts = token_bytes(model, entries)
        if self._is_chat:
            return openai_objects.chat_logprobs(entries, texts, self._call.logprobs)
        return openai_objects.completion_logprobs(entries, texts, self._call.logprobs, self._offsets.get(index, 0))

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._call.n]

    def _choice(self, model: LoadedModel, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        logprobs = self._logprobs(model, index, [entry for piece in pieces for entry in piece.logprobs])
        reason = openai_objects.finish_reason(pieces[-1].finish_reason)
        if not self._is_chat:
            text = self._echo(index) + "".join(piece.content for piece in pieces)
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        message = openai_objects.whole_message(pieces)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self, generations: Sequence[Generation]) -> dict[str, Any]:
        stats = [one.last.stats for one in generations if one.last is not None]
        first = generations[:: self._call.best_of]  # the others find their prompt in the cache
        n_prompt = sum(len(one.job.prompt) for one in first)
        n_cached = sum(one.last.stats.n_reused for one in first if one.last is not None)
        return openai_objects.usage(n_prompt, n_cached, sum(one.n_generated for one in generations), stats)

    @staticmethod
    def _timings(generation: Generation) -> dict[str, Any]:
        assert generation.last is not None
        return openai_objects.timings(
            generation.last.stats, generation.n_generated, generation.prompt_ns, generation.decode_ns
        )


def _with_own_seed(job: Job, choice: int) -> Job:
    """Choices of one prompt must differ: each takes the next seed."""
    if choice == 0 or job.params.seed is None:
        return job
    return replace(job, params=replace(job.params, seed=(job.params.seed + choice) % 2**64))


def _with_logprobs(job: Job) -> Job:
    return job if job.params.logprobs is not None else replace(job, params=replace(job.params, logprobs=0))


def _likelihood(pieces: Sequence[Piece]) -> float:
    """Log-probability per token; an answer without tokens is the least likely."""
    entries = [entry.logprob for piece in pieces for entry in piece.logprobs]
    return sum(entries) / len(entries) if entries else -math.inf


def _text_of(model: LoadedModel, request: GenerationRequest) -> str:
    """Return the prompt of a completion as text."""
    if request.tokens is None:
        return request.text or ""
    tokens = checked_tokens(model, request.tokens)
    return b"".join(model.llm.model.token_to_piece(token, True) for token in tokens).decode("utf-8", "replace")
