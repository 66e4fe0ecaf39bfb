"""Ollama's other endpoints: what there is, what is loaded, embeddings, and changing the store."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.errors import ModelLoadError, ModelMismatchError
from dspark_cpp.server import ollama_api
from dspark_cpp.server.catalog import Entry
from dspark_cpp.server.context import Endpoint, ServerContext
from dspark_cpp.server.embeddings import Embeddings, EmbedOptions, embed_texts, normalised
from dspark_cpp.server.exchange import StreamReply, attended, body_chunks
from dspark_cpp.server.fields import Fields
from dspark_cpp.server.ollama_answers import answer
from dspark_cpp.server.ollama_options import read_n_ctx
from dspark_cpp.server.problems import BadRequestError, problem_of
from dspark_cpp.store import Modelfile, checked_digest, parse_modelfile
from dspark_cpp.store.model_files import list_capabilities
from dspark_cpp.store.parts import parts_beside

__all__ = ["ollama_routes"]

API_VERSION = "0.13.0"  # the version of Ollama's API that is spoken here: clients compare it
_NOT_CREATED = {
    "quantize": "create from a file that is quantized already",
    "quantization": "create from a file that is quantized already",
    "adapters": "create from a file that the adapter is merged into",
    "path": "send the files as blobs and name them in files",
}
_TOKENIZER_LISTS = (
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type",
)


def ollama_routes(context: ServerContext) -> list[Route]:
    """Return the routes of Ollama's dialect."""
    table: list[tuple[str, Endpoint, str]] = [
        ("/api/chat", partial(answer, is_chat=True), "POST"),
        ("/api/generate", partial(answer, is_chat=False), "POST"),
        ("/api/version", _version, "GET"),
        ("/api/tags", _tags, "GET"),
        ("/api/ps", _running, "GET"),
        ("/api/show", _show, "POST"),
        ("/api/embed", _embed, "POST"),
        ("/api/embeddings", _embed_one, "POST"),
        ("/api/pull", _pull, "POST"),
        ("/api/create", _create, "POST"),
        ("/api/copy", _copy, "POST"),
        ("/api/delete", _delete, "DELETE"),
        ("/api/blobs/{digest}", _has_blob, "HEAD"),
        ("/api/blobs/{digest}", _put_blob, "POST"),
    ]
    return [context.route(path, endpoint, method) for path, endpoint, method in table]


# ---- what there is ----


async def _version(_: ServerContext, __: Request) -> Response:
    return JSONResponse({"version": API_VERSION})


async def _tags(context: ServerContext, _: Request) -> Response:
    entries = await asyncio.to_thread(context.catalog.list)
    return JSONResponse({"models": [_tag(entry) for entry in entries]})


def _tag(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "model": entry.name,
        "modified_at": ollama_api.timestamp(entry.modified_at),
        "size": entry.size,
        "digest": entry.digest,
        "details": dict(entry.details),
    }


async def _running(context: ServerContext, _: Request) -> Response:
    models = []
    for model in context.pool.models:
        entry = model.entry
        models.append(
            {
                "name": entry.name,
                "model": entry.name,
                "size": model.memory_bytes,
                "digest": entry.digest,
                "details": dict(entry.details),
                "expires_at": ollama_api.timestamp(model.expires_at),
                "size_vram": model.gpu_bytes,
                "context_length": model.llm.n_ctx,
            }
        )
    return JSONResponse({"models": models})


async def _show(context: ServerContext, request: Request) -> Response:
    body = await context.read(request)
    entry = await asyncio.to_thread(context.catalog.get, _name_of(body))
    try:
        found = await asyncio.to_thread(_describe, entry, body.flag("verbose"))
    except ModelLoadError:
        await asyncio.to_thread(context.catalog.get, entry.name)  # 404 where it was deleted meanwhile
        raise
    return JSONResponse(found)


def _describe(entry: Entry, is_verbose: bool) -> dict[str, Any]:
    files = [GGUFFile(part) for part in parts_beside(entry.target)]
    values = _metadata(files[0], is_verbose)
    values["general.parameter_count"] = sum(info.n_elements for file in files for info in file.tensors.values())
    parameters = "\n".join(
        f"{name:<30} {json.dumps(value) if isinstance(value, str) else value}"
        for name, given in entry.parameters.items()
        for value in (given if isinstance(given, list) else [given])
    )
    found: dict[str, Any] = {"license": entry.license} if entry.license else {}
    found["modelfile"] = entry.modelfile
    if parameters:
        found["parameters"] = parameters
    found["template"] = str(values.pop("tokenizer.chat_template", ""))
    if entry.system:
        found["system"] = entry.system
    return found | {
        "details": dict(entry.details),
        "messages": list(entry.messages),
        "model_info": values,
        "capabilities": list(list_capabilities(entry.target)),
        "modified_at": ollama_api.timestamp(entry.modified_at),
    }


