"""The real `ollama` package against the running server."""

from __future__ import annotations

import json

import pytest
from conftest import DEMO
from waiting import wait_until

from .conftest import QUESTION, WEATHER_TOOL

ollama = pytest.importorskip("ollama")

GREEDY = {"temperature": 0, "num_predict": 40}
ASK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server):
    return ollama.Client(host=server.url)


def test_chat_says_the_same_whole_and_streamed(client):
    whole = client.chat(model="demo", messages=ASK, options=GREEDY)
    chunks = list(client.chat(model="demo", messages=ASK, options=GREEDY, stream=True))
    assert whole.message.role == "assistant"
    assert whole.message.content.startswith("We add column by column")
    assert "".join(chunk.message.content for chunk in chunks) == whole.message.content
    assert [chunk.done for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    for last in (whole, chunks[-1]):
        assert last.done_reason == "length"
        assert (last.prompt_eval_count, last.eval_count) == (17, 40)
        assert last.total_duration >= last.prompt_eval_duration + last.eval_duration > 0


def test_generate_goes_on_from_its_context(client):
    first = client.generate(model="demo", prompt=QUESTION, options=GREEDY | {"num_predict": 10})
    raw = client.generate(model="demo", prompt=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
                          raw=True, options=GREEDY | {"num_predict": 10})  # fmt: skip
    assert first.response == raw.response != ""
    second = client.generate(model="demo", prompt="And 3 + 4?", context=first.context, options=GREEDY)
    assert second.context[: len(first.context)] == first.context
    assert second.prompt_eval_count > len(first.context)


def test_format_takes_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answer = client.chat(model="demo", messages=ASK, format=schema, options={"temperature": 0, "num_predict": 300})
    assert isinstance(json.loads(answer.message.content)["n"], int)
    answer = client.generate(model="demo", prompt=QUESTION, format=schema, options={"seed": 3, "num_predict": 300})
    assert isinstance(json.loads(answer.response)["n"], int)


def test_tools_can_be_offered(client):
    answer = client.chat(model="demo", messages=ASK, tools=[WEATHER_TOOL], options=GREEDY)
    assert answer.done
    calls = [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
    messages = [*ASK, {"role": "assistant", "content": "", "tool_calls": calls}]
    messages += [{"role": "tool", "content": "sunny", "tool_name": "get_weather"}]
    answer = client.chat(model="demo", messages=messages, tools=[WEATHER_TOOL], options=GREEDY)
    assert answer.done


def test_embeddings_have_length_one(client):
    found = client.embed(model="demo", input=["one text", "another one"])
    assert [len(vector) for vector in found.embeddings] == [256, 256]
    assert all(sum(x * x for x in vector) == pytest.approx(1, abs=1e-6) for vector in found.embeddings)
    old = client.embeddings(model="demo", prompt="one text")
    length = sum(x * x for x in old.embedding) ** 0.5  # as the model gives it, as in Ollama
    assert [x / length for x in old.embedding] == pytest.approx(found.embeddings[0], abs=1e-6)


def test_list_show_ps(client):
    [model] = [one for one in client.list().models if one.model == "demo:latest"]
    assert model.size == sum((DEMO / name).stat().st_size for name in ("target.gguf", "drafter.gguf"))
    shown = client.show("demo")
    assert shown.modelinfo["general.architecture"] == "qwen3"
    assert shown.modelinfo["general.parameter_count"] == 8_395_264
    assert "completion" in shown.capabilities
    client.generate(model="demo", prompt="", keep_alive="10m")
    [running] = client.ps().models
    assert running.model == "demo:latest"


def test_empty_prompts_load_and_unload(client):
    assert client.generate(model="demo", prompt="").done_reason == "load"
    assert client.chat(model="demo", messages=[], keep_alive=0).done_reason == "unload"
    wait_until(lambda: client.ps().models == [])
    assert client.generate(model="demo", prompt="").done_reason == "load"


def test_create_copy_delete(client):
    digests = {name: client.create_blob(DEMO / name) for name in ("target.gguf", "drafter.gguf")}
    body = {
        "model": "mine",
        "files": {"target.gguf": digests["target.gguf"]},
        "draft_files": {"drafter.gguf": digests["drafter.gguf"]},
        "parameters": {"temperature": 0, "num_predict": 7},
        "system": "Be brief.",
        "stream": False,
    }
    assert client._request_raw("POST", "/api/create", json=body).json() == {"status": "success"}
    answer = client.chat(model="mine", messages=ASK)
    assert answer.eval_count == 7
    assert answer.prompt_eval_count > 17  # the system message
    statuses = [step.status for step in client.create(model="ours", from_="mine", system="Be long.", stream=True)]
    assert statuses[-1] == "success"
    client.copy("ours", "theirs")
    assert {"mine:latest", "ours:latest", "theirs:latest"} <= {one.model for one in client.list().models}
    for name in ("mine", "ours", "theirs"):
        client.delete(name)
    with pytest.raises(ollama.ResponseError, match="model 'mine' not found"):
        client.show("mine")


def test_create_from_a_model_of_the_command_line(client):
    client.create(model="tuned", from_="demo", system="Be brief.", parameters={"num_predict": 5, "temperature": 0})
    answer = client.generate(model="tuned", prompt=QUESTION)
    assert answer.eval_count == 5
    assert "DRAFT" in client.show("tuned").modelfile  # its drafter came along
    client.delete("tuned")
    assert client.generate(model="demo", prompt="x", options=GREEDY).done  # the files stay


def test_errors_have_ollamas_words(client):
    with pytest.raises(ollama.ResponseError, match="model 'nope' not found") as caught:
        client.chat(model="nope", messages=ASK)
    assert caught.value.status_code == 404
    for options in ({"temperature": -1}, {"top_p": "x"}, {"num_ctx": 0}):
        with pytest.raises(ollama.ResponseError) as caught:
            client.generate(model="demo", prompt="x", options=options)
        assert caught.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="does not support insert"):
        client.generate(model="demo", prompt="a", suffix="b")
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat(model="demo", messages=ASK, think=True)


def test_draft_length_changes_speed_only(client):
    texts = set()
    for draft in (0, 1, 7):
        answer = client.chat(model="demo", messages=ASK, options=GREEDY | {"draft_num_predict": draft})
        texts.add(answer.message.content)
    assert len(texts) == 1


def test_long_conversations_lose_their_beginning(client):
    messages = [{"role": "user", "content": f"Number {i} is a number. " * 20} for i in range(40)]
    answer = client.chat(model="demo", messages=[*messages, *ASK], options=GREEDY)
    assert answer.prompt_eval_count < 2048
    with pytest.raises(ollama.ResponseError, match="must leave room"):
        client._request_raw("POST", "/api/chat", json={"model": "demo", "messages": messages, "truncate": False})
