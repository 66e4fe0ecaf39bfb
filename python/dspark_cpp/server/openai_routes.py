"""OpenAI's endpoints: chat, completions, embeddings, models."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dspark_cpp.server import openai_api, openai_objects
from dspark_cpp.server.catalog import Entry
from dspark_cpp.server.context import Endpoint, ServerContext
from dspark_cpp.server.embeddings import EmbedOptions, embed_texts, normalised
from dspark_cpp.server.exchange import StreamReply, attended
from dspark_cpp.server.fields import Fields
from dspark_cpp.server.openai_answers import Answer
from dspark_cpp.server.problems import BadRequestError, problem_of

__all__ = ["openai_routes"]

_log = logging.getLogger(__name__)


def openai_routes(context: ServerContext) -> list[Route]:
    """Return the routes of OpenAI's dialect."""
    table: list[tuple[str, Endpoint, str]] = [
        ("/v1/chat/completions", partial(_complete, is_chat=True), "POST"),
        ("/v1/completions", partial(_complete, is_chat=False), "POST"),
        ("/v1/embeddings", _embed, "POST"),
        ("/v1/models", _models, "GET"),
        ("/v1/models/{name:path}", _model, "GET"),
    ]
    return [context.route(path, endpoint, method, openai_api.FOR_THE_SERVICE) for path, endpoint, method in table]


async def _complete(context: ServerContext, request: Request, *, is_chat: bool) -> Response:
    deadline = context.deadline()
    body = await context.read(request)
    entry = await asyncio.to_thread(context.catalog.get, openai_api.model_name(body))
    read = openai_api.read_chat if is_chat else openai_api.read_completion
    call = read(body, context.config.limits, entry.parameters)
    answer = Answer(context, request, call, entry, is_chat=is_chat)
    if not call.stream:
        return JSONResponse(await attended(request.receive, deadline, answer.whole()))
    chunks = answer.chunks()
    first = await attended(request.receive, deadline, anext(chunks))
    last_word = _event(openai_objects.error_body(deadline.problem))
    return StreamReply(_events(first, chunks), "text/event-stream", deadline, last_word, {"Cache-Control": "no-cache"})


async def _events(first: dict[str, Any], rest: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    async with aclosing(rest):
        yield _event(first)
        try:
            async for one in rest:
                yield _event(one)
            yield b"data: [DONE]\n\n"
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                _log.exception("cannot go on with an answer")
            yield _event(openai_objects.error_body(problem))


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _embed(context: ServerContext, request: Request) -> Response:
    body = await context.read(request)
    form = body.text("encoding_format", "float")
    if form not in ("float", "base64"):
        body.refuse("encoding_format", "be float or base64")
    inputs = _inputs(body, context.config.limits.inputs)
    options = EmbedOptions(dimensions=body.integer("dimensions"))
    work = embed_texts(context.pool, openai_api.model_name(body), inputs, options)
    found = await attended(request.receive, context.deadline(), work)
    encode = _to_base64 if form == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(normalised(vector))}
        for index, vector in enumerate(found.vectors)
    ]
    usage = {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens}
    return JSONResponse({"object": "list", "data": data, "model": body.text("model"), "usage": usage})


def _inputs(body: Fields, limit: int) -> list[str | list[int]]:
    value = body.any("input")
    if isinstance(value, str):
        inputs: list[Any] = [value]
    else:
        items = body.items("input", 2**20)
        inputs = [items] if items and all(isinstance(item, int) for item in items) else items
    if not 1 <= len(inputs) <= limit or not all(inputs):
        raise BadRequestError(f"input must hold 1 to {limit} texts that are not empty", param="input")
    for one in inputs:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(token) is int for token in one)):
            raise BadRequestError("input must be a text, token ids, or a list of those", param="input")
    return inputs


def _to_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


async def _models(context: ServerContext, _: Request) -> Response:
    entries = await asyncio.to_thread(context.catalog.list)
    return JSONResponse({"object": "list", "data": [_describe(entry) for entry in entries]})


async def _model(context: ServerContext, request: Request) -> Response:
    entry = await asyncio.to_thread(context.catalog.get, request.path_params["name"])
    return JSONResponse(_describe(entry))


def _describe(entry: Entry) -> dict[str, Any]:
    created = int(entry.modified_at.timestamp() or time.time())
    return {"id": entry.name, "object": "model", "created": created, "owned_by": "library"}
