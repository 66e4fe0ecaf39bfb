"""Speeds beside upstream's server: plain, `draft-dspark` at every n_max and some p_min; ours plain, adaptive and full.

"full" verifies every drafted token: it shows what the verification rules accept of the same blocks, not what pays. All
take turns in one run, in an order that rotates, and each is stopped before the next one starts: two engines on one
machine slow each other down even when one of them waits. Speed is the sum over streams of a stream's tokens per second
after its first token, each side by its own clock, so HTTP, prompt and tokenizer are in neither. Accepted length is
tokens per round and stream, the target's own included.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dspark_cpp import build_info
from dspark_cpp.bench.cases import PLAIN, request_options
from dspark_cpp.bench.runner import Pair
from dspark_cpp.bench.traffic import Stream, answer_all
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from upstream_drafting import read_draft_ms
from upstream_server import free_port, post, running_server, server_command, uses_flash_attention

UPSTREAM_PLAIN, OURS_PLAIN, OURS = "upstream plain", "dspark-cpp plain", "dspark-cpp adaptive"
OURS_FULL = "dspark-cpp full"
OUR_POLICIES = {OURS_PLAIN: PLAIN, OURS: "adaptive", OURS_FULL: "full"}
_N_WARM_UP = 12


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, without its first token."""

    n_tokens: int
    milliseconds: float
    n_rounds: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One way's turn in one setting."""

    n_streams: int
    temperature: float
    way: str
    repeat: int
    tokens_per_second: float
    accepted_length: float
    round_ms: float


# Answers prompts side by side at a temperature: at most n tokens each, with a seed each.
Answer = Callable[[Sequence[Sequence[int]], float, int, int], list[Reply]]


@dataclass(slots=True)
class Sweep:
    """What all turns share."""

    server: Path
    options: argparse.Namespace
    pair: Pair
    prompts: list[list[int]]

    def ways(self) -> list[str]:
        """Name all ways: upstream's n_max, then its p_min at the longest, then ours."""
        lengths = self.options.lengths
        ways = [UPSTREAM_PLAIN, *(f"upstream n={n}" for n in lengths)]
        ways += [f"upstream n={lengths[-1]} p={p}" for p in self.options.p_min.split(",") if p]
        return [*ways, OURS_PLAIN, OURS, OURS_FULL]

    @contextmanager
    def open(self, way: str, n_streams: int) -> Iterator[Answer]:
        """Start one side; yields what answers."""
        if way in OUR_POLICIES:
            with self.pair.open(is_plain=way == OURS_PLAIN, n_streams=n_streams, n_ctx=self.options.n_ctx) as llm:
                policy = OUR_POLICIES[way]
                yield lambda prompts, temperature, n, seed: self._ask_ours(
                    llm.loop, policy, prompts, temperature, n, seed
                )
            return
        length, p_min = parse_way(way)
        port = free_port()
        with running_server(server_command(self.server, self.options, port, length, n_streams, p_min), port) as address:
            yield lambda prompts, temperature, n, seed: self.ask_server(address, prompts, temperature, n, seed)

    def _ask_ours(
        self, loop: Any, policy: str, prompts: Sequence[Sequence[int]], temperature: float, n_tokens: int, seed: int
    ) -> list[Reply]:
        ignores_end = self.options.random_weights
        options = [
            request_options(policy, temperature, n_tokens, seed + i, ignores_end=ignores_end)
            for i in range(len(prompts))
        ]
        return [_our_reply(stream) for stream in answer_all(loop, prompts, options).streams]

    def ask_server(
        self, address: str, prompts: Sequence[Sequence[int]], temperature: float, n_tokens: int, seed: int
    ) -> list[Reply]:
        def ask(numbered: tuple[int, Sequence[int]]) -> Reply:
            i, prompt = numbered
            body = {"prompt": list(prompt), "n_predict": n_tokens, "temperature": temperature, "seed": seed + i}
            body |= {"samplers": ["temperature"], "cache_prompt": False, "stream": False}
            body |= {"ignore_eos": self.options.random_weights}
            return _their_reply(post(f"{address}/completion", body))

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, enumerate(prompts)))


