"""Load test of a running server: many clients, each doing what clients do, politely and otherwise.

    dspark serve --demo --n-parallel 8 --max-memory 0.145 --model T.gguf --draft D.gguf --name other &
    python tools/serve/load_test.py --models demo other --clients 64 --minutes 10 --pid $!

First every question is asked alone; then the clients ask, leave in the middle, send nonsense, embed and switch models
(a small `--max-memory` makes every switch an unloading), and each greedy answer is compared with the one given alone.
At the end the server must be as empty as before: no place taken, no connection open, no file handle more, memory level.
Exit status 1 when something is lost or wrong.

Another batch may tip a tie between two tokens, unless weights and cache are 32-bit floats; the texts part there. So the
answers given alone come with log-probabilities: an answer that parts is a `tie` if the token it took instead was there
among the likeliest and less than `--margin` behind, and an error otherwise. `--strict` makes every parting an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

QUESTIONS = [f"What is {a} + {b}?" for a in (12, 34, 58) for b in (7, 19, 23, 86)] + [
    "Tell me about cats.",
    "Write a function that adds two numbers.",
    "How do I make tea?",
    "What is the capital of Spain?",
]
NONSENSE = [
    b"",
    b"{",
    b"[1, 2",
    b'{"model": 3}',
    b'{"model": "demo", "messages": "x"}',
    b'{"model": "demo", "messages": [{"role": "king", "content": "x"}]}',
    b'{"model": "demo", "prompt": "x", "options": {"temperature": "hot"}}',
    b'{"model": "nope", "prompt": "x", "messages": [{"role": "user", "content": "x"}]}',
    b'{"a":' * 90 + b"1" + b"}" * 90,
    b"\xff\xfe\x00",
]
N_TOKENS = 40
N_ALTERNATIVES = 5
SAMPLE_SECONDS = 15.0


@dataclass
class Answer:
    """An answer given alone, and for each of its tokens where it starts and what else was likely."""

    text: str
    starts: list[int]
    chosen: list[str]
    alternatives: list[dict[str, float]]  # how far each is behind the chosen token, in nats

    def margin(self, text: str) -> float | None:
        """Return how far the token was behind with which `text` parts from this answer; None: it was nowhere near."""
        n = next(
            (i for i, (a, b) in enumerate(zip(text, self.text, strict=False)) if a != b), min(len(text), len(self.text))
        )
        margins = [
            behind
            for start, chosen, others in zip(self.starts, self.chosen, self.alternatives, strict=True)
            for token, behind in others.items()
            if start <= n < start + max(len(chosen), len(token)) and token != chosen and text.startswith(token, start)
        ]
        return min(margins, default=None)


class Load:
    """One run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.alone: dict[tuple[str, str], Answer] = {}
        self.margins: list[float] = []
        self.samples: list[dict[str, float]] = []
        self.random = random.Random(arguments.seed)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(base_url=arguments.url, timeout=300, limits=limits)

    async def run(self) -> bool:
        for model in self.arguments.models:
            for question in QUESTIONS:
                self.alone[model, question] = await self.ask_alone(model, question)
        await self.settle()
        before = await self.figures()
        end = time.monotonic() + 60 * self.arguments.minutes
        await asyncio.gather(self.sample(end), *(self.live(end) for _ in range(self.arguments.clients)))
        await self.settle()
        after = await self.figures()
        self.check_nothing_lost(before, after)
        self.report(before, after)
        return not self.problems

    async def live(self, end: float) -> None:
        acts = [self.ask_whole] * 4 + [self.ask_stream] * 4 + [self.ask_openai] * 2
        acts += [self.leave] * 3 + [self.leave_early] * 2 + [self.send_nonsense] * 2 + [self.embed, self.list]
        while time.monotonic() < end:
            act = self.random.choice(acts)
            try:
                await act(self.random.choice(self.arguments.models))
                self.counts[act.__name__] += 1
            except Exception as error:
                self.find(f"{act.__name__}: {type(error).__name__}: {error}")

    # ---- what clients do ----

    async def ask_alone(self, model: str, question: str) -> Answer:
        body = self.body(model, question, stream=False) | {"logprobs": True, "top_logprobs": N_ALTERNATIVES}
        answer = (await self.client.post("/api/chat", json=body)).raise_for_status().json()
        found = Answer(answer["message"]["content"], [], [], [])
        start = 0
        for entry in answer["logprobs"]:
            found.starts.append(start)
            found.chosen.append(entry["token"])
            found.alternatives.append({o["token"]: entry["logprob"] - o["logprob"] for o in entry["top_logprobs"]})
            start += len(entry["token"])
        return found

    async def ask_whole(self, model: str) -> None:
        question = self.random.choice(QUESTIONS)
        answer = await self.client.post("/api/chat", json=self.body(model, question, stream=False))
        if answer.status_code == 503:
            self.counts["refused"] += 1
            return
        self.compare(model, question, answer.raise_for_status().json()["message"]["content"])

    async def ask_stream(self, model: str) -> None:
        question = self.random.choice(QUESTIONS)
        text, is_done = "", False
        async with self.client.stream("POST", "/api/chat", json=self.body(model, question)) as answer:
            if answer.status_code == 503:
                self.counts["refused"] += 1
                return
            async for line in answer.aiter_lines():
                part = json.loads(line)
                text += part["message"]["content"]
                is_done = part["done"]
        if not is_done:
            self.find(f"a stream ended without its last object: {text!r}")
        self.compare(model, question, text)

    async def ask_openai(self, model: str) -> None:
        question = self.random.choice(QUESTIONS)
        body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
        body |= {"max_tokens": N_TOKENS, "stream": True}
        text, last = "", ""
        async with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code == 503:
                self.counts["refused"] += 1
                return
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    text += choices[0]["delta"].get("content") or ""
        if last != "data: [DONE]":
            self.find(f"an event stream ended with {last!r}")
        self.compare(model, question, text)

    async def leave(self, model: str) -> None:
        body = self.body(model, self.random.choice(QUESTIONS), n_tokens=1000)
        async with self.client.stream("POST", "/api/chat", json=body) as answer:
            n = self.random.randrange(1, 6)
            async for _ in answer.aiter_lines():
                n -= 1
                if n == 0:
                    return

    async def leave_early(self, model: str) -> None:
        body = self.body(model, "word " * self.random.randrange(10, 1000), stream=False, n_tokens=500)
        with_timeout = self.client.post("/api/chat", json=body)
        try:
            await asyncio.wait_for(with_timeout, self.random.uniform(0.005, 0.5))
        except TimeoutError:
            return

    async def send_nonsense(self, _: str) -> None:
        path = self.random.choice(["/api/chat", "/api/generate", "/v1/chat/completions", "/api/embed", "/api/show"])
        answer = await self.client.post(path, content=self.random.choice(NONSENSE))
        is_told = answer.status_code in (400, 404, 413) and "error" in answer.json()
        if not is_told and answer.status_code not in (
            200,
            503,
        ):  # what is nonsense to one path may be a call of another
            self.find(f"nonsense was answered with {answer.status_code}: {answer.text[:100]}")

    async def embed(self, model: str) -> None:
        answer = await self.client.post("/api/embed", json={"model": model, "input": ["one", "two words"]})
        if answer.status_code == 503:
            self.counts["refused"] += 1
        elif [len(vector) for vector in answer.json()["embeddings"]] != [256, 256]:
            self.find("embeddings of a wrong size")

    async def list(self, _: str) -> None:
        for path in ("/api/tags", "/api/ps", "/metrics", "/v1/models"):
            (await self.client.get(path)).raise_for_status()

    # ---- findings ----

    def body(self, model: str, question: str, *, stream: bool = True, n_tokens: int = N_TOKENS) -> dict[str, Any]:
        options = {"temperature": 0, "num_predict": n_tokens}
        messages = [{"role": "user", "content": question}]
        return {"model": model, "messages": messages, "stream": stream, "options": options}

    def compare(self, model: str, question: str, text: str) -> None:
        alone = self.alone[model, question]
        if text == alone.text:
            self.counts["equal"] += 1
            return
        margin = alone.margin(text)
        self.counts["tie"] += 1
        if margin is None or margin > self.arguments.margin or self.arguments.strict:
            self.find(f"{model}, {question!r}: {text!r} (margin {margin}), alone {alone.text!r}")
        else:
            self.margins.append(margin)

    async def sample(self, end: float) -> None:
        """Note the server's memory and handles while the others work."""
        begin = time.monotonic()
        while self.arguments.pid and time.monotonic() < end:
            self.samples.append({"s": round(time.monotonic() - begin), **self.process_figures()})
            print(json.dumps(self.samples[-1] | {"done": self.counts.total()}), file=sys.stderr, flush=True)
            await asyncio.sleep(min(SAMPLE_SECONDS, max(end - time.monotonic(), 0)))

    def find(self, text: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 50:
            self.problems.append(text[:300])

    async def settle(self) -> None:
        for _ in range(200):
            figures = await self.figures()
            if figures["busy"] == 0:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(1.0)

    async def figures(self) -> dict[str, float]:
        lines = (await self.client.get("/metrics")).text.splitlines()
        values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}
        names = ("dspark_running{", "dspark_queued{", "dspark_waiting_for_model")
        busy = sum(value for name, value in values.items() if name.startswith(names))
        cache = sum(value for name, value in values.items() if name.startswith("dspark_cache_share"))
        return {"busy": busy, "cache": cache, **self.process_figures()}

    def process_figures(self) -> dict[str, float]:
        if not self.arguments.pid:
            return {}
        folder = Path(f"/proc/{self.arguments.pid}")
        sizes = {
            name: int(kib) / 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", (folder / "status").read_text())
        }
        links = [os.readlink(link) for link in (folder / "fd").iterdir() if link.is_symlink()]
        sockets = sum(link.startswith("socket:") for link in links)
        threads = len(list((folder / "task").iterdir()))
        memory = {"rss_mib": round(sizes["VmRSS"], 1), "anonymous_mib": round(sizes["RssAnon"], 1)}
        return {**memory, "handles": len(links), "sockets": sockets, "threads": threads}

    def check_nothing_lost(self, before: dict[str, float], after: dict[str, float]) -> None:
        for name in ("busy", "cache"):
            if after[name] != 0:
                self.find(f"{name} must be 0 at the end, got {after[name]}")
        # Loaded models hold files, pipes and threads: two more models may be in memory than before.
        if after.get("handles", 0) > before.get("handles", 0) + 16:
            self.find(f"file handles grew from {before['handles']} to {after['handles']}")

    def report(self, before: dict[str, float], after: dict[str, float]) -> None:
        found = {"counts": dict(sorted(self.counts.items())), "largest_margin": max(self.margins, default=0.0)}
        print(json.dumps(found | {"before": before, "after": after}, indent=1))
        for problem in self.problems:
            print("problem:", problem)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", default="http://127.0.0.1:11434")
    parser.add_argument("--models", nargs="+", default=["demo"])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--pid", type=int, help="process of the server, for memory and file handles")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--margin", type=float, default=0.1, help="nats between two tokens that may be a tie")
    parser.add_argument("--strict", action="store_true", help="no ties: every answer must equal the one given alone")
    return 0 if asyncio.run(Load(parser.parse_args()).run()) else 1


if __name__ == "__main__":
    sys.exit(main())
