"""Both dialects by schemathesis: requests made from a description of them, answers held against it."""

from __future__ import annotations

from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="pip install --group clients")

from hypothesis import settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
MODEL = {"enum": ["demo", "demo:latest", "nope"]}
TEXT = {"type": "string", "maxLength": 40}
COUNT = {"type": "integer", "minimum": 1, "maximum": 4}
UNIT = {"type": "number", "minimum": 0, "maximum": 1}
NO_STREAM = {"enum": [False]}
ROLE = {"enum": ["system", "user", "assistant"]}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 3,
    "items": {"type": "object", "properties": {"role": ROLE, "content": TEXT}, "required": ["role", "content"]},
}
VECTORS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}, "minItems": 256, "maxItems": 256}}
SHAPE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def obj(required: str = "", **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object."""
    return {"type": "object", "properties": properties, "required": required.split()}


OPTIONS = obj(
    "num_predict",
    num_predict=COUNT,
    temperature=UNIT,
    top_k=COUNT,
    top_p=UNIT,
    min_p=UNIT,
    seed={"type": "integer", "minimum": -1, "maximum": 2**31},
    stop={"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 3},
    draft_num_predict={"type": "integer", "minimum": -1, "maximum": 7},
    repeat_penalty={"type": "number", "minimum": 0.5, "maximum": 2},
)
OLLAMA = {"model": MODEL, "stream": NO_STREAM, "options": OPTIONS, "keep_alive": {"enum": ["5m", -1, 60]},
          "format": {"enum": ["json", SHAPE]}, "logprobs": {"type": "boolean"}, "think": NO_STREAM}  # fmt: skip
OPENAI = {"model": MODEL, "max_tokens": COUNT, "temperature": UNIT, "top_p": UNIT, "n": COUNT, "stream": NO_STREAM,
          "seed": {"type": "integer"}, "presence_penalty": UNIT, "frequency_penalty": UNIT, "stop": TEXT,
          "user": TEXT}  # fmt: skip
DURATIONS = {name: {"type": "integer", "minimum": 1} for name in ("total_duration", "load_duration", "eval_duration")}
DONE = {"done": {"enum": [True]}, "done_reason": {"enum": ["stop", "length", "load", "unload"]}, **DURATIONS}
CHOICES = {"type": "array", "minItems": 1, "items": obj("index finish_reason", index={"type": "integer"})}
USAGE = obj("prompt_tokens completion_tokens total_tokens", prompt_tokens=COUNT | {"maximum": 9999})

BODIES = {
    "/api/chat": (obj("model messages options stream", **OLLAMA, messages=MESSAGES), obj("message done", **DONE)),
    "/api/generate": (obj("model prompt options stream", **OLLAMA, prompt=TEXT), obj("response done", **DONE)),
    "/api/embed": (obj("model input", model=MODEL, input=TEXT), obj("embeddings", embeddings=VECTORS)),
    "/api/show": (obj("model", model=MODEL), obj("details model_info capabilities")),
    "/v1/chat/completions": (
        obj("model messages max_tokens", **OPENAI, messages=MESSAGES),
        obj("id object choices usage", object={"enum": ["chat.completion"]}, choices=CHOICES, usage=USAGE),
    ),
    "/v1/completions": (
        obj("model prompt max_tokens", **OPENAI, prompt=TEXT, echo={"type": "boolean"}),
        obj("id object choices usage", object={"enum": ["text_completion"]}, choices=CHOICES, usage=USAGE),
    ),
    "/v1/embeddings": (obj("model input", model=MODEL, input=TEXT), obj("data", data={"type": "array", "minItems": 1})),
}


def described() -> dict[str, Any]:
    """Return the description as OpenAPI has it."""

    def answer(schema: Any, *streams: str) -> dict[str, Any]:
        content = {"application/json": {"schema": schema}} | {kind: {} for kind in streams}
        return {"description": "", "content": content}

    paths = {}
    for path, (body, found) in BODIES.items():
        is_openai = path.startswith("/v1/")
        text = obj("message type", message={"type": "string"}) if is_openai else {"type": "string"}
        stream = "text/event-stream" if is_openai else "application/x-ndjson"
        error = answer(obj("error", error=text))
        content = {"application/json": {"schema": body}}
        responses = {"200": answer(found, stream), "400": error, "404": error}
        paths[path] = {"post": {"requestBody": {"required": True, "content": content}, "responses": responses}}
    return {"openapi": "3.1.0", "info": {"title": "both dialects", "version": "1"}, "paths": paths}


SCHEMA = schemathesis.openapi.from_dict(described())


@SCHEMA.parametrize()
@settings(max_examples=40)
def test_answers_are_as_described(case, server):
    case.call_and_validate(base_url=server.url, checks=CHECKS)