def parse_way(way: str) -> tuple[int, float]:
    """Return n_max and p_min of upstream's way; n_max 0 is plain."""
    found = re.fullmatch(r"upstream (?:plain|n=(\d+)(?: p=([\d.]+))?)", way)
    if found is None:
        raise ValueError(f"way must be upstream's, got {way}")
    return int(found[1] or 0), float(found[2] or 0)


def _their_reply(reply: dict[str, Any]) -> Reply:
    timings = reply["timings"]
    n_tokens = timings["predicted_n"] - 1
    return Reply(n_tokens, timings["predicted_ms"], n_tokens - timings.get("draft_n_accepted", 0))


def _our_reply(stream: Stream) -> Reply:
    assert stream.stats is not None
    n_tokens = stream.stats.n_committed
    return Reply(n_tokens, 1000 * (stream.last - stream.first), stream.stats.n_rounds)


def sweep(server: Path, options: argparse.Namespace, texts: dict[str, str], console: Console) -> None:
    """Run everything, print a table per setting, write the JSON."""
    engine: dict[str, Any] = {"n_threads": options.threads, "n_threads_batch": options.threads}
    engine |= {"n_gpu_layers": options.n_gpu_layers, "flash_attention": uses_flash_attention(options)}
    pair = Pair(str(options.target), str(options.drafter), **engine)
    bench = Sweep(server, options, pair, [pair.target.tokenize(text) for text in texts.values()])
    temperatures = [float(value) for value in options.temperatures.split(",")]
    samples: list[Sample] = []
    for n_streams in map(int, options.streams.split(",")):
        samples += run_turns(bench, n_streams, temperatures)
        for temperature in temperatures:
            own = [s for s in samples if (s.n_streams, s.temperature) == (n_streams, temperature)]
            console.print(as_table(own, f"{n_streams} stream(s), temperature {temperature:g}"))
    console.print(summary(samples))
    draft_ms = measure_draft_ms(bench)
    if draft_ms is not None:
        console.print(f"upstream drafts a block of {options.lengths[-1]} in {draft_ms:.2f} ms (its own log)")
    if options.json:
        write_report(options, samples, draft_ms)


def run_turns(bench: Sweep, n_streams: int, temperatures: Sequence[float]) -> list[Sample]:
    """Let every way take its turn in every repetition, all temperatures within a turn."""
    deadline, ways, samples = time.monotonic() + bench.options.budget, bench.ways(), []
    for repeat in range(bench.options.repeats):
        if repeat > 0 and time.monotonic() > deadline:
            break
        for way in [*ways[repeat % len(ways) :], *ways[: repeat % len(ways)]]:
            with bench.open(way, n_streams) as answer:
                answer(bench.prompts[:n_streams], 0.0, _N_WARM_UP, 0)
                samples += [_turn(bench, answer, way, n_streams, t, repeat) for t in temperatures]
    return samples


def _turn(bench: Sweep, answer: Answer, way: str, n_streams: int, temperature: float, repeat: int) -> Sample:
    """Answer all prompts in waves of n_streams; speeds add up within a wave, times over waves."""
    seconds = n_tokens = n_rounds = milliseconds = 0.0
    for first in range(0, len(bench.prompts) - n_streams + 1, n_streams):
        seed = 1000 * repeat + first
        wave = answer(bench.prompts[first : first + n_streams], temperature, bench.options.n_tokens, seed)
        replies = [reply for reply in wave if reply.n_tokens > 0]
        n_wave = sum(reply.n_tokens for reply in replies)
        seconds += n_wave / sum(1000 * reply.n_tokens / reply.milliseconds for reply in replies) if replies else 0.0
        n_tokens += n_wave
        n_rounds += sum(reply.n_rounds for reply in replies)
        milliseconds += sum(reply.milliseconds for reply in replies)
    rounds = max(n_rounds, 1.0)
    return Sample(
        n_streams, temperature, way, repeat, n_tokens / max(seconds, 1e-9), n_tokens / rounds, milliseconds / rounds
    )


