"""Both streams against golden transcripts: every field, its place and its type.

What differs between runs is replaced: times, ids, figures of speed, and how the text is cut into chunks (which depends
on what was accepted). `DSPARK_WRITE_TRANSCRIPTS=1` writes them anew; read the difference before committing it.
"""

from __future__ import annotations

import json
import os
import re
from itertools import groupby
from typing import Any

import pytest
from conftest import DEMO

from .conftest import QUESTION

FOLDER = DEMO.parents[2] / "tests" / "data" / "transcripts"
ASK = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "stream": True}
OLLAMA_OPTIONS = {"options": {"temperature": 0, "num_predict": 12}}
OPENAI_OPTIONS = {"temperature": 0, "max_tokens": 12, "stream_options": {"include_usage": True}}
KEPT = {"done_reason", "finish_reason", "model", "object", "role", "policy", "index", "prompt_eval_count", "eval_count",
        "prompt_tokens", "completion_tokens", "total_tokens"}  # fmt: skip


def shape(name: str, value: Any) -> Any:
    """Replace what differs between runs by its type."""
    if isinstance(value, dict):
        return {key: shape(key, inner) for key, inner in value.items()}
    if name == "drafted":
        return ["<bool>"]
    if isinstance(value, list):
        return [shape(name, value[0])] if value else []
    if name in KEPT or isinstance(value, bool | None):
        return value
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", value):
        return "<time>"
    return f"<{type(value).__name__}>" if value != "" else ""


def transcript(lines: list[str]) -> str:
    """One shape per line, runs of the same one written once."""
    shapes = []
    for line in filter(None, lines):
        prefix, body = ("data: ", line.removeprefix("data: ")) if line.startswith("data: ") else ("", line)
        shapes.append(prefix + (body if body == "[DONE]" else json.dumps(shape("", json.loads(body)))))
    return "".join(f"{line}\n" for line, _ in groupby(shapes))


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("ollama_chat", "/api/chat", ASK | OLLAMA_OPTIONS),
        ("ollama_chat_dspark", "/api/chat", ASK | OLLAMA_OPTIONS | {"dspark": True}),
        ("ollama_generate", "/api/generate", {"model": "demo", "prompt": QUESTION} | OLLAMA_OPTIONS),
        ("openai_chat", "/v1/chat/completions", ASK | OPENAI_OPTIONS),
        ("openai_chat_logprobs", "/v1/chat/completions", ASK | OPENAI_OPTIONS | {"logprobs": True, "top_logprobs": 1}),
        ("openai_completions", "/v1/completions", {"model": "demo", "prompt": "def", "stream": True} | OPENAI_OPTIONS),
    ],
)
def test_stream_is_the_golden_one(http, name, path, body):
    found = transcript(http.post(path, json=body).text.split("\n"))
    golden = FOLDER / f"{name}.txt"
    if os.environ.get("DSPARK_WRITE_TRANSCRIPTS"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")
