"""A hub of models on this machine: what huggingface_hub asks for, over real HTTP, with the faults of real networks.

Run as a program, `python tests/hub_stand_in.py FOLDER`, it serves `FOLDER/owner/repo/file` and prints its address.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
_CHUNK_BYTES = 1 << 16


@dataclass
class Faults:
    """What goes wrong; all off at first."""

    seconds_per_chunk: float = 0.0
    drop_after_bytes: int | None = None
    ignores_range: bool = False
    wrong_bytes: bool = False
    status: int | None = None


@dataclass
class Hub:
    """The running stand-in."""

    url: str = ""
    folder: Path = Path()
    faults: Faults = field(default_factory=Faults)
    ranges: list[str | None] = field(default_factory=list)
    n_bytes_sent: int = 0
    n_left: int = 0  # clients that hung up in the middle of a file
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, n_bytes: int) -> None:
        """Count what is about to be sent: whoever has received it finds it counted."""
        with self.lock:
            self.n_bytes_sent += n_bytes


class Handler(BaseHTTPRequestHandler):
    """Answers like the hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.*)?", path):
            self.send_listing(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.send_model_file(self.hub.folder / match[1] / match[3], with_body)
        else:
            self.send_json(404, {"error": "not found"})

    def send_json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_listing(self, repo: str) -> None:
        folder = self.hub.folder / repo
        if not folder.is_dir():
            self.send_json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [describe(path, str(path.relative_to(folder))) for path in files]
        self.send_json(
            200, {"_id": "1", "id": repo, "modelId": repo, "sha": REVISION, "siblings": siblings, "tags": []}
        )

    def send_model_file(self, path: Path, with_body: bool) -> None:
        faults = self.hub.faults
        if faults.status is not None or not path.is_file():
            self.send_json(faults.status or 404, {"error": "no"})
            return
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if faults.wrong_bytes:
            data = data[:-1] + bytes([data[-1] ^ 1])
        asked = None if faults.ignores_range else self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if with_body:
            self.hub.ranges.append(self.headers.get("Range"))
            self.send_slowly(data[start:])

    def send_slowly(self, data: bytes) -> None:
        faults, n_sent = self.hub.faults, 0
        for pos in range(0, len(data), _CHUNK_BYTES):
            if faults.drop_after_bytes is not None and n_sent >= faults.drop_after_bytes:
                self.close_connection = True
                return
            chunk = data[pos : pos + _CHUNK_BYTES]
            n_sent += len(chunk)
            self.hub.count(len(chunk))
            try:
                self.wfile.write(chunk)
            except OSError:
                self.close_connection = True
                self.hub.n_left += 1
                return
            time.sleep(faults.seconds_per_chunk)


def describe(path: Path, name: str) -> dict[str, object]:
    data = path.read_bytes()
    found: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if path.suffix == ".gguf":
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    """Serve a folder of `owner/repo/file` while the `with` block runs."""
    hub = Hub(folder=folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve_hub(Path(sys.argv[1])) as running:
        print(running.url, flush=True)
        threading.Event().wait()
