"""Real use: clients that leave, a full queue, time limits, models that come and go, the end of the server."""

from __future__ import annotations

import json
import signal
import threading
import time

import httpx
import pytest
from waiting import LIMIT_S, wait_until

from .conftest import ENDLESS, QUESTION, run_server


def test_leaving_a_stream_cancels(server, http):
    with http.stream("POST", "/api/generate", json=ENDLESS) as answer:
        lines = answer.iter_lines()  # kept: without it the stream is closed
        next(lines)
        assert server.n_busy >= 1
    wait_until(lambda: server.n_busy == 0)


def test_leaving_before_the_answer_cancels(server, http):
    for body in (ENDLESS | {"stream": False}, ENDLESS | {"prompt": "word " * 400, "stream": False}):
        n_left = server.log.read_text().count("status=499")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/api/generate", json=body, timeout=httpx.Timeout(LIMIT_S, read=0.15))
        wait_until(lambda n_left=n_left: server.log.read_text().count("status=499") > n_left)
        wait_until(lambda: server.n_busy == 0)


def test_many_at_once_answer_as_alone(server, http):
    questions = [f"What is {i} + 7?" for i in range(12)]

    def ask(question):
        body = {"model": "demo", "messages": [{"role": "user", "content": question}], "stream": False}
        body["options"] = {"temperature": 0, "num_predict": 24}
        return httpx.post(f"{server.url}/api/chat", json=body, timeout=LIMIT_S).json()["message"]["content"]

    alone = [ask(question) for question in questions]
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: ask(questions[i])})) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    n_same = sum(together[i] == alone[i] for i in range(12))
    assert n_same >= 10  # quantized weights: a tie may fall the other way in another batch


def test_dspark_figures_are_shown_on_request(http):
    body = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "dspark": True}
    body["options"] = {"temperature": 0, "num_predict": 30}
    lines = [json.loads(line) for line in http.post("/api/chat", json=body).text.splitlines()]
    for line in lines[:-1]:
        assert "".join(line["dspark"]["tokens"]) == line["message"]["content"]
        assert len(line["dspark"]["tokens"]) == len(line["dspark"]["drafted"])
    assert sum(len(line["dspark"]["tokens"]) for line in lines[:-1]) == 30
    last = lines[-1]["dspark"]
    assert last["n_accepted"] == sum(last["accepted_per_position"]) > 0
    assert sum(flag for line in lines[:-1] for flag in line["dspark"]["drafted"]) == pytest.approx(
        last["n_accepted"], abs=1
    )
    plain = [json.loads(line) for line in http.post("/api/chat", json=body | {"dspark": False}).text.splitlines()]
    assert all("dspark" not in line for line in plain[:-1])


def test_metrics_tell_of_speculation(server, http):
    http.post("/api/generate", json=ENDLESS | {"options": {"num_predict": 20, "temperature": 0}, "stream": False})
    figures = server.metrics
    for name in (
        "dspark_rounds_total",
        "dspark_draft_tokens_total",
        "dspark_scheduled_rounds_total",
        "dspark_cache_share",
    ):
        assert any(key.startswith(name) for key in figures), name
    assert figures['dspark_tokens_total{kind="generated",model="demo:latest"}'] >= 20


def test_errors_after_the_beginning_are_lines(tmp_path):
    with run_server(tmp_path, "--demo", "--no-store", "--request-timeout", "0.3") as server, server.client() as client:
        client.post("/api/generate", json={"model": "demo"})  # loads it, however long that takes
        wait_until(lambda: client.get("/api/ps").json()["models"])
        lines = client.post("/api/generate", json=ENDLESS).text.splitlines()
        assert json.loads(lines[-1])["error"] == "request timed out after 0.3 s"
        whole = client.post("/api/generate", json=ENDLESS | {"stream": False})
        assert whole.status_code == 503
        assert whole.headers["retry-after"]
        numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 700}  # eight answers that are long
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "stream": True, "n": 8}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "n", "schema": numbers}}
        events = client.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: server.n_busy == 0)


def test_full_queue_is_told(tmp_path):
    arguments = ("--demo", "--no-store", "--max-queue", "2", "--n-parallel", "1")
    codes = []
    with run_server(tmp_path, *arguments) as server, server.client() as client:

        def ask():
            body = ENDLESS | {"stream": False, "options": {"num_predict": 5}}
            codes.append(httpx.post(f"{server.url}/api/generate", json=body, timeout=LIMIT_S).status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        with client.stream("POST", "/api/generate", json=ENDLESS) as answer:
            lines = answer.iter_lines()  # kept: without it the stream is closed
            next(lines)
            for thread in threads:
                thread.start()
            wait_until(lambda: server.n_busy == 3)
            refused = httpx.post(f"{server.url}/api/generate", json=ENDLESS, timeout=LIMIT_S)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]
        for thread in threads:
            thread.join()
    assert codes == [200, 200]


def test_two_models_share_a_memory_that_holds_one(tmp_path, demo_target):
    arguments = ("--demo", "--model", str(demo_target), "--name", "plain", "--no-store", "--max-memory", "0.05")
    with run_server(tmp_path, *arguments) as server, server.client() as client:
        for name in ("demo", "plain", "demo"):
            answer = client.post("/api/generate", json={"model": name, "prompt": "x", "options": {"num_predict": 3}})
            assert answer.status_code == 200
            running = [model["name"] for model in client.get("/api/ps").json()["models"]]
            assert running == [f"{name}:latest"]


def test_models_leave_after_their_time(tmp_path):
    with run_server(tmp_path, "--demo", "--no-store", "--keep-alive", "300ms") as server, server.client() as client:
        client.post("/api/generate", json={"model": "demo", "prompt": "x", "options": {"num_predict": 2}})
        wait_until(lambda: client.get("/api/ps").json()["models"] == [])
        client.post(
            "/api/generate", json={"model": "demo", "prompt": "x", "keep_alive": -1, "options": {"num_predict": 2}}
        )
        time.sleep(0.6)
        assert len(client.get("/api/ps").json()["models"]) == 1


def test_first_signal_drains(tmp_path):
    with run_server(tmp_path, "--demo", "--no-store", "--drain-timeout", "600") as server:
        lines = []

        def read():
            body = ENDLESS | {"options": {"num_predict": 150}}
            with server.client() as client, client.stream("POST", "/api/generate", json=body) as answer:
                lines.extend(answer.iter_lines())

        thread = threading.Thread(target=read)
        thread.start()
        wait_until(lambda: server.n_busy or lines)
        server.process.send_signal(signal.SIGTERM)
        thread.join(LIMIT_S)
        assert json.loads(lines[-1])["done"]
        assert server.process.wait(LIMIT_S) == 0


def test_second_signal_stops(tmp_path):
    with (
        run_server(tmp_path, "--demo", "--no-store", "--drain-timeout", "600") as server,
        server.client() as client,
        client.stream("POST", "/api/generate", json=ENDLESS) as answer,
    ):
        lines = answer.iter_lines()  # kept: without it the stream is closed
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "no new requests" in server.log.read_text())
        time.sleep(0.3)  # sooner it counts as the same one
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 130
