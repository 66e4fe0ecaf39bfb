"""`/api/chat` and `/api/generate`: runs a call and lays its answer out, streamed or whole."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dspark_cpp.server import ollama_api
from dspark_cpp.server.context import ServerContext, token_bytes
from dspark_cpp.server.exchange import StreamReply, attended
from dspark_cpp.server.generation import Generation
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.ollama_api import Call, Timing
from dspark_cpp.server.problems import problem_of
from dspark_cpp.server.prompts import prepare
from dspark_cpp.server.requests import Piece, ToolCall

__all__ = ["answer"]

_log = logging.getLogger(__name__)
_MEDIA_TYPE = "application/x-ndjson"


async def answer(context: ServerContext, request: Request, *, is_chat: bool) -> Response:
    """Answer one call.

    Raises
    ------
    Problem
        Anything that goes wrong before the answer begins.
    """
    deadline = context.deadline()
    call = ollama_api.read_call(await context.read(request), context.config.limits, is_chat=is_chat)
    if call.body.text("template"):
        _log.warning("the template of a request has no effect: the model's own one is used")
    if call.only_loads:
        return JSONResponse(await attended(request.receive, deadline, _load(context, call)))
    objects = _Answer(context, request, call).objects()
    if not call.stream:
        return JSONResponse(await attended(request.receive, deadline, _join(objects, call)))
    # The first object decides between an HTTP error and a stream.
    first = await attended(request.receive, deadline, anext(objects))
    last_word = _line({"error": deadline.problem.message})
    return StreamReply(_lines(first, objects), _MEDIA_TYPE, deadline, last_word)


async def _load(context: ServerContext, call: Call) -> dict[str, Any]:
    is_unload = call.keep_alive == 0
    if is_unload:
        await context.pool.unload(call.model)
    else:
        async with context.pool.use(call.model, call.keep_alive, call.n_ctx):
            pass
    found: dict[str, Any] = {"model": call.model, "created_at": ollama_api.timestamp()}
    found |= {"message": {"role": "assistant", "content": ""}} if call.is_chat else {"response": ""}
    return found | {"done": True, "done_reason": "unload" if is_unload else "load"}


async def _lines(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield _line(first)
        try:
            async for one in rest:
                yield _line(one)
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                _log.exception("cannot go on with an answer")
            yield _line({"error": problem.message})


def _line(found: dict[str, Any]) -> bytes:
    return json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


async def _join(objects: AsyncGenerator[dict[str, Any]], call: Call) -> dict[str, Any]:
    """One object with all texts, calls and figures."""
    content, thinking = "", ""
    calls: list[Any] = []
    logprobs: list[Any] = []
    last: dict[str, Any] = {}
    async with aclosing(objects):
        async for last in objects:
            part = last["message"] if call.is_chat else last
            content += part["content" if call.is_chat else "response"]
            thinking += part.get("thinking", "")
            calls += part.get("tool_calls", [])
            logprobs += last.get("logprobs", [])
    part = last["message"] if call.is_chat else last
    part["content" if call.is_chat else "response"] = content
    part |= ({"thinking": thinking} if thinking else {}) | ({"tool_calls": calls} if calls else {})
    return last | ({"logprobs": logprobs} if logprobs else {})


class _Answer:
    """Runs one call and yields its objects."""

    def __init__(self, context: ServerContext, request: Request, call: Call) -> None:
        self._context = context
        self._request = request
        self._call = call
        self._begin_ns = time.perf_counter_ns()
        self._calls: list[ToolCall] = []

    async def objects(self) -> AsyncGenerator[dict[str, Any]]:
        """Yield an object per step with something to tell, then the last one."""
        async with self._context.pool.use(self._call.model, self._call.keep_alive, self._call.n_ctx) as model:
            load_ns = time.perf_counter_ns() - self._begin_ns
            generation = await self._start(model)
            async with aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    self._calls += piece.tool_calls
                    calls = ollama_api.tool_calls(self._calls) if piece.is_last else []
                    if piece.token_ids or piece.content or piece.thinking or calls:
                        yield self._object(model, piece, calls)
            self._context.finish(self._request, generation)
            yield self._last(generation, load_ns)

    async def _start(self, model: LoadedModel) -> Generation:
        entry = model.entry
        wanted, options = ollama_api.generation_of(
            self._call,
            system=entry.system,
            opening=entry.messages,
            parameters=entry.parameters,
            has_template=model.has_template,
        )
        for warning in options.warnings:
            _log.warning("%s", warning)
        return Generation(model, await prepare(model, wanted))

    def _head(self) -> dict[str, Any]:
        return {"model": self._call.model, "created_at": ollama_api.timestamp()}

    def _body(self, piece: Piece, calls: list[dict[str, Any]]) -> dict[str, Any]:
        if self._call.is_chat:
            return {"message": ollama_api.chat_message(piece, calls)}
        return {"response": piece.content} | ({"thinking": piece.thinking} if piece.thinking else {})

    def _object(self, model: LoadedModel, piece: Piece, calls: list[dict[str, Any]]) -> dict[str, Any]:
        found = self._head() | self._body(piece, calls) | {"done": False}
        if self._call.logprobs is not None and piece.logprobs:
            texts = token_bytes(model, piece.logprobs)
            found["logprobs"] = ollama_api.logprob_items(piece.logprobs, texts, self._call.logprobs)
        if self._call.shows_speculation:
            found["dspark"] = {"drafted": list(piece.drafted), "tokens": list(piece.token_texts)}
            found["dspark"] |= piece.speeds.to_dict()
        return found

    def _last(self, generation: Generation, load_ns: int) -> dict[str, Any]:
        assert generation.last is not None
        assert generation.last.finish_reason is not None
        timing = Timing(
            time.perf_counter_ns() - self._begin_ns, max(load_ns, 1), generation.prompt_ns, generation.decode_ns
        )
        n_prompt = len(generation.job.prompt)
        found = self._head() | self._body(Piece(), [])
        found |= ollama_api.final_figures(generation.last.finish_reason, n_prompt, generation.n_generated, timing)
        if not self._call.is_chat and not self._call.body.flag("raw"):
            found["context"] = [*generation.job.prompt, *generation.token_ids]
        policy = str(self._context.config.engine.policy)
        figures = ollama_api.speculation(generation.last.stats, policy, generation.last.speeds)
        return found | {"dspark": figures}
