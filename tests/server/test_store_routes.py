"""The store through the server: pulls from a stand-in of the hub, uploads, and what survives kill -9."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hub_stand_in import Hub, serve_hub
from waiting import LIMIT_S, wait_until

from .conftest import QUESTION, Server, run_server

ollama = pytest.importorskip("ollama")
pytest.importorskip("huggingface_hub")

GREEDY = {"temperature": 0, "num_predict": 20}


@pytest.fixture
def hub(tmp_path: Path, demo_target: Path, demo_drafter: Path) -> Iterator[Hub]:
    """A hub with the pair in `me/tiny`, and the drafter alone in `you/heads`."""
    for repo, file, source in (
        ("me/tiny", "tiny-Q8_0.gguf", demo_target),
        ("me/tiny", "tiny-dspark-Q8_0.gguf", demo_drafter),
        ("me/bare", "bare-Q8_0.gguf", demo_target),
        ("you/heads", "heads.gguf", demo_drafter),
    ):
        folder = tmp_path / "hub" / repo
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / file)
    with serve_hub(tmp_path / "hub") as hub:
        yield hub


def start(tmp_path: Path, hub: Hub | None = None):
    """A server on a store of this test that outlives it."""
    return run_server(tmp_path, **({"HF_ENDPOINT": hub.url, "HF_TOKEN": ""} if hub else {}))


def digest_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def test_pull_target_and_drafter_then_chat(tmp_path: Path, hub: Hub) -> None:
    with start(tmp_path, hub) as server:
        client = ollama.Client(host=server.url)
        steps = list(client.pull("hf.co/me/tiny:Q8_0", stream=True))
        kinds = list(dict.fromkeys(step.status.split()[0] for step in steps))
        assert kinds == ["pulling", "verifying", "writing", "success"]
        bars = [step for step in steps if step.digest]
        assert {step.total for step in bars} == {
            path.stat().st_size for path in (tmp_path / "hub" / "me" / "tiny").iterdir()
        }
        assert all(0 <= step.completed <= step.total for step in bars)
        body = {"model": "me/tiny:q8_0", "prompt": QUESTION, "options": GREEDY, "stream": False}
        answer = httpx.post(f"{server.url}/api/generate", json=body, timeout=LIMIT_S).json()
        assert answer["eval_count"] == 20
        assert answer["dspark"]["n_accepted"] > 0  # its drafter came along
        assert client.pull("me/tiny:Q8_0").status == "success"  # there already; one object without a stream


def test_pull_with_the_drafter_of_another_repository(tmp_path: Path, hub: Hub) -> None:
    with start(tmp_path, hub) as server, server.client() as client:
        body = {"model": "me/bare", "draft": "you/heads:heads.gguf", "stream": False}
        assert client.post("/api/pull", json=body).json() == {"status": "success"}
        body = {"model": "me/bare", "prompt": QUESTION, "stream": False, "options": GREEDY}
        assert client.post("/api/generate", json=body).json()["dspark"]["n_accepted"] > 0


def test_failed_pulls_are_told(tmp_path: Path, hub: Hub) -> None:
    with start(tmp_path, hub) as server, server.client() as client:
        lines = client.post("/api/pull", json={"model": "no/body"}).text.splitlines()
        assert "has no repository no/body" in json.loads(lines[-1])["error"]
        answer = client.post("/api/pull", json={"model": "no/body", "stream": False})
        assert (answer.status_code, "has no repository" in answer.json()["error"]) == (400, True)
        answer = client.post("/api/pull", json={"model": "llama3"})
        assert (answer.status_code, "must be a repository of the hub" in answer.text) == (400, True)
        assert client.get("/api/tags").json()["models"] == []


def read_until(lines: Iterator[str], n_bytes: int, hub: Hub) -> None:
    """Read a pull's records until this much has come; the rest would take half a minute from then on."""
    while json.loads(next(lines)).get("completed", 0) <= n_bytes:
        pass
    hub.faults.seconds_per_chunk = 0.25


def test_a_client_that_leaves_stops_its_pull(tmp_path: Path, hub: Hub) -> None:
    hub.faults.seconds_per_chunk = 0.02
    with start(tmp_path, hub) as server, server.client() as client:
        with client.stream("POST", "/api/pull", json={"model": "me/tiny"}) as answer:
            read_until(answer.iter_lines(), 1_000_000, hub)
        wait_until(lambda: hub.n_left > 0)
        assert client.get("/health").status_code == 200


