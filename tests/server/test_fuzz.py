# ruff: noqa: E501  (tables of strategies)
"""Both dialects under generated bodies: any JSON gets an answer that the dialect knows, and the server lives on."""

from __future__ import annotations

import pytest

hypothesis = pytest.importorskip("hypothesis")

from dspark_cpp.server import ollama_api, openai_api  # noqa: E402
from dspark_cpp.server.fields import Fields  # noqa: E402
from dspark_cpp.server.problems import BadRequestError  # noqa: E402
from dspark_cpp.server.settings import Limits  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LIMITS = Limits()
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "king"])
CALLS = st.lists(
    st.fixed_dictionaries(
        {}, optional={"id": ANY, "function": ANY | st.fixed_dictionaries({"name": ANY, "arguments": ANY})}
    ),
    max_size=2,
)
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES}, optional={"content": ANY, "tool_calls": CALLS | ANY, "images": ANY, "name": ANY}
)
OPTIONS = st.dictionaries(
    st.sampled_from(["temperature", "top_k", "top_p", "min_p", "seed", "num_predict", "num_ctx", "stop", "repeat_penalty",
                     "repeat_last_n", "num_keep", "draft_num_predict", "nonsense"]), ANY | st.integers(-3, 50), max_size=5)  # fmt: skip
OLLAMA = st.fixed_dictionaries(
    {"model": st.just("demo")},
    optional={"messages": st.lists(MESSAGE, max_size=3) | ANY, "prompt": SCALARS, "options": OPTIONS | ANY, "format": ANY,
              "tools": ANY, "think": ANY, "keep_alive": ANY, "stream": SCALARS, "context": ANY, "suffix": SCALARS,
              "raw": SCALARS, "logprobs": SCALARS, "top_logprobs": SCALARS, "images": ANY},
)  # fmt: skip
OPENAI = st.fixed_dictionaries(
    {"model": st.just("demo")},
    optional={"messages": st.lists(MESSAGE, max_size=3) | ANY, "prompt": ANY, "temperature": ANY, "top_p": ANY, "n": ANY,
              "max_tokens": ANY, "stop": ANY, "seed": ANY, "logit_bias": ANY, "logprobs": ANY, "top_logprobs": ANY,
              "response_format": ANY, "tools": ANY, "tool_choice": ANY, "stream": ANY, "stream_options": ANY},
)  # fmt: skip


@settings(max_examples=300)
@given(OLLAMA, st.booleans())
def test_ollama_bodies_are_read_or_refused(body, is_chat):
    try:
        call = ollama_api.read_call(Fields(body), LIMITS, is_chat=is_chat)
        if not call.only_loads:
            ollama_api.generation_of(call, system="", opening=(), parameters={}, has_template=True)
    except (BadRequestError, ValueError):
        return  # refused; any other exception is the finding


@settings(max_examples=300)
@given(OPENAI, st.booleans())
def test_openai_bodies_are_read_or_refused(body, is_chat):
    read = openai_api.read_chat if is_chat else openai_api.read_completion
    try:
        read(Fields(body), LIMITS, {})
    except BadRequestError:
        return


def bounded(body: dict) -> dict:
    """Keep answers short."""
    options = body.get("options")
    options = dict(options) if isinstance(options, dict) else {}
    return body | {"options": options | {"num_predict": 3}, "max_tokens": 3, "n": 1}


@settings(max_examples=80)
@given(
    body=OLLAMA | OPENAI,
    path=st.sampled_from(["/api/chat", "/api/generate", "/api/embed", "/api/show", "/v1/chat/completions", "/v1/completions",
                          "/v1/embeddings"]),
)  # fmt: skip
def test_server_answers_everything(http, body, path):
    answer = http.post(path, json=bounded(body))
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]


def test_server_still_answers(http):
    assert (
        http.post("/api/generate", json={"model": "demo", "prompt": "x", "options": {"num_predict": 2}}).status_code
        == 200
    )
