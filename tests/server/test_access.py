"""What must not come in: other hosts and origins, missing keys, bodies that are too large, deep or slow, bad names."""

from __future__ import annotations

import socket
import time

import httpx
import pytest

from .conftest import Server, run_server

ASK = {"model": "demo", "prompt": "x", "options": {"num_predict": 1}, "stream": False}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server with a key and an origin of its own."""
    folder = tmp_path_factory.mktemp("guarded")
    with run_server(
        folder, "--demo", "--no-store", "--origins", "https://ours.example", DSPARK_API_KEY="s3cret"
    ) as one:
        yield one


@pytest.mark.parametrize("host", ["evil.example", "evil.example:11434", "8.8.8.8", "localhost.evil.example"])
def test_foreign_hosts_are_refused(http, host):
    for path in ("/", "/api/tags", "/v1/models"):
        assert http.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:11434", "127.0.0.1", "[::1]:80", "box.local", "192.168.0.7:11434"])
def test_own_hosts_are_accepted(http, host):
    assert http.get("/api/version", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("app://obsidian.md", 200),
        ("https://evil.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_origins(http, origin, status):
    answer = http.post("/api/generate", json=ASK, headers={"Origin": origin})
    assert answer.status_code == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


def test_preflight_is_answered(http):
    headers = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    headers["Access-Control-Request-Headers"] = "content-type, x-stainless-os"
    answer = http.options("/api/chat", headers=headers)
    assert answer.status_code == 204
    assert "x-stainless-os" in answer.headers["access-control-allow-headers"]


def test_key_is_needed(guarded):
    with guarded.client() as client:
        assert client.get("/").status_code == 200
        assert client.get("/health").status_code == 200
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "s3cret"},
            {"Authorization": "Basic s3cret"},
        ):
            for path in ("/api/tags", "/v1/models", "/metrics"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/api/tags", headers={"Authorization": "Bearer s3cret"}).status_code == 200
        ours = {"Origin": "https://ours.example", "Authorization": "Bearer s3cret"}
        assert client.get("/api/tags", headers=ours).headers["access-control-allow-origin"] == "https://ours.example"
    assert "s3cret" not in guarded.log.read_text()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'"x"', 400),
        (b'{"model": NaN}', 400),
        (b'{"model": "demo", "prompt": "\\ud800"}', 400),
        (b'{"model": "demo", "options": {"seed": 1' + b"0" * 5000 + b"}}", 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400),
        (b"[" * 200_000, 400),
        (b'{"model": "demo", "prompt": "' + b"x" * (33 * 2**20) + b'"}', 413),
        (b"\xff\xfe", 400),
    ],
)
@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/v1/chat/completions", "/api/show"])
def test_bad_bodies_are_refused(http, path, body, status):
    answer = http.post(path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"]


def test_deep_and_wide_schemas_are_refused(http):
    deep: dict = {"type": "object"}
    for _ in range(30):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    for schema in (deep, wide):
        answer = http.post("/api/generate", json=ASK | {"format": schema})
        assert answer.status_code == 400
        assert "format must" in answer.json()["error"]


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"pattern": "^(((", "type": "string"}, {"$ref": "#/nowhere"},
                                    {"type": "string", "maxLength": 10**9}, {"type": "array", "minItems": 10**6},
                                    {"type": "array", "items": {}, "minItems": 5, "maxItems": 2},
                                    {"type": "string", "minLength": 5, "maxLength": 2}])  # fmt: skip
def test_impossible_schemas_end_in_an_answer(server, http, schema):
    secret = {"description": "purple elephants", "const": "purple elephants"}
    schema = {"type": "object", "properties": {"purple elephants": secret, "a": schema}, "required": ["a"]}
    chat = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "stream": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for path, body in (
        ("/api/generate", ASK | {"format": schema}),
        ("/api/generate", ASK | {"format": schema, "raw": True}),
        ("/api/chat", chat | {"format": schema, "options": {"num_predict": 5}}),
        ("/v1/chat/completions", chat | {"response_format": wanted, "max_tokens": 5}),
        ("/v1/completions", {"model": "demo", "prompt": "x", "response_format": wanted, "max_tokens": 5}),
    ):
        answer = http.post(path, json=body)
        assert answer.status_code in (200, 400), path
    assert http.get("/health").status_code == 200
    assert "elephants" not in server.log.read_text()  # neither by us nor by llama.cpp


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "a\u0000b", "x" * 5000, "evil.example/a/b", "a:../b", ""],
)
def test_names_cannot_leave_the_store(http, name):
    for path, body in (
        ("/api/show", {"model": name}),
        ("/api/generate", {"model": name, "prompt": "x"}),
        ("/api/pull", {"model": name}),
        ("/api/create", {"model": name, "from": "demo"}),
        ("/api/copy", {"source": "demo", "destination": name}),
        ("/api/copy", {"source": name, "destination": "x"}),
        ("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
    ):
        assert http.post(path, json=body).status_code in (400, 404), path
    assert http.request("DELETE", "/api/delete", json={"model": name}).status_code in (400, 404)


@pytest.mark.parametrize("digest", ["..%2f..%2fx", "sha256:zz", "sha256-" + "g" * 64, "md5:" + "0" * 32, "x"])
def test_digests_cannot_leave_the_store(http, digest):
    assert http.head(f"/api/blobs/{digest}").status_code in (400, 404)
    assert http.post(f"/api/blobs/{digest}", content=b"x").status_code in (400, 404)


def test_blobs_must_be_what_they_are_called(http):
    digest = "sha256:" + "0" * 64
    answer = http.post(f"/api/blobs/{digest}", content=b"other bytes")
    assert answer.status_code == 400
    assert http.head(f"/api/blobs/{digest}").status_code == 404


def test_create_takes_no_paths(http, demo_target):
    for body in (
        {"model": "p", "from": str(demo_target)},
        {"model": "p", "modelfile": f"FROM {demo_target}"},
        {"model": "p", "files": {"a.gguf": str(demo_target)}},
    ):
        answer = http.post("/api/create", json=body | {"stream": False})
        assert answer.status_code in (400, 404)


def test_models_of_the_command_line_cannot_be_changed(http):
    assert http.request("DELETE", "/api/delete", json={"model": "demo"}).status_code == 400
    assert http.post("/api/create", json={"model": "demo", "from": "demo"}).status_code == 400


def test_unfinished_headers_do_not_stop_others(server: Server, http):
    host, port = server.url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port))) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"POST /api/generate HTTP/1.1\r\nHost: loc")
    for _ in range(5):  # a busy machine may stand still now and then; they are hung up on after 15 s
        begin = time.monotonic()
        assert http.post("/api/generate", json=ASK).status_code == 200
        if time.monotonic() - begin < 10:
            break
    assert time.monotonic() - begin < 10
    for connection in slow:
        connection.close()


def test_methods_and_paths_that_do_not_exist(http):
    assert http.get("/api/chat").status_code == 405
    assert http.get("/nowhere").status_code == 404
    assert http.get("/v1/nowhere").json()["error"]["type"] == "not_found_error"


def test_greeting(http):
    assert http.get("/").text == "Ollama is running"
    assert http.head("/").status_code == 200
    assert http.get("/api/version").json()["version"].replace(".", "").isdecimal()


def test_page_has_its_headers(http):
    page = http.get("/", headers={"Accept": "text/html"})
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<html" in page.text
    assert http.get("/web/app.js").headers["x-content-type-options"] == "nosniff"
    assert http.get("/web/../app.py").status_code == 404
    assert http.get("/web/%2e%2e/app.py").status_code == 404


def test_nothing_of_a_prompt_is_logged(server: Server, http):
    secret = "purple elephants at midnight"
    http.post("/api/generate", json=ASK | {"prompt": secret})
    http.post(
        "/v1/chat/completions",
        json={"model": "demo", "messages": [{"role": "user", "content": secret}], "max_tokens": 2},
    )
    http.post("/api/chat", json={"model": "demo", "messages": [{"role": "user", "content": secret}], "think": True})
    text = server.log.read_text()
    assert "path=/api/generate" in text
    assert "elephants" not in text
    assert isinstance(httpx.get(f"{server.url}/metrics").text, str)