def _metadata(file: GGUFFile, is_verbose: bool) -> dict[str, Any]:
    """Return a file's keys; long lists of the tokenizer are null unless asked for, as Ollama does it."""
    found: dict[str, Any] = {}
    for name, value in file.values.items():
        if value.is_array:
            is_shown = is_verbose or name not in _TOKENIZER_LISTS
            texts = [text.decode("utf-8", "replace") for text in file.get_strings(name) or ()] if is_shown else []
            found[name] = (file.get_numbers(name) or texts) if is_shown else None
        else:
            one = file.get(name)
            found[name] = None if isinstance(one, float) and not math.isfinite(one) else one
    return found


# ---- embeddings ----


async def _embed(context: ServerContext, request: Request) -> Response:
    begin = time.perf_counter_ns()
    body = await context.read(request)
    found = await _embedded(context, request, body, body.texts("input", context.config.limits.inputs))
    return JSONResponse(
        {
            "model": _name_of(body),
            "embeddings": [normalised(vector) for vector in found.vectors],
            "total_duration": time.perf_counter_ns() - begin,
            "load_duration": max(found.load_ns, 1),
            "prompt_eval_count": found.n_tokens,
        }
    )


async def _embed_one(context: ServerContext, request: Request) -> Response:
    """Answer the older endpoint, whose vectors keep their length."""
    body = await context.read(request)
    text = body.text("prompt")
    found = await _embedded(context, request, body, [text] if text else [])
    return JSONResponse({"embedding": found.vectors[0] if found.vectors else []})


async def _embedded(context: ServerContext, request: Request, body: Fields, texts: Sequence[str]) -> Embeddings:
    options = EmbedOptions(
        dimensions=body.integer("dimensions"),
        truncates=body.flag("truncate", True),
        keep_alive=ollama_api.read_keep_alive(body),
        n_ctx=read_n_ctx(body),
    )
    work = embed_texts(context.pool, _name_of(body), texts, options)
    return await attended(request.receive, context.deadline(), work)


# ---- the store ----


async def _pull(context: ServerContext, request: Request) -> Response:
    body = await context.read(request)
    store = context.catalog.need_store()
    draft = body.text("draft") or None
    work = partial(store.pull, _changeable(context, _name_of(body)), draft=draft)
    return await _progress(context, request, body, work)


async def _create(context: ServerContext, request: Request) -> Response:
    body = await context.read(request)
    store = context.catalog.need_store()
    name = _changeable(context, _name_of(body))
    arguments = _with_static_source(context, _create_arguments(body))

    def work() -> Generator[dict[str, Any]]:
        yield {"status": "reading model metadata"}
        try:
            store.create(name, **arguments)
        except (ModelLoadError, ModelMismatchError) as error:
            raise BadRequestError(str(error)) from None  # the client's files are at fault
        yield {"status": "writing manifest"}
        yield {"status": "success"}

    return await _progress(context, request, body, work)


