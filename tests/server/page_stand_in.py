"""A small server for the chat page alone: its files under the real headers, two models, an answer at a chosen speed.

Run as a program it serves on a free port and prints the address, for looking at the page while working on it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WEB = Path(__file__).parents[2] / "python" / "dspark_cpp" / "server" / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MODELS = [
    {"name": "hf.co/owner/Qwen3-8B-GGUF:Q4_K_M", "details": {"parameter_size": "8.2B", "quantization_level": "Q4_K_M"}},
    {"name": "demo:latest", "details": {"parameter_size": "8.40M", "quantization_level": "Q8_0"}},
]
SPEEDS = {"tokens_per_second": 36.0, "plain_tokens_per_second": 24.0}  # the engine's, whatever this stream's is
ANSWER = """A whale is the **largest animal** on Earth. Whales live in the sea, but they are not fish: they breathe \
air, and their young drink milk.

There are two groups:

- Baleen whales filter small animals out of the water.
- Toothed whales hunt fish and squid.

```python
def reverse(items):
    return items[::-1]  # <b>no HTML</b>
```

Use `reverse([1, 2, 3])` to try it. A blue whale's heart weighs about as much as a small car.
"""


@dataclass
class Page:
    """The running stand-in, what it was asked and how it answers."""

    url: str = ""
    answer: str = ANSWER
    seconds_per_round: float = 0.04
    key: str | None = None
    status: int = 200
    models: list[dict[str, Any]] = field(default_factory=lambda: list(MODELS))
    chats: list[dict[str, Any]] = field(default_factory=list)
    n_cancelled: int = 0


def rounds_of(text: str) -> Iterator[tuple[list[str], list[bool]]]:
    """Cut a text into words and these into rounds of up to seven accepted drafts and one word of the target."""
    words = [word for word in text.replace(" ", "\x00 ").replace("\n", "\x00\n").split("\x00") if word]
    lengths = [3, 1, 5, 0, 7, 2, 4, 2, 6, 1]
    i = n = 0
    while i < len(words):
        tokens = words[i : i + lengths[n % len(lengths)] + 1]
        yield tokens, [True] * (len(tokens) - 1) + [False]
        i += len(tokens)
        n += 1


class Handler(BaseHTTPRequestHandler):
    """Answers as far as the page asks."""

    page: Page

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = {"/": "index.html"}.get(self.path, self.path.removeprefix("/web/"))
        if self.path == "/" or (self.path.startswith("/web/") and name in {path.name for path in WEB.iterdir()}):
            self.send_bytes(200, TYPES[Path(name).suffix], (WEB / name).read_bytes())
        elif not self.is_allowed():
            self.send_json(401, {"error": "invalid API key"})
        elif self.path == "/api/tags":
            self.send_json(200, {"models": self.page.models})
        elif self.path == "/api/version":
            self.send_json(200, {"version": "0.1.0"})
        else:
            self.send_json(404, {"error": "not found"})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.page.status != 200:
            self.send_json(self.page.status, {"error": "the queue is full, try again later"})
            return
        self.page.chats.append(request)
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()
        try:
            self.send_answer(drafts=request.get("options", {}).get("draft_num_predict") != 0)
        except OSError:
            self.page.n_cancelled += 1

    def is_allowed(self) -> bool:
        return self.page.key is None or self.headers.get("Authorization") == f"Bearer {self.page.key}"

    def send_answer(self, drafts: bool) -> None:
        began, n_tokens, n_rounds = time.monotonic(), 0, 0
        accepted = [0] * 7
        for tokens, drafted in rounds_of(self.page.answer):
            for part in [(tokens, drafted)] if drafts else [([token], [False]) for token in tokens]:
                self.send_line({"message": {"role": "assistant", "content": "".join(part[0])}, "done": False}, part)
                time.sleep(self.page.seconds_per_round)
                n_tokens += len(part[0])
                n_rounds += 1
                for k in range(len(part[0]) - 1):
                    accepted[k] += 1
        scheduled = [min(n_rounds, n + n_rounds // 6) for n in accepted] if drafts else []
        figures = {
            "n_rounds": n_rounds,
            "n_drafted": 7 * n_rounds if drafts else 0,
            "n_scheduled": sum(scheduled),
            "n_accepted": sum(accepted),
            "accepted_length": n_tokens / max(n_rounds, 1),
            "policy": "auto" if drafts else "off",
            "scheduled_per_position": scheduled,
            "accepted_per_position": accepted if drafts else [],
            **SPEEDS,
        }
        duration = int((time.monotonic() - began) * 1e9)
        end = {"done": True, "done_reason": "stop", "eval_count": n_tokens, "eval_duration": duration}
        self.send_line({"message": {"role": "assistant", "content": ""}, **end, "dspark": figures})

    def send_line(self, line: dict[str, Any], marked: tuple[list[str], list[bool]] | None = None) -> None:
        if marked is not None:
            line = {**line, "dspark": {"tokens": marked[0], "drafted": marked[1], **SPEEDS}}
        self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.flush()

    def send_json(self, status: int, body: object) -> None:
        self.send_bytes(status, "application/json", json.dumps(body).encode())

    def send_bytes(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", POLICY),
        ):
            self.send_header(name, value)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve_page(port: int = 0) -> Iterator[Page]:
    """Serve the page while the `with` block runs."""
    page = Page()
    server = ThreadingHTTPServer(("127.0.0.1", port), type("PageHandler", (Handler,), {"page": page}))
    server.daemon_threads = True
    page.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield page
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serve_page() as running:
        print(running.url, flush=True)
        threading.Event().wait()
