"""A running server on the bundled pair: the real command in a process of its own, with an empty store."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from waiting import LIMIT_S, wait_until

httpx = pytest.importorskip("httpx")

QUESTION = "What is 12 + 7?"
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}


# A text that repeats its last token for ever, and loses its beginning where the context is full.
ENDLESS = {
    "model": "demo",
    "prompt": "Count.",
    "raw": True,
    "options": {"temperature": 0, "num_predict": -1, "repeat_penalty": 0.01, "repeat_last_n": 1},
}


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def client(self, **options: object) -> httpx.Client:
        """Return a client for it."""
        return httpx.Client(base_url=self.url, timeout=LIMIT_S, **options)

    @property
    def metrics(self) -> dict[str, float]:
        """Figures by name and labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=LIMIT_S).text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    @property
    def n_busy(self) -> float:
        """Places in use and requests that wait."""
        figures = self.metrics
        return sum(value for name, value in figures.items() if name.startswith(("dspark_running{", "dspark_queued{")))


@contextlib.contextmanager
def run_server(folder: Path, *arguments: str, **environment: str) -> Iterator[Server]:
    """Start `dspark serve` on a free port and end it."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "dspark_cpp.cli", "serve", "--port", "0", "--n-threads", "1", "--policy", "full"]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OLLAMA_", "DSPARK_"))}
    env |= {"DSPARK_MODELS": str(folder / "models"), **environment}
    with log.open("w") as sink:
        process = subprocess.Popen([*command, *arguments], stderr=sink, text=True, env=env)
    try:
        yield Server(process, _wait_for_url(process, log), log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_url(process: subprocess.Popen[str], log: Path) -> str:
    address = re.compile(r"listening on (https?://[\w.:\[\]-]+)")
    wait_until(lambda: address.search(log.read_text()) or process.poll() is not None)
    found = address.search(log.read_text())
    assert found, f"the server did not start: {log.read_text()}"
    return found[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server that most tests share."""
    with run_server(tmp_path_factory.mktemp("server"), "--demo") as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client for it."""
    with server.client() as client:
        yield client
