"""Models that change while they answer, and changes that meet: whoever was let in gets a whole answer."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hub_stand_in import Hub, serve_hub
from waiting import LIMIT_S

from .conftest import Server, run_server

ollama = pytest.importorskip("ollama")
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 700}  # an answer that is long for certain
N_TOKENS = 400


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, demo_target: Path, demo_drafter: Path
) -> Iterator[tuple[Server, Hub]]:
    """A server with a store and a hub that has the pair."""
    folder = tmp_path_factory.mktemp("in_use")
    (folder / "hub" / "me" / "tiny").mkdir(parents=True)
    shutil.copy(demo_target, folder / "hub" / "me" / "tiny" / "tiny-Q8_0.gguf")
    shutil.copy(demo_drafter, folder / "hub" / "me" / "tiny" / "tiny-dspark-Q8_0.gguf")
    with serve_hub(folder / "hub") as hub, run_server(folder, "--demo", HF_ENDPOINT=hub.url, HF_TOKEN="") as server:
        yield server, hub


def during_an_answer(server: Server, name: str, act: Callable[[], Any]) -> dict[str, Any]:
    """Do something when the first token has come; return the answer's last object."""
    options = {"num_predict": N_TOKENS, "temperature": 0}
    body = {"model": name, "prompt": "Count.", "raw": True, "format": NUMBERS, "options": options}
    with server.client() as client, client.stream("POST", "/api/generate", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        act()
        last: dict[str, Any] = json.loads(list(lines)[-1])
    return last


def make(server: Server, name: str, **recipe: Any) -> None:
    ollama.Client(host=server.url).create(model=name, from_="demo", **recipe)


def test_deleted_while_it_answers(shop: tuple[Server, Hub]) -> None:
    server, _ = shop
    make(server, "gone")
    last = during_an_answer(server, "gone", lambda: ollama.Client(host=server.url).delete("gone"))
    assert (last["done_reason"], last["eval_count"]) == ("length", N_TOKENS)
    with server.client() as client:
        assert client.post("/api/generate", json={"model": "gone", "prompt": "x"}).status_code == 404


def test_replaced_while_it_answers(shop: tuple[Server, Hub]) -> None:
    server, _ = shop
    make(server, "new")
    last = during_an_answer(server, "new", lambda: make(server, "new", parameters={"num_predict": 3}))
    assert last["eval_count"] == N_TOKENS
    with server.client() as client:
        answer = client.post("/api/generate", json={"model": "new", "prompt": "Count.", "stream": False}).json()
        assert answer["eval_count"] <= 3


def test_unloaded_while_it_answers(shop: tuple[Server, Hub]) -> None:
    server, _ = shop
    unload = {"model": "demo", "keep_alive": 0}
    with server.client() as other:
        last = during_an_answer(server, "demo", lambda: other.post("/api/generate", json=unload))
    assert last["eval_count"] == N_TOKENS


def test_pulls_of_one_name_at_once_fetch_it_once(shop: tuple[Server, Hub]) -> None:
    server, hub = shop
    hub.faults.seconds_per_chunk = 0.002
    statuses: list[str] = []

    def pull() -> None:
        answer = httpx.post(f"{server.url}/api/pull", json={"model": "me/tiny"}, timeout=LIMIT_S)
        statuses.append(json.loads(answer.text.splitlines()[-1])["status"])

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == ["success"] * 4
    assert hub.n_bytes_sent == sum(path.stat().st_size for path in (hub.folder / "me" / "tiny").iterdir())


def test_blobs_that_come_and_go_are_told(shop: tuple[Server, Hub], demo_target: Path) -> None:
    """The last name goes with its blob: who comes too late is told so, and the server is never at fault."""
    server, _ = shop
    data = demo_target.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    found: list[str] = []

    def change(i: int) -> None:
        with server.client() as client:
            for n in range(5):
                client.post(f"/api/blobs/{digest}", content=data).raise_for_status()
                body = {"model": "brief", "files": {"t": digest}, "system": f"{i} {n}", "stream": False}
                generate = {"model": "brief", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
                for answer in (
                    client.post("/api/create", json=body),
                    client.post("/api/show", json={"model": "brief"}),
                    client.post("/api/generate", json=generate),
                    client.request("DELETE", "/api/delete", json={"model": "brief"}),
                    client.get("/api/tags"),
                ):
                    found.append(answer.text)

    threads = [threading.Thread(target=change, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [text for text in found if "internal server error" in text] == []


def test_changes_of_one_name_at_once_leave_one_of_them(shop: tuple[Server, Hub]) -> None:
    server, _ = shop
    codes: list[int] = []

    def change(i: int) -> None:
        with server.client() as client:
            for n in range(5):
                body = {"model": "busy", "from": "demo", "system": f"{i} {n}", "stream": False}
                codes.append(client.post("/api/create", json=body).status_code)
                codes.append(client.request("DELETE", "/api/delete", json={"model": "busy"}).status_code)
                codes.append(client.post("/api/copy", json={"source": "demo", "destination": "busy"}).status_code)
                body = {"model": "busy", "prompt": "x", "stream": False, "options": {"num_predict": 2}}
                codes.append(client.post("/api/generate", json=body).status_code)

    threads = [threading.Thread(target=change, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 404}  # deleted by another one in between
    make(server, "busy", system="last")
    assert ollama.Client(host=server.url).show("busy").modelfile.count("last") == 1


def test_files_that_are_no_models_are_the_clients_mistake(
    shop: tuple[Server, Hub], tmp_path: Path, demo_drafter: Path
) -> None:
    server, _ = shop
    client = ollama.Client(host=server.url)
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    for path in (tmp_path / "no.gguf", demo_drafter):  # no model at all; one, but no target
        body = {"model": "no", "files": {"no.gguf": client.create_blob(path)}, "stream": False}
        answer = httpx.post(f"{server.url}/api/create", json=body, timeout=LIMIT_S)
        assert answer.status_code == 400
        assert answer.json()["error"]
