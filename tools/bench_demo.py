"""Speed of the bundled pair on this machine: plain decoding against every draft length, alone and in batches.

    python tools/bench_demo.py [--repeats 5] [--streams 1,4] [--temperatures 0,1] [--json result.json]

Plain decoding is an LLM without a drafter, so that it carries none of speculation's costs; "off" has one and does not
use it. All ways take turns within a repetition and a ratio is taken within its repetition, so that a machine that slows
down slows both sides of it; figures are medians over the repetitions. Speed is tokens per second of wall time, prompts
included.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from dspark_cpp import LLM, SamplingParams, build_info
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "python/dspark_cpp/demo/target.gguf"
PROMPTS = ROOT / "tests/data/demo_pair/prompts.json"
N_CTX = 1024


@dataclass(frozen=True, slots=True)
class Sample:
    """All prompts answered once in one way."""

    tokens_per_second: float
    ratio: float  # to plain decoding in the same repetition
    accepted_length: float
    draft_ms: float  # per request and round, as are the next two
    verify_ms: float
    host_ms: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What stays the same while the ways take turns."""

    n_streams: int
    temperature: float


class Bench:
    """One setting: the ways of decoding, each an LLM of its own that is closed before the next one opens.

    The thread teams of two open engines make each other sleep and wake, which can cost more than the work.
    """

    def __init__(self, engine: dict[str, Any], prompts: Sequence[str]) -> None:
        self._engine = {"prefix_reuse": False} | engine  # repeated prompts must not become free
        self._prompts = list(prompts)
        with LLM.demo(**engine) as llm:
            assert llm.drafter is not None
            block_size = llm.drafter.drafter_info.block_size
        self.ways: dict[str, int | None] = {"plain": None, "off": 0}
        self.ways |= {str(length): length for length in range(1, block_size)}
        self.ways |= {f"{block_size} (full)": block_size}

    def measure(self, params: SamplingParams, n_repeats: int, advance: Callable[[], None]) -> dict[str, list[Sample]]:
        """Answer all prompts in every way, in turns."""
        samples: dict[str, list[Sample]] = {name: [] for name in self.ways}
        for repeat in range(n_repeats):
            for name, length in self.ways.items():
                plain = samples["plain"][repeat] if name != "plain" else None
                once = replace(params, draft=length or 0, seed=repeat)
                with LLM(TARGET, **self._engine) if length is None else LLM.demo(**self._engine) as llm:
                    llm.generate(self._prompts[0], replace(once, max_tokens=16))  # warms it up
                    samples[name].append(self._answer(llm, once, plain))
                advance()
        return samples

    def _answer(self, llm: LLM, params: SamplingParams, plain: Sample | None) -> Sample:
        began = time.perf_counter()
        completions = llm.generate(self._prompts, params)
        speed = sum(len(completion.token_ids) for completion in completions) / (time.perf_counter() - began)
        stats = [completion.stats for completion in completions]
        n_rounds = max(sum(one.n_rounds for one in stats), 1)
        return Sample(
            speed,
            speed / plain.tokens_per_second if plain else 1.0,
            sum(one.n_committed for one in stats) / n_rounds,
            *(sum(getattr(one, name) for one in stats) / n_rounds for name in ("draft_ms", "verify_ms", "host_ms")),
        )


def medians(samples: Sequence[Sample]) -> Sample:
    return Sample(*(median(getattr(sample, one.name) for sample in samples) for one in fields(Sample)))


def as_table(setting: Setting, rows: dict[str, Sample], n_repeats: int) -> Table:
    title = f"{setting.n_streams} stream(s), temperature {setting.temperature:g}, medians of {n_repeats} runs"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("draft")
    for heading in ("tokens/s", "ratio", "accepted\nlength", "draft\nms", "verify\nms", "host\nms"):
        table.add_column(heading, justify="right")
    best = max(rows, key=lambda name: rows[name].ratio)
    for name, row in rows.items():
        times = (f"{value:.2f}" for value in (row.draft_ms, row.verify_ms, row.host_ms))
        cells = (f"{row.tokens_per_second:.0f}", f"{row.ratio:.2f}x", f"{row.accepted_length:.2f}", *times)
        table.add_row(name, *cells, style="bold green" if name == best else None)
    return table


def read_prompts(n_prompts: int) -> list[str]:
    """Take the first prompts of every domain in turns."""
    by_domain: dict[str, list[str]] = {}
    for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]:
        by_domain.setdefault(prompt["domain"], []).append(prompt["text"])
    in_turns = [text for texts in zip(*by_domain.values(), strict=False) for text in texts]
    return in_turns[:n_prompts]


def run(options: argparse.Namespace, console: Console) -> list[dict[str, object]]:
    """Measure every setting; print its table as soon as it is done."""
    settings = [Setting(streams, temperature) for streams in options.streams for temperature in options.temperatures]
    report: list[dict[str, object]] = []
    for setting in settings:
        engine = {"n_ctx": N_CTX, "n_parallel": setting.n_streams, "n_threads": options.threads}
        params = SamplingParams(temperature=setting.temperature, max_tokens=options.n_tokens)
        bench = Bench(engine, read_prompts(options.n_prompts))
        with Progress(transient=True) as progress:
            task = progress.add_task("measuring", total=options.repeats * len(bench.ways))
            samples = bench.measure(params, options.repeats, lambda at=task, bar=progress: bar.advance(at))
        rows = {name: medians(taken) for name, taken in samples.items()}
        console.print(as_table(setting, rows, options.repeats))
        report += [asdict(setting) | {"draft": name} | asdict(row) for name, row in rows.items()]
    return report


def parse_options() -> argparse.Namespace:
    def numbers(text: str, kind: type) -> list[float]:
        return [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=lambda text: numbers(text, int), default=[1, 4])
    parser.add_argument("--temperatures", type=lambda text: numbers(text, float), default=[0.0, 1.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-prompts", type=int, default=12)
    parser.add_argument("--n-tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--threads", type=int, default=0, help="0: the engine's choice")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rows = run(options, Console(highlight=False))
    if options.json:
        info = build_info()
        machine = {"n_cpus": os.cpu_count(), "system_info": info.system_info, "llama_cpp_commit": info.llama_cpp_commit}
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
