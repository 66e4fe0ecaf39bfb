"""The real `openai` package against the running server."""

from __future__ import annotations

import json

import pytest

from .conftest import QUESTION, WEATHER_TOOL

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": QUESTION}]
GREEDY = {"model": "demo", "messages": ASK, "temperature": 0, "max_completion_tokens": 40}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_says_the_same_whole_and_streamed(client):
    whole = client.chat.completions.create(**GREEDY)
    chunks = list(client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *steps, usage = chunks
    assert "".join(step.choices[0].delta.content or "" for step in steps) == whole.choices[0].message.content
    assert steps[0].choices[0].delta.role == "assistant"
    assert steps[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert len({chunk.id for chunk in chunks}) == 1
    for one in (whole.usage, usage.usage):
        assert (one.prompt_tokens, one.completion_tokens, one.total_tokens) == (17, 40, 57)
        assert one.completion_tokens_details.accepted_prediction_tokens > 0
    assert whole.timings["draft_n"] >= whole.timings["draft_n_accepted"] > 0


def test_stop_ends_before_the_string(client):
    whole = client.chat.completions.create(**GREEDY).choices[0].message.content
    stopped = client.chat.completions.create(**GREEDY, stop=["column by"]).choices[0]
    assert stopped.message.content == whole[: whole.index("column by")]
    assert stopped.finish_reason == "stop"


def test_seed_repeats_and_choices_differ(client):
    options = GREEDY | {"temperature": 1.0, "seed": 5, "n": 2}
    first, second = (client.chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]


def test_logprobs_are_the_committed_tokens(client):
    answers = [
        client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3, extra_body=extra)
        for extra in ({}, {"seed": 1})
    ]
    content = answers[0].choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answers[0].choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)  # greedy: the likeliest
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert bytes(content[0].bytes).decode() == content[0].token


def test_logit_bias_forbids_a_token(client, demo_target):
    from dspark_cpp import _core

    first = client.chat.completions.create(**GREEDY | {"max_completion_tokens": 1}).choices[0].message.content
    [token] = _core.Model.load_target(str(demo_target)).tokenize(first, False)
    other = client.chat.completions.create(**GREEDY | {"max_completion_tokens": 1}, logit_bias={str(token): -100})
    assert other.choices[0].message.content != first


def test_json_schema_is_kept(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    answer = client.chat.completions.create(**GREEDY | {"max_completion_tokens": 300}, response_format=wanted)
    assert isinstance(json.loads(answer.choices[0].message.content)["n"], int)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_required_tools_are_called(client, choice):
    options = GREEDY | {"tools": [WEATHER_TOOL], "tool_choice": choice, "max_completion_tokens": 200}
    options["parallel_tool_calls"] = False  # a small model may call for ever
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == "tool_calls"
    [call] = whole.message.tool_calls[:1]
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    arguments, reasons = "", set()
    for step in client.chat.completions.create(**options, stream=True):
        for part in step.choices[0].delta.tool_calls or []:
            arguments += part.function.arguments or "" if part.index == 0 else ""
        reasons.add(step.choices[0].finish_reason)
    assert json.loads(arguments) == json.loads(call.function.arguments)  # how much white space is a near tie
    assert reasons == {None, "tool_calls"}


def test_completions_echo_and_take_tokens(client):
    text = client.completions.create(model="demo", prompt="def add(", max_tokens=8, temperature=0, echo=True)
    assert text.choices[0].text.startswith("def add(")
    many = client.completions.create(model="demo", prompt=["one", "two"], max_tokens=4)
    assert [choice.index for choice in many.choices] == [0, 1]
    tokens = client.completions.create(model="demo", prompt=[1, 2, 3], max_tokens=4, temperature=0, logprobs=2)
    assert len(tokens.choices[0].logprobs.tokens) == 4
    chunks = list(client.completions.create(model="demo", prompt="def add(", max_tokens=8, temperature=0, stream=True))
    assert "def add(" + "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text


def test_embeddings_in_both_encodings(client, http):
    packed = client.embeddings.create(model="demo", input=["a text"])  # the package asks for base64
    plain = http.post("/v1/embeddings", json={"model": "demo", "input": "a text"}).json()
    assert packed.data[0].embedding == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)
    short = client.embeddings.create(model="demo", input="a text", dimensions=16)
    assert len(short.data[0].embedding) == 16


def test_models(client):
    assert "demo:latest" in [model.id for model in client.models.list()]
    assert client.models.retrieve("demo").id == "demo:latest"


def test_errors_have_openais_shape(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**GREEDY | {"model": "nope"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY | {"temperature": -1})
    assert caught.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**GREEDY | {"messages": [{"role": "user", "content": "word " * 5000}]})
    assert caught.value.code == "context_length_exceeded"
