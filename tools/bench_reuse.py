"""Time to the first token with and without prefix reuse: a shared system prompt, and the turns of a chat.

    python tools/bench_reuse.py [--target T.gguf --drafter D.gguf] [--system 1024] [--turn 48] [--repeats 5]

Both ways take turns within a repetition; figures are medians over the repetitions, ratios are taken within one. Tokens
are random: what a prompt costs does not depend on what it says. The time runs from submitting a prompt to the end of
the step that gives its first token; nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from dspark_cpp import _core
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

DEMO = Path(__file__).resolve().parents[1] / "python/dspark_cpp/demo"


@dataclass(frozen=True, slots=True)
class Turn:
    """One prompt answered."""

    first_ms: float
    n_prompt: int
    n_reused: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt of a scenario, both ways."""

    scenario: str
    prompt: int  # its place in the scenario
    n_prompt: int
    hit_rate: float
    without_ms: float
    with_ms: float
    speedup: float


def answer(engine: _core.Engine, prompt: list[int], n_tokens: int) -> Turn:
    began = time.perf_counter()
    options = _core.RequestOptions(max_tokens=n_tokens, temperature=0.0, ignore_eos=True)
    engine.submit(prompt, options)
    tokens: list[int] = []
    first_ms, stats = 0.0, None
    while engine.has_work:
        for event in engine.step():
            if event.tokens and not tokens:
                first_ms = 1e3 * (time.perf_counter() - began)
            tokens += event.tokens
            stats = event.stats or stats
    assert stats is not None
    return Turn(first_ms, stats.n_prompt, stats.n_reused, tuple(tokens))


def ask_users(engine: _core.Engine, options: argparse.Namespace, draw: Callable[[int], list[int]]) -> list[Turn]:
    """Answer the first questions of several users behind one system prompt."""
    system = draw(options.system)
    return [answer(engine, system + draw(options.turn), options.answer) for _ in range(options.turns)]


def chat(engine: _core.Engine, options: argparse.Namespace, draw: Callable[[int], list[int]]) -> list[Turn]:
    """Answer the turns of one chat, each prompt the whole talk before it."""
    text, turns = draw(options.turn), []
    for _ in range(options.turns):
        turns.append(answer(engine, text, options.answer))
        text = [*text, *turns[-1].tokens, *draw(options.turn)]
    return turns


SCENARIOS = {"shared system prompt": ask_users, "chat": chat}


def measure(options: argparse.Namespace) -> list[Row]:
    target = _core.Model.load_target(str(options.target))
    drafter = _core.Model.load_drafter(str(options.drafter), target) if options.drafter else None
    runs: dict[tuple[str, bool], list[list[Turn]]] = {}
    for repeat in range(options.repeats):
        for name, scenario in SCENARIOS.items():
            for is_reusing in (False, True):
                engine = _core.Engine(
                    target,
                    drafter,
                    n_ctx=options.n_ctx,
                    n_parallel=options.n_parallel,
                    n_threads=options.threads,
                    prefix_reuse=is_reusing,
                )
                source = random.Random(repeat)
                draw = lambda n, source=source: [source.randrange(target.n_vocab // 2) for _ in range(n)]  # noqa: E731
                runs.setdefault((name, is_reusing), []).append(scenario(engine, options, draw))
                engine.close()  # one team of threads at a time
    return [
        compare(name, i, [one[i] for one in runs[name, False]], [one[i] for one in runs[name, True]])
        for name in SCENARIOS
        for i in range(options.turns)
    ]


def compare(name: str, i: int, without: Sequence[Turn], reusing: Sequence[Turn]) -> Row:
    return Row(
        name,
        i + 1,
        without[0].n_prompt,
        median(turn.n_reused / turn.n_prompt for turn in reusing),
        median(turn.first_ms for turn in without),
        median(turn.first_ms for turn in reusing),
        median(a.first_ms / b.first_ms for a, b in zip(without, reusing, strict=True)),
    )


def as_table(rows: Sequence[Row], n_repeats: int) -> Table:
    title = f"time to the first token, medians of {n_repeats} repetitions"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("scenario")
    for heading in ("prompt", "tokens", "hit rate", "without\nms", "with reuse\nms", "faster"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.without_ms:.1f}", f"{row.with_ms:.1f}", f"{row.speedup:.1f}x")
        table.add_row(row.scenario, str(row.prompt), str(row.n_prompt), f"{100 * row.hit_rate:.0f} %", *times)
    return table


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DEMO / "target.gguf")
    parser.add_argument("--drafter", type=Path, help="default: the demo's with its own target, else none")
    parser.add_argument("--system", type=int, default=1024, help="tokens of the system prompt")
    parser.add_argument("--turn", type=int, default=48, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--n-ctx", type=int, default=2048)
    parser.add_argument("--n-parallel", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.drafter is None and options.target == DEMO / "target.gguf":
        options.drafter = DEMO / "drafter.gguf"
    return options


def main() -> None:
    options = parse_options()
    rows = measure(options)
    Console(width=100).print(as_table(rows, options.repeats))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
