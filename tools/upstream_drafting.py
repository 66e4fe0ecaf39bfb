"""The time to draft one block beside upstream's server, at a real shape with random weights.

Each side drafts with the whole vocabulary and with a reduced one (`dspark-convert --draft-vocab`), from the same files.
A draft is the block's forward pass and the sequential head; injection of context is in neither figure. Upstream's is
its own statistics, which it logs at the highest verbosity alone. All take turns; ratios are taken within a repetition.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from dspark_cpp import LLM, SamplingParams, _core
from make_shape_pair import make_pair
from make_shape_pair import parse_options as parse_shape
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from upstream_server import free_port, post, running_server, server_command, uses_flash_attention

PROMPT = list(range(1000, 1032))
_N_WARM_UP = 4


@dataclass(slots=True)
class Way:
    """One side with one drafter: milliseconds of a draft, by repetition."""

    name: str
    is_upstream: bool
    drafter: Path
    draft_ms: list[float] = field(default_factory=list)
    head_ms: list[float] = field(default_factory=list)


def compare_drafting(server: Path, options: argparse.Namespace, console: Console) -> dict[str, list[float]]:
    """Make the files, let all ways take their turns, print a table; returns the milliseconds by way."""
    target, ways = make_ways(options)
    model = _core.Model.load_target(str(target), n_gpu_layers=options.n_gpu_layers)
    for repeat in range(options.repeats):
        for way in [*ways[repeat % len(ways) :], *ways[: repeat % len(ways)]]:
            if way.is_upstream:
                way.draft_ms.append(upstream_draft_ms(server, target, way.drafter, options))
            else:
                measure_ours(model, way, options)
    console.print(as_table(ways, options))
    return {way.name: way.draft_ms for way in ways}


def make_ways(options: argparse.Namespace) -> tuple[Path, list[Way]]:
    """Write target and drafters of random weights; upstream with the whole vocabulary comes first."""
    target, drafters = Path(), {}
    for n_tokens in (0, options.draft_vocab):
        arguments = ["--shape", options.shape, "--quant", options.quant, "--draft-vocab", str(n_tokens), "--keep"]
        target, drafters[n_tokens] = make_pair(parse_shape(arguments))
    names = {0: "all tokens", options.draft_vocab: f"{options.draft_vocab} tokens"}
    return target, [
        Way(f"{side}, {names[n_tokens]}", side == "upstream", drafter)
        for side in ("upstream", "dspark-cpp")
        for n_tokens, drafter in drafters.items()
    ]


def upstream_draft_ms(server: Path, target: Path, drafter: Path, options: argparse.Namespace) -> float:
    """Start upstream's server, answer one prompt, read what its log says of drafting."""
    port = free_port()
    files = argparse.Namespace(**(vars(options) | {"target": target, "drafter": drafter}))
    command = [*server_command(server, files, port, options.lengths[-1]), "--verbosity", "5"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running_server(command, port, log) as address:
            body = {"prompt": PROMPT, "n_predict": options.n_tokens, "temperature": 0.0, "samplers": ["temperature"]}
            post(f"{address}/completion", body | {"cache_prompt": False, "ignore_eos": True})
        found = read_draft_ms(log.read_text(errors="replace"))
    if found is None:
        raise RuntimeError("upstream's log must say how long drafting took")
    return found


def read_draft_ms(log: str) -> float | None:
    """Return the mean milliseconds of a draft from upstream's last line of statistics; None without one."""
    found = re.findall(r"#calls\(b,g,a\) = +\d+ +(\d+) .*dur\(b,g,a\) = [\d.]+, ([\d.]+),", log)
    return float(found[-1][1]) / int(found[-1][0]) if found and int(found[-1][0]) else None


def measure_ours(target: _core.Model, way: Way, options: argparse.Namespace) -> None:
    """Answer the same prompt with whole blocks."""
    drafter = _core.Model.load_drafter(str(way.drafter), target, n_gpu_layers=options.n_gpu_layers)
    engine: dict[str, Any] = {"n_ctx": options.n_ctx, "n_threads": options.threads, "n_threads_batch": options.threads}
    engine |= {"flash_attention": uses_flash_attention(options), "policy": "full", "prefix_reuse": False}
    params = SamplingParams(temperature=0.0, max_tokens=options.n_tokens, ignore_eos=True)
    with LLM(target, drafter, **engine) as llm:
        llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=_N_WARM_UP, ignore_eos=True))
        before = llm.stats
        [completion] = llm.generate(PROMPT, params)
        after = llm.stats
    n_rounds = max(completion.stats.n_rounds, 1)
    way.draft_ms.append((after.draft_ms - before.draft_ms) / n_rounds)
    way.head_ms.append((after.head_ms - before.head_ms) / n_rounds)


def as_table(ways: list[Way], options: argparse.Namespace) -> Table:
    """Show medians, and ratios to upstream with the whole vocabulary."""
    title = f"drafting a block of {options.lengths[-1]}, {options.shape} {options.quant}, {options.threads} threads"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("")
    for heading in ("ms", "to upstream", "head ms", "of draft"):
        table.add_column(heading, justify="right")
    for way in ways:
        to_first = median(own / first for own, first in zip(way.draft_ms, ways[0].draft_ms, strict=True))
        head = ("", "")
        if way.head_ms:
            share = median(part / whole for part, whole in zip(way.head_ms, way.draft_ms, strict=True))
            head = (f"{median(way.head_ms):.3f}", f"{share:.1%}")
        table.add_row(way.name, f"{median(way.draft_ms):.2f}", f"{to_first:.3f}", *head)
    return table
