"""The draft window at long contexts: time of a draft, memory of the draft cache, and accepted length.

    python tools/bench_window.py [--target T.gguf --drafter D.gguf] [--windows 256,4096] [--contexts 256,512,1024,1900]

For each window one engine answers prompts of growing length: several of the demo's questions and their answers behind
one another, so that the text goes on as it began. Windows take turns at each length; figures are medians over the
repetitions. With other files than the demo's tokens are random and accepted lengths mean nothing.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median

from dspark_cpp import LLM, SamplingParams, _core
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "python/dspark_cpp/demo"
PROMPTS = ROOT / "tests/data/demo_pair/prompts.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One window at one length of context."""

    window: int
    n_context: int
    draft_ms: float  # of a round, without injection
    verify_ms: float
    accepted_length: float
    draft_context_mib: float


def demo_texts(n_tokens: int, n_texts: int) -> list[list[int]]:
    """Return transcripts of at least n_tokens: questions with the demo target's own greedy answers."""
    questions = [prompt["text"] for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))["prompts"]]
    random.Random(0).shuffle(questions)
    n_pieces = n_texts * (1 + n_tokens // 64)  # a question with its answer has about a hundred tokens
    with LLM.demo(n_ctx=512, n_parallel=8) as llm:
        asked = [llm.tokenize(question) for question in questions[:n_pieces]]
        answers = llm.generate(asked, SamplingParams(temperature=0, max_tokens=160))
        end = llm.model.eos_token
    pieces = [[*prompt, *answer.token_ids, end] for prompt, answer in zip(asked, answers, strict=True)]
    texts: list[list[int]] = []
    while len(texts) < n_texts and pieces:
        text: list[int] = []
        while len(text) < n_tokens and pieces:
            text += pieces.pop()
        texts.append(text)
    return [text for text in texts if len(text) >= n_tokens]


def random_texts(n_tokens: int, n_texts: int, n_vocab: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(n_vocab // 2) for _ in range(n_tokens)] for _ in range(n_texts)]


class Bench:
    """One pair, an engine per window and length, one open at a time."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._target = _core.Model.load_target(str(options.target))
        self._drafter = _core.Model.load_drafter(str(options.drafter), self._target)
        longest = max(options.contexts)
        if options.target == DEMO / "target.gguf":
            self._texts = demo_texts(longest, options.n_texts)
        else:
            self._texts = random_texts(longest, options.n_texts, self._target.n_vocab)

    def measure(self) -> list[Row]:
        return [self._row(window, n) for n in self._options.contexts for window in self._options.windows]

    def _row(self, window: int, n_context: int) -> Row:
        options = self._options
        engine = _core.Engine(
            self._target,
            self._drafter,
            n_ctx=max(options.contexts) + options.n_tokens + 8,
            n_threads=options.threads,
            policy="full",
            draft_window=window,
            prefix_reuse=False,
        )
        stats = [self._answer(engine, text[:n_context]) for text in self._texts]
        memory = engine.memory_bytes["draft_context"] / (1 << 20)
        engine.close()
        return Row(
            window,
            n_context,
            median(one.draft_ms / one.n_rounds for one in stats),
            median(one.verify_ms / one.n_rounds for one in stats),
            fmean(one.n_committed / one.n_rounds for one in stats),
            memory,
        )

    def _answer(self, engine: _core.Engine, prompt: list[int]) -> _core.RequestStats:
        request = _core.RequestOptions(max_tokens=self._options.n_tokens, temperature=0.0, ignore_eos=True)
        engine.submit(prompt, request)
        stats = None
        while engine.has_work:
            for event in engine.step():
                stats = event.stats or stats
        assert stats is not None
        return stats


def as_table(rows: Sequence[Row]) -> Table:
    table = Table(title="draft window", title_justify="left", title_style="bold", box=SIMPLE)
    for heading in ("context", "window", "draft\nms", "verify\nms", "accepted\nlength", "draft context\nMiB"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (f"{row.draft_ms:.2f}", f"{row.verify_ms:.2f}", f"{row.accepted_length:.2f}")
        table.add_row(str(row.n_context), str(row.window), *times, f"{row.draft_context_mib:.1f}")
    return table


def parse_options() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DEMO / "target.gguf")
    parser.add_argument("--drafter", type=Path, default=DEMO / "drafter.gguf")
    parser.add_argument("--windows", type=numbers, default=[256, 512, 4096])
    parser.add_argument("--contexts", type=numbers, default=[128, 512, 1024, 1900])
    parser.add_argument("--n-texts", type=int, default=8)
    parser.add_argument("--n-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    rows = Bench(options).measure()
    Console(width=100).print(as_table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
