"""Every option does what it says, is refused, or is named in the log: nothing is taken and forgotten."""

from __future__ import annotations

import json
import math

import pytest
from waiting import wait_until

from .conftest import QUESTION, run_server

ASK = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0}
GENERATE = {"model": "demo", "prompt": QUESTION, "stream": False}
CHAT = {"model": "demo", "messages": ASK, "temperature": 0, "max_tokens": 12}
COMPLETE = {"model": "demo", "prompt": "def add(", "max_tokens": 6}


def logged(server, body, path="/api/generate"):
    """Post a body and return what the log says meanwhile."""
    before = len(server.log.read_text())
    with server.client() as client:
        assert client.post(path, json=body).status_code == 200
    return server.log.read_text()[before:]


# ---- Ollama ----


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"mirostat": 1}, "option 'mirostat' has no effect here"),
        ({"typical_p": 0.5}, "option 'typical_p' has no effect here"),
        ({"num_thread": 2}, "option 'num_thread' has no effect here"),
        ({"wings": 2}, "option 'wings' is unknown"),
    ],
)
def test_options_without_effect_are_named_in_the_log(server, options, warning):
    assert warning in logged(server, GENERATE | {"options": options | {"num_predict": 1}})


def test_options_with_effect_are_not(server):
    options = {"repeat_last_n": 32, "repeat_penalty": 1.1, "num_ctx": 512, "num_keep": 2, "draft_num_predict": 2}
    options |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "min_p": 0.1, "top_k": 3, "top_p": 0.9, "stop": "x"}
    assert "warning" not in logged(server, GENERATE | {"options": options | {"num_predict": 1, "seed": 3}})


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/api/generate", GENERATE | {"wings": 2}, "wings"),
        ("/api/generate", GENERATE | {"tools": []}, "tools"),
        ("/api/embed", {"model": "demo", "input": "x", "format": "json"}, "format"),
        ("/v1/chat/completions", CHAT | {"wings": 2}, "wings"),
        ("/v1/embeddings", {"model": "demo", "input": "x", "wings": 2}, "wings"),
    ],
)
def test_fields_that_nobody_reads_are_named_in_the_log(server, path, body, field):
    assert f"field '{field}' has no effect on {path}" in logged(server, body | {"options": {"num_predict": 1}}, path)


