"""How it is run: HTTPS, key files, JSON logs, two models side by side, clients that dawdle, text to fill in."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from conftest import rewrite
from waiting import LIMIT_S, wait_until

from .conftest import QUESTION, run_server

GENERATE = {"model": "demo", "prompt": QUESTION, "stream": False, "options": {"temperature": 0, "num_predict": 8}}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_https(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    arguments = ("--demo", "--no-store", "--tls-certificate", str(certificate), "--tls-key", str(key))
    with run_server(tmp_path, *arguments) as server:
        assert server.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=server.url, verify=trusted, timeout=LIMIT_S) as client:
            assert client.post("/api/generate", json=GENERATE).json()["eval_count"] == 8
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(server.url, timeout=LIMIT_S)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(server.url.replace("https", "http"), timeout=LIMIT_S)
        ollama = pytest.importorskip("ollama")
        assert ollama.Client(host=server.url, verify=trusted).generate("demo", QUESTION).done


def test_key_from_a_file_and_logs_in_json(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    arguments = ("--demo", "--no-store", "--api-key-file", str(tmp_path / "key"), "--log-format", "json")
    with run_server(tmp_path, *arguments) as server, server.client() as client:
        assert client.post("/api/generate", json=GENERATE).status_code == 401
        client.headers["Authorization"] = "Bearer s3cret"
        assert client.post("/api/generate", json=GENERATE).status_code == 200
        wait_until(lambda: '"status": 200' in server.log.read_text())  # written when the answer has been sent
        entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    [entry] = [one for one in entries if one.get("status") == 200]
    assert (entry["path"], entry["model"], entry["tokens"], entry["finish"]) == (
        "/api/generate",
        "demo:latest",
        8,
        "length",
    )
    assert entry["drafted"] >= entry["scheduled"] >= entry["accepted"] > 0
    assert "s3cret" not in server.log.read_text()
    assert "12 + 7" not in server.log.read_text()


def test_two_models_answer_at_the_same_time(tmp_path: Path, demo_target: Path) -> None:
    arguments = ("--demo", "--no-store", "--model", str(demo_target), "--name", "plain")
    with run_server(tmp_path, *arguments) as server:
        texts: dict[str, list[str]] = {"demo": [], "plain": []}

        def ask(name: str) -> None:
            answer = httpx.post(f"{server.url}/api/generate", json=GENERATE | {"model": name}, timeout=LIMIT_S)
            texts[name].append(answer.json()["response"])

        threads = [threading.Thread(target=ask, args=(name,)) for name in texts for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(found) for found in texts.values()] == [6, 6]
        assert len({text for found in texts.values() for text in found}) == 1  # the target defines the text
        with server.client() as client:
            names = [model["name"] for model in client.get("/api/ps").json()["models"]]
        assert sorted(names) == ["demo:latest", "plain:latest"]


@pytest.mark.slow
def test_clients_that_dawdle_are_hung_up_on(server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    starts = {b"POST /api/generate HTTP/1.1\r\nHost: loc": 15, b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\n"
              b"Content-Length: 100\r\n\r\n{": 30}  # fmt: skip
    for start, seconds in starts.items():
        with socket.create_connection((host, int(port))) as connection:
            begin = time.monotonic()
            connection.settimeout(LIMIT_S)
            connection.sendall(start)
            answer = connection.recv(1000)
            assert answer == b"" or b" 408 " in answer
            assert time.monotonic() - begin > seconds - 2


def test_text_is_filled_in_where_the_model_can(tmp_path: Path, demo_target: Path) -> None:
    marks = dict(zip(("pre", "suf", "mid"), (100, 101, 102), strict=True))  # any tokens will do
    keys = {f"tokenizer.ggml.fim_{name}_token_id": token for name, token in marks.items()}
    path = rewrite(demo_target, tmp_path / "fim.gguf", keys)
    from dspark_cpp import _core

    model = _core.Model.load_target(str(path))
    prefix, suffix = "def add(a, b):\n    return", "\n\nprint(add(1, 2))"
    parts = [model.tokenize(text, add_special=False, parse_special=False) for text in (prefix, suffix)]
    tokens = [marks["pre"], *parts[0], marks["suf"], *parts[1], marks["mid"]]
    with run_server(tmp_path, "--model", str(path), "--no-store") as server, server.client() as client:
        assert "insert" in client.post("/api/show", json={"model": "fim"}).json()["capabilities"]
        body = GENERATE | {"model": "fim", "prompt": prefix, "suffix": suffix}
        found = client.post("/api/generate", json=body).json()
        assert found["prompt_eval_count"] == len(tokens)
        body = {"model": "fim", "max_tokens": 8, "temperature": 0}
        by_tokens = client.post("/v1/completions", json=body | {"prompt": tokens}).json()["choices"][0]["text"]
        by_suffix = client.post("/v1/completions", json=body | {"prompt": prefix, "suffix": suffix}).json()
        assert found["response"] == by_tokens == by_suffix["choices"][0]["text"] != ""