def test_pull_goes_on_after_kill_9(tmp_path: Path, hub: Hub) -> None:
    hub.faults.seconds_per_chunk = 0.02
    with start(tmp_path, hub) as server:
        with server.client() as client, client.stream("POST", "/api/pull", json={"model": "me/tiny"}) as answer:
            lines = answer.iter_lines()
            read_until(lines, 3_000_000, hub)
            server.process.kill()
            with pytest.raises(httpx.HTTPError):
                list(lines)
        server.process.wait()
    hub.faults.seconds_per_chunk = 0
    hub.ranges.clear()
    with start(tmp_path, hub) as server, server.client() as client:
        assert client.get("/api/tags").json()["models"] == []
        assert client.post("/api/pull", json={"model": "me/tiny", "stream": False}).json() == {"status": "success"}
        assert int(str(hub.ranges[0]).removeprefix("bytes=").removesuffix("-")) >= 2_000_000
        answer = client.post("/api/generate", json={"model": "me/tiny", "prompt": "x", "options": {"num_predict": 2}})
        assert answer.status_code == 200


def test_upload_cut_by_kill_9_leaves_nothing_half(tmp_path: Path, demo_target: Path) -> None:
    data, digest = demo_target.read_bytes(), digest_of(demo_target)
    with start(tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
            connection.sendall(head.encode() + data[: len(data) // 2])
            time.sleep(0.5)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
    with start(tmp_path) as server:
        client = ollama.Client(host=server.url)
        with server.client() as http:
            assert http.head(f"/api/blobs/{digest}").status_code == 404
        assert client.create_blob(demo_target) == digest
        client.create(model="whole", files={"t.gguf": digest})
        assert client.generate("whole", QUESTION, options=GREEDY).eval_count == 20


def create_until_it_ends(url: str) -> None:
    """Make the model anew and anew."""
    with contextlib.suppress(httpx.HTTPError):
        while True:
            body = {"model": "m", "from": "m", "system": "new", "stream": False}
            httpx.post(f"{url}/api/create", json=body, timeout=LIMIT_S).raise_for_status()


def test_create_cut_by_kill_9_leaves_the_old_or_the_new_model(tmp_path: Path, demo_target: Path) -> None:
    digest = digest_of(demo_target)
    with start(tmp_path) as server:
        client = ollama.Client(host=server.url)
        client.create_blob(demo_target)
        client.create(model="m", files={"t.gguf": digest}, system="old")
    for seconds in (0.0, 0.002, 0.005, 0.01, 0.02):
        with start(tmp_path) as server:
            thread = threading.Thread(target=create_until_it_ends, args=(server.url,))
            thread.start()
            time.sleep(0.1 + seconds)
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            thread.join()
        with start(tmp_path) as server, server.client() as http:
            assert http.post("/api/show", json={"model": "m"}).json()["system"] in ("old", "new")


def test_damaged_blobs_cost_their_model_only(tmp_path: Path, demo_target: Path) -> None:
    digest = digest_of(demo_target)
    with run_server(tmp_path, "--demo") as server, server.client() as client:
        ours = ollama.Client(host=server.url)
        ours.create_blob(demo_target)
        ours.create(model="m", files={"t.gguf": digest})
        [blob] = (tmp_path / "models" / "blobs").iterdir()
        for spoil in (lambda: blob.write_bytes(b"GGUF"), blob.unlink):
            spoil()
            answer = client.post("/api/generate", json={"model": "m", "prompt": "x"})
            assert answer.status_code in (400, 500)
            assert "remove the model and fetch it again" in answer.json()["error"]
        assert client.post(
            "/api/generate", json={"model": "demo", "prompt": "x", "options": {"num_predict": 1}}
        ).is_success
        assert client.request("DELETE", "/api/delete", json={"model": "m"}).status_code == 200


def test_old_name_field(http: httpx.Client, server: Server) -> None:
    assert http.post("/api/show", json={"name": "demo"}).json()["details"]["family"] == "qwen3"


def test_commands_and_server_share_the_store(tmp_path: Path, demo_target: Path, demo_drafter: Path) -> None:
    with start(tmp_path) as server, server.client() as client:

        def dspark(*arguments: object) -> str:
            env = {**os.environ, "OLLAMA_HOST": server.url, "DSPARK_MODELS": str(tmp_path / "models")}
            command = [sys.executable, "-m", "dspark_cpp.cli", *map(str, arguments)]
            return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

        dspark("create", "mine", "--target", demo_target, "--draft", demo_drafter, "--system", "Be brief.")
        body = {
            "model": "mine",
            "messages": [{"role": "user", "content": QUESTION}],
            "options": GREEDY,
            "stream": False,
        }
        assert client.post("/api/chat", json=body).json()["dspark"]["n_accepted"] > 0
        assert "mine:latest" in dspark("list")
        assert "mine:latest" in dspark("ps")
        assert "Be brief." in dspark("show", "mine")
        dspark("stop", "mine")
        assert len(dspark("ps").splitlines()) == 1
        dspark("cp", "mine", "ours")
        dspark("rm", "mine")
        assert client.post("/api/chat", json=body).status_code == 404
        assert client.post("/api/chat", json=body | {"model": "ours"}).status_code == 200