def test_fields_about_the_service_are_not(server):
    body = CHAT | {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert "warning" not in logged(server, body, "/v1/chat/completions")


def test_num_predict(http):
    for n, expected in ((3, 3), (1, 1)):
        assert (
            http.post("/api/generate", json=GENERATE | {"options": GREEDY | {"num_predict": n}}).json()["eval_count"]
            == expected
        )
    for n in (0, -1, -2):  # as in Ollama: no limit
        options = {"num_predict": n, "temperature": 0, "num_ctx": 64}
        assert http.post("/api/generate", json=GENERATE | {"options": options}).json()["eval_count"] > 10


def test_repeat_last_n_is_how_far_penalties_look_back(http):
    """A penalty of a million forbids what is in the window: with 0 nothing, with -1 all of prompt and answer."""
    texts = {}
    for window in (0, 1, 2, -1):
        options = {"temperature": 0, "num_predict": 24, "repeat_penalty": 1e6, "repeat_last_n": window}
        body = GENERATE | {"options": options, "logprobs": True}
        texts[window] = [entry["token"] for entry in http.post("/api/generate", json=body).json()["logprobs"]]
    free = http.post("/api/generate", json=GENERATE | {"options": {"temperature": 0, "num_predict": 24}}).json()
    assert "".join(texts[0]) == free["response"]
    assert len(set(texts[-1])) == len(texts[-1])
    for window in (1, 2):
        tokens = texts[window]
        assert all(tokens[i] not in tokens[max(i - window, 0) : i] for i in range(len(tokens)))
        assert len(set(tokens)) < len(tokens)


def test_stop_and_seed(http):
    options = {"temperature": 0, "num_predict": 40}
    whole = http.post("/api/generate", json=GENERATE | {"options": options}).json()["response"]
    word = whole.split()[4]
    cut = http.post("/api/generate", json=GENERATE | {"options": options | {"stop": [word]}}).json()
    assert cut["response"] == whole[: whole.index(word)]
    assert cut["done_reason"] == "stop"
    body = GENERATE | {"prompt": "Tell me about cats.", "options": {"temperature": 1, "num_predict": 12}}
    texts = [
        http.post("/api/generate", json=body | {"options": body["options"] | {"seed": seed}}).json()["response"]
        for seed in (1, 1, 2, 3, 4, 5)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_logprobs_of_ollama_match_openais(http):
    options = {"temperature": 0, "num_predict": 12}
    body = {"model": "demo", "messages": ASK, "stream": False, "options": options, "logprobs": True, "top_logprobs": 2}
    ours = http.post("/api/chat", json=body).json()["logprobs"]
    theirs = http.post("/v1/chat/completions", json=CHAT | {"logprobs": True, "top_logprobs": 2}).json()
    theirs = theirs["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in ours] == [entry["token"] for entry in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["logprob"] == pytest.approx(other["logprob"], abs=0.05)  # quantized weights, other batches
        assert len(one["top_logprobs"]) == len(other["top_logprobs"]) == 2
    assert "logprobs" not in http.post("/api/chat", json=body | {"logprobs": False, "top_logprobs": 0}).json()


FOREVER = [-1, "-1", "-1m", 1e300, 10**25, "9999999999h", "inf"]


@pytest.mark.parametrize("value", ["5m", "1h30m", 300, 299.5, "0.5h", *FOREVER])
def test_keep_alive_forms(http, value):
    http.post("/api/generate", json=GENERATE | {"keep_alive": value, "options": {"num_predict": 1}})
    [model] = http.get("/api/ps").json()["models"]
    assert (model["expires_at"] > "9000") == (value in FOREVER)


@pytest.mark.parametrize("value", ["soon", "5 parsecs", {}, [1], True, "m"])
def test_keep_alive_that_is_none(http, value):
    answer = http.post("/api/generate", json=GENERATE | {"keep_alive": value})
    assert answer.status_code == 400
    assert "keep_alive must be" in answer.json()["error"]


def test_keep_alive_zero_unloads_after_the_answer(tmp_path):
    with run_server(tmp_path, "--demo", "--no-store") as server, server.client() as client:
        answer = client.post("/api/generate", json=GENERATE | {"keep_alive": 0, "options": GREEDY | {"num_predict": 2}})
        assert answer.json()["eval_count"] == 2
        wait_until(lambda: client.get("/api/ps").json()["models"] == [])


def test_formats_that_nothing_can_keep_to_are_the_clients_mistake(http):
    schema = {"type": "integer", "minimum": 5, "maximum": 3}
    answer = http.post("/api/generate", json=GENERATE | {"format": schema, "raw": True})
    assert (answer.status_code, answer.json()["error"][:31]) == (400, "grammar must allow a token at e")
    lines = http.post("/api/generate", json=GENERATE | {"format": schema, "raw": True, "stream": True})
    assert "grammar must allow" in lines.json()["error"]
    body = COMPLETE | {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_images_are_refused_clearly(http):
    picture = "iVBORw0KGgo="
    for path, body in (
        ("/api/generate", GENERATE | {"images": [picture]}),
        ("/api/chat", {"model": "demo", "messages": [{"role": "user", "content": "x", "images": [picture]}]}),
    ):
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]) == (400, "this model does not support images")
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    answer = http.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == 400
    assert "text only" in answer.json()["error"]["message"]


def test_system_and_raw(http):
    options = {"temperature": 0, "num_predict": 3}
    n_plain = http.post("/api/generate", json=GENERATE | {"options": options}).json()["prompt_eval_count"]
    with_system = http.post("/api/generate", json=GENERATE | {"options": options, "system": "Be brief."}).json()
    assert with_system["prompt_eval_count"] > n_plain
    raw = http.post("/api/generate", json=GENERATE | {"options": options, "raw": True}).json()
    assert raw["prompt_eval_count"] < n_plain
    assert "context" not in raw
    assert http.post("/api/generate", json=GENERATE | {"raw": True, "system": "x"}).status_code == 400


def test_template_of_a_request_is_told_to_be_ignored(server):
    body = GENERATE | {"template": "{{ .Prompt }}", "options": {"num_predict": 1}}
    assert "the template of a request has no effect" in logged(server, body)


def test_json_formats(http):
    body = GENERATE | {"options": {"seed": 1, "num_predict": 200}}
    for form in ("json", {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}):
        answer = http.post("/api/generate", json=body | {"format": form}).json()
        assert answer["done_reason"] == "length" or isinstance(json.loads(answer["response"]), dict)
    assert http.post("/api/generate", json=body | {"format": "yaml"}).status_code == 400


def test_old_embeddings_keep_their_length(http):
    old = http.post("/api/embeddings", json={"model": "demo", "prompt": "one text", "keep_alive": "7m"}).json()
    new = http.post("/api/embed", json={"model": "demo", "input": "one text"}).json()
    length = math.sqrt(sum(value * value for value in old["embedding"]))
    assert abs(length - 1) > 0.1
    assert [value / length for value in old["embedding"]] == pytest.approx(new["embeddings"][0], abs=1e-6)


def test_embed_options(http):
    body = {"model": "demo", "input": "one two three four five six seven eight nine ten"}
    whole = http.post("/api/embed", json=body).json()
    cut = http.post("/api/embed", json=body | {"options": {"num_ctx": 4}}).json()
    assert cut["prompt_eval_count"] == 4 < whole["prompt_eval_count"]
    refused = http.post("/api/embed", json=body | {"options": {"num_ctx": 4}, "truncate": False})
    assert (refused.status_code, "at most 4 tokens" in refused.json()["error"]) == (400, True)
    assert len(http.post("/api/embed", json=body | {"dimensions": 8}).json()["embeddings"][0]) == 8
    assert http.post("/api/embed", json=body | {"dimensions": 999}).status_code == 400


@pytest.mark.parametrize("name", ["quantize", "adapters"])
def test_create_refuses_what_it_cannot_do(http, name):
    answer = http.post("/api/create", json={"model": "x", "from": "demo", name: "q4_K_M", "stream": False})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"{name} is not supported")


# ---- OpenAI ----


def test_best_of_shows_the_likeliest(http):
    body = COMPLETE | {"temperature": 1.5, "seed": 1, "logprobs": 0, "n": 5, "best_of": 8}
    found = http.post("/v1/completions", json=body).json()
    likelihoods = []
    for choice in found["choices"]:
        logprobs = choice["logprobs"]["token_logprobs"]
        likelihoods.append(sum(logprobs) / len(logprobs))
    assert len(likelihoods) == 5
    assert likelihoods == sorted(likelihoods, reverse=True)  # by chance: once in 120
    n_shown = sum(len(choice["logprobs"]["tokens"]) for choice in found["choices"])
    assert found["usage"]["completion_tokens"] > n_shown  # those not shown were generated too
    plain = http.post("/v1/completions", json=body | {"logprobs": None, "n": 1}).json()["choices"]
    assert [choice["logprobs"] for choice in plain] == [None]


def test_echo_repeats_each_prompt(http):
    prompts = ["def add(", "The cat"]
    body = COMPLETE | {"prompt": prompts, "echo": True, "n": 2, "temperature": 0}
    texts = [choice["text"] for choice in http.post("/v1/completions", json=body).json()["choices"]]
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["def add("] * 2 + ["The cat"] * 2, strict=True)]
    assert all(text.startswith(prompts[i // 2]) for i, text in enumerate(texts))
    tokens = http.post("/v1/completions", json=body | {"prompt": [[3, 4]], "n": 1}).json()["choices"][0]["text"]
    alone = http.post("/v1/completions", json=body | {"prompt": [[3, 4]], "n": 1, "echo": False}).json()
    assert tokens.endswith(alone["choices"][0]["text"])
    assert len(tokens) > len(alone["choices"][0]["text"])


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/v1/completions", {"n": 3, "best_of": 2}, "best_of must be at least n = 3"),
        ("/v1/completions", {"best_of": 2, "stream": True}, "best_of must be 1 as n in a stream"),
        ("/v1/completions", {"best_of": 99}, "best_of must be between 1 and 8"),
        ("/v1/completions", {"echo": True, "logprobs": 1}, "echo must come without logprobs"),
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, "stream_options must come with stream"),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, "functions is not supported: send tools"),
        ("/v1/chat/completions", {"function_call": "auto"}, "function_call is not supported: send tool_choice"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs must come with logprobs"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        ("/v1/chat/completions", {"n": 0}, "n must be between 1 and 8"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice must come with tools"),
        ("/v1/chat/completions", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice must name one of the tools"),
        ("/v1/chat/completions", {"response_format": {"type": "xml"}}, "must be text, json_object or json_schema"),
        ("/v1/chat/completions", {"logit_bias": {"x": 1}}, "logit_bias must map token ids"),
        ("/v1/chat/completions", {"logit_bias": {"999999": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"temperature": "hot"}, "temperature must be a number"),
    ],
)
def test_mistakes_are_named(http, path, change, message):
    body = (CHAT if "chat" in path else COMPLETE) | change
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_tool_choice_none_hides_the_tools(http):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    without = http.post("/v1/chat/completions", json=CHAT).json()["usage"]["prompt_tokens"]
    hidden = http.post("/v1/chat/completions", json=CHAT | {"tools": [tool], "tool_choice": "none"}).json()
    shown = http.post("/v1/chat/completions", json=CHAT | {"tools": [tool]}).json()
    assert hidden["usage"]["prompt_tokens"] == without < shown["usage"]["prompt_tokens"]


def test_json_object(http):
    body = CHAT | {"response_format": {"type": "json_object"}, "max_tokens": 300, "seed": 2, "temperature": 1}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)
    assert choice["message"]["content"].lstrip().startswith("{")