def _create_arguments(body: Fields) -> dict[str, Any]:
    """Return what `Store.create` takes; never a path: those of a Modelfile name models here."""
    for name, advice in _NOT_CREATED.items():
        if name in body:
            raise BadRequestError(f"{name} is not supported: {advice}", param=name)
    recipe = parse_modelfile(body.text("modelfile")) if body.text("modelfile") else Modelfile(source="")
    if recipe.draft is not None:
        raise BadRequestError("a drafter must be sent as a blob and named in draft_files")
    files, draft_files = body.object("files"), body.object("draft_files")
    messages = [dict(message.values) for message in body.objects("messages", 2048)]
    parameters = body.object("parameters")
    licenses = body.texts("license", 16)
    given: dict[str, Any] = {
        "from_": body.text("from") or recipe.source or None,
        "files": None if files is None else dict(files.values),
        "draft_files": None if draft_files is None else dict(draft_files.values),
        "system": body.text("system") or recipe.system,
        "template": body.text("template") or recipe.template,
        "license": "\n".join(licenses) or recipe.license,
        "parameters": {**recipe.parameters, **(parameters.values if parameters else {})},
        "messages": messages or recipe.messages or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def _with_static_source(context: ServerContext, arguments: dict[str, Any]) -> dict[str, Any]:
    """Put the files of a model of the command line in its place: the store does not know it."""
    source = arguments.get("from_")
    if source is None or not context.catalog.is_static(source):
        return arguments
    entry = context.catalog.get(source)
    files = {"target": entry.target} | ({"draft": entry.draft} if "draft_files" not in arguments else {})
    return {name: value for name, value in arguments.items() if name != "from_"} | files


async def _copy(context: ServerContext, request: Request) -> Response:
    body = await context.read(request)
    source, destination = body.text("source"), _changeable(context, body.text("destination"))
    store = context.catalog.need_store()
    entry = await asyncio.to_thread(context.catalog.get, source)
    if entry.manifest is None:
        await asyncio.to_thread(partial(store.create, destination, target=entry.target, draft=entry.draft))
    else:
        await asyncio.to_thread(store.copy, source, destination)
    return PlainTextResponse("")


async def _delete(context: ServerContext, request: Request) -> Response:
    name = _changeable(context, _name_of(await context.read(request)))
    store = context.catalog.need_store()
    await asyncio.to_thread(context.catalog.get, name)
    await context.pool.unload(name)
    await asyncio.to_thread(store.delete, name)
    return PlainTextResponse("")


async def _has_blob(context: ServerContext, request: Request) -> Response:
    store = context.catalog.need_store()
    digest = checked_digest(request.path_params["digest"])
    return PlainTextResponse("", 200 if await asyncio.to_thread(store.blobs.has, digest) else 404)


async def _put_blob(context: ServerContext, request: Request) -> Response:
    store, limits = context.catalog.need_store(), context.config.limits
    digest = checked_digest(request.path_params["digest"])
    writing = store.blobs.writer(digest)
    writer = await asyncio.to_thread(writing.__enter__)
    try:
        async for chunk in body_chunks(request, limits.blob_bytes, limits.body_seconds):
            await asyncio.to_thread(writer.write, chunk)
    except BaseException as error:
        await asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writing.__exit__, None, None, None)
    return PlainTextResponse("", 201)


def _name_of(body: Fields) -> str:
    """`model`, or `name` as older clients say."""
    name = body.text("model") or body.text("name")
    if not name:
        raise BadRequestError("model is required", param="model")
    return name


def _changeable(context: ServerContext, name: str) -> str:
    if not name:
        raise BadRequestError("a name is required")
    if context.catalog.is_static(name):
        raise BadRequestError(f"model '{name}' was given on the command line and cannot be changed")
    return name


Work = Callable[[], Generator[dict[str, Any], Any, Any]]


async def _progress(context: ServerContext, request: Request, body: Fields, work: Work) -> Response:
    """Run a generator of records in a thread; as lines, or its last record alone."""
    deadline = context.deadline()
    records = _records(work())
    first = await attended(request.receive, deadline, anext(records))
    if body.flag("stream", True):
        last_word = _line({"error": deadline.problem.message})
        return StreamReply(_lines(first, records), "application/x-ndjson", deadline, last_word)
    return JSONResponse(await attended(request.receive, deadline, _last(first, records)))


async def _records(generator: Generator[dict[str, Any], Any, Any]) -> AsyncGenerator[dict[str, Any]]:
    done = object()
    try:
        while (one := await asyncio.to_thread(next, generator, done)) is not done:
            yield one  # type: ignore[misc]
    finally:
        await asyncio.to_thread(_close, generator)


def _close(generator: Generator[Any, Any, Any]) -> None:
    for _ in range(600):  # a thread that was left behind may still be in it
        try:
            generator.close()
        except ValueError:
            time.sleep(0.1)
        else:
            return


async def _last(first: dict[str, Any], records: AsyncGenerator[dict[str, Any]]) -> dict[str, Any]:
    return [first, *[one async for one in records]][-1]


async def _lines(first: dict[str, Any], records: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[bytes]:
    yield _line(first)
    try:
        async for one in records:
            yield _line(one)
    except Exception as error:
        yield _line({"error": problem_of(error).message})
    finally:
        await records.aclose()


def _line(found: dict[str, Any]) -> bytes:
    return json.dumps(found).encode() + b"\n"