def measure_draft_ms(bench: Sweep) -> float | None:
    """Read upstream's own time for a draft from its statistics, which it logs at the highest verbosity alone."""
    port, length = free_port(), bench.options.lengths[-1]
    command = [*server_command(bench.server, bench.options, port, length), "--verbosity", "5"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running_server(command, port, log) as address:
            bench.ask_server(address, bench.prompts[:1], 0.0, bench.options.n_tokens, 0)
        return read_draft_ms(log.read_text(errors="replace"))


def by_way(samples: Sequence[Sample]) -> dict[str, dict[int, Sample]]:
    """Group the samples of one setting by way and repetition."""
    ways: dict[str, dict[int, Sample]] = {}
    for sample in samples:
        ways.setdefault(sample.way, {})[sample.repeat] = sample
    return ways


def summary(samples: Sequence[Sample]) -> Table:
    """Show a row per setting: adaptive beside upstream's best, and accepted lengths of whole blocks.

    Upstream's best is the way with the highest median speed, chosen in hindsight; its accepted length is the highest of
    its ways.
    """
    title = "adaptive beside upstream's best (in hindsight), and tokens per round of whole blocks"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    headings = (
        "streams",
        "T",
        "best of all",
        "ratio",
        "best draft-dspark",
        "ratio",
        "length\nupstream",
        "\nours",
        "ratio",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for setting in dict.fromkeys((s.n_streams, s.temperature) for s in samples):
        ways = by_way([s for s in samples if (s.n_streams, s.temperature) == setting])
        theirs = {way: own for way, own in ways.items() if way not in OUR_POLICIES}
        drafting = {way: own for way, own in theirs.items() if way != UPSTREAM_PLAIN}
        best, best_draft = (
            max(group, key=lambda way: median_of(theirs[way], "tokens_per_second")) for group in (theirs, drafting)
        )
        length = max(median_of(own, "accepted_length") for own in drafting.values())
        ours = median_of(ways[OURS_FULL], "accepted_length")
        to_best, to_draft = (f"{ratio(ways[OURS], theirs[way]):.3f}" for way in (best, best_draft))
        row = (best, to_best, best_draft, to_draft, f"{length:.2f}", f"{ours:.2f}", f"{ours / length:.2f}")
        table.add_row(str(setting[0]), f"{setting[1]:g}", *row)
    return table


def median_of(own: dict[int, Sample], name: str) -> float:
    """Return the median of a figure over repetitions."""
    return median(getattr(sample, name) for sample in own.values())


def speed_of(own: dict[int, Sample]) -> float:
    """Return the median tokens per second."""
    return median_of(own, "tokens_per_second")


def as_table(samples: Sequence[Sample], title: str) -> Table:
    """Show medians over repetitions, with ratios within a repetition."""
    ways = by_way(samples)
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("")
    headings = ("tokens/s", "to upstream\nplain", "adaptive\nto this", "accepted\nlength", "round\nms")
    for heading in headings:
        table.add_column(heading, justify="right")
    for way, own in ways.items():
        speed, length, round_ms = (
            median_of(own, name) for name in ("tokens_per_second", "accepted_length", "round_ms")
        )
        ratios = (f"{ratio(own, ways[UPSTREAM_PLAIN]):.3f}", f"{ratio(ways[OURS], own):.3f}")
        table.add_row(way, f"{speed:.1f}", *ratios, f"{length:.2f}", f"{round_ms:.2f}")
    return table


def ratio(own: dict[int, Sample], other: dict[int, Sample]) -> float:
    """Return the median over repetitions of one way's speed over another's."""
    return median(
        own[repeat].tokens_per_second / max(other[repeat].tokens_per_second, 1e-9) for repeat in own if repeat in other
    )


def write_report(options: argparse.Namespace, samples: Sequence[Sample], draft_ms: float | None) -> None:
    report = {
        "kind": "upstream sweep",
        "llama_cpp_commit": build_info().llama_cpp_commit,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "upstream_draft_ms": draft_ms,
        "samples": [asdict(sample) for sample in samples],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