def test_drafts_are_counted_and_can_be_switched_off(http):
    drafted = http.post("/v1/chat/completions", json=CHAT).json()
    plain = http.post("/v1/chat/completions", json=CHAT | {"draft_num_predict": 0}).json()
    assert drafted["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0
    assert drafted["choices"][0]["message"]["content"] == plain["choices"][0]["message"]["content"]


def test_reused_prompts_are_counted(http):
    text = "A sentence that no other test asks about. " * 8
    usages = [
        http.post("/v1/completions", json=COMPLETE | {"prompt": text + tail}).json()["usage"]
        for tail in ("and one", "and two")
    ]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] < 20
    assert 30 < cached[1] < usages[1]["prompt_tokens"]


# ---- models ----


def test_num_ctx_makes_room_for_itself(tmp_path):
    words = "word " * 200
    with run_server(tmp_path, "--demo", "--no-store", "--n-ctx", "128") as server, server.client() as client:
        body = {"model": "demo", "prompt": words, "raw": True, "stream": False, "truncate": False}
        assert client.post("/api/generate", json=body | {"options": {"num_predict": 2}}).status_code == 400
        answer = client.post("/api/generate", json=body | {"options": {"num_predict": 2, "num_ctx": 512}})
        assert answer.json()["prompt_eval_count"] > 200
        assert client.get("/api/ps").json()["models"][0]["context_length"] == 512
        client.post("/api/generate", json=GENERATE | {"options": {"num_predict": 2, "num_ctx": 64}})
        assert client.get("/api/ps").json()["models"][0]["context_length"] == 512  # a smaller one fits
        client.post("/api/generate", json=GENERATE | {"options": {"num_predict": 2, "num_ctx": 10**6}})
        assert client.get("/api/ps").json()["models"][0]["context_length"] == 2048  # what it was trained for


def test_generation_goes_on_when_the_context_is_full(tmp_path):
    with run_server(tmp_path, "--demo", "--no-store", "--n-ctx", "128") as server, server.client() as client:
        options = {"num_predict": 300, "temperature": 0}
        body = {"model": "demo", "prompt": "1, 2, 3, 4,", "raw": True, "stream": False, "options": options}
        went_on = client.post("/api/generate", json=body).json()
        ended = client.post("/api/generate", json=body | {"shift": False}).json()
        small = client.post("/api/generate", json=body | {"options": options | {"num_ctx": 64}}).json()
        keeping = client.post("/api/generate", json=body | {"options": options | {"num_keep": -5}}).json()
    assert (went_on["done_reason"], went_on["eval_count"]) == ("length", 300)
    assert (ended["done_reason"], ended["eval_count"]) == ("length", 128 - ended["prompt_eval_count"])
    assert small["eval_count"] == 64 - small["prompt_eval_count"]
    assert keeping["eval_count"] == 300
    assert went_on["response"].startswith(ended["response"])
