"""What a reduced draft vocabulary costs in acceptance and gains in time, beside the whole vocabulary.

    python tools/bench_draft_vocab.py                              # the bundled pair: acceptance and time
    python tools/bench_draft_vocab.py --corpus text.txt --sizes 1024,256
    python tools/bench_draft_vocab.py --shape 0.6B                 # random weights of that shape: time alone

The vanilla checkpoint of the bundled pair is converted once per size, with a corpus of the target's own answers to the
calibration prompts unless another is given; the prompts measured are others. Every round drafts the full block. All
drafters take turns within a repetition; times are medians over repetitions, ratios are taken within a repetition. The
sequential head's share is of the whole draft, its forward pass included.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dspark_cpp import LLM, SamplingParams, _core
from dspark_cpp.convert import ConvertOptions, convert
from dspark_cpp.convert.draft_vocab import read_draft_vocab
from make_shape_pair import make_pair
from make_shape_pair import parse_options as parse_shape
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "python/dspark_cpp/demo"
DATA = ROOT / "tests/data/demo_pair"
_N_WARM_UP = 16
_FILE_WIDTH = 120  # where the output is no terminal


@dataclass(frozen=True, slots=True)
class Sample:
    """One drafter's turn."""

    n_committed: int
    n_rounds: int
    draft_ms: float  # per round, the head included
    head_ms: float
    tokens_per_second: float

    @property
    def accepted_length(self) -> float:
        """Tokens per round, the target's own included."""
        return self.n_committed / max(self.n_rounds, 1)


@dataclass(slots=True)
class Way:
    """One drafter and what was measured of it, by temperature and repetition."""

    name: str
    path: Path
    coverage: float | None
    samples: dict[float, list[Sample]]


def write_corpus(path: Path, target: _core.Model, options: argparse.Namespace) -> None:
    """Let the target answer the calibration prompts, plainly."""
    questions = json.loads((DEMO / "calibration_prompts.json").read_text(encoding="utf-8"))
    texts = [text for domain in questions.values() for text in domain]
    params = SamplingParams(temperature=1.0, seed=0, max_tokens=192)
    with LLM(target, n_ctx=1024, n_parallel=8, n_threads=options.threads) as llm:
        prompts = [llm.tokenize(_core_prompt(text)) for text in texts]
        answers = llm.generate(prompts, params)
    lines = [json.dumps({"text": answer.text}) for answer in answers]
    path.write_text("\n".join(lines), encoding="utf-8")


def _core_prompt(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def demo_ways(target: _core.Model, folder: Path, options: argparse.Namespace) -> list[Way]:
    """Convert the bundled checkpoint at every size."""
    corpus = options.corpus
    if corpus is None:
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, target, options)
    ways = []
    for size in [0, *options.sizes]:
        path = folder / f"drafter-{size}.gguf"
        reduced = {"draft_vocab": size, "corpus": corpus} if size else {}
        convert(ConvertOptions(DATA / "vanilla", DEMO / "target.gguf", path, "q8_0", **reduced))
        coverage = read_draft_vocab(DEMO / "target.gguf", size, corpus).coverage if size else 1.0
        ways.append(Way(f"{size} tokens" if size else f"all {target.n_vocab} tokens", path, coverage, {}))
    return ways


def shape_ways(options: argparse.Namespace) -> tuple[Path, list[Way]]:
    """Make a target of random weights and its drafters."""
    ways, target = [], Path()
    for size in [0, *options.sizes]:
        arguments = ["--shape", options.shape, "--quant", options.quant, "--draft-vocab", str(size), "--keep"]
        target, drafter = make_pair(parse_shape(arguments))
        ways.append(Way(f"{size} tokens" if size else "all tokens", drafter, None, {}))
    return target, ways


def measure(target: _core.Model, ways: Sequence[Way], prompts: list[list[int]], options: argparse.Namespace) -> None:
    """Let every drafter take its turn in every repetition, at every temperature."""
    drafters = {way.name: _core.Model.load_drafter(str(way.path), target) for way in ways}
    engine: dict[str, Any] = {"n_ctx": 1024, "n_threads": options.threads, "policy": "full", "prefix_reuse": False}
    for repeat in range(options.repeats):
        for way in [*ways[repeat % len(ways) :], *ways[: repeat % len(ways)]]:
            with LLM(target, drafters[way.name], **engine) as llm:
                llm.generate(prompts[0], SamplingParams(temperature=0, max_tokens=_N_WARM_UP))
                for temperature in options.temperatures:
                    way.samples.setdefault(temperature, []).append(_turn(llm, prompts, temperature, repeat, options))


def _turn(llm: LLM, prompts: list[list[int]], temperature: float, seed: int, options: argparse.Namespace) -> Sample:
    params = SamplingParams(
        temperature=temperature,
        seed=seed,
        max_tokens=options.n_tokens,
        verification="block" if temperature > 0 else "auto",
        ignore_eos=options.shape is not None,
    )
    head_ms = llm.stats.head_ms
    stats = [one.stats for prompt in prompts for one in llm.generate(prompt, params)]
    n_rounds = max(sum(one.n_rounds for one in stats), 1)
    n_committed, decode_ms = sum(one.n_committed for one in stats), sum(one.decode_ms for one in stats)
    draft_ms = sum(one.draft_ms for one in stats) / n_rounds
    return Sample(
        n_committed,
        sum(one.n_rounds for one in stats),
        draft_ms,
        (llm.stats.head_ms - head_ms) / n_rounds,
        1000 * n_committed / max(decode_ms, 1e-9),
    )


def as_table(ways: Sequence[Way], temperature: float, has_text: bool) -> Table:
    """Medians; ratios to the first way within a repetition."""
    table = Table(title=f"temperature {temperature:g}", title_justify="left", title_style="bold", box=SIMPLE)
    columns = (
        ["draft vocabulary", "corpus\ncovered", "accepted\nlength", "change"] if has_text else ["draft vocabulary"]
    )
    for column in (*columns, "draft\nms", "ratio", "head\nms", "of draft", "tokens/s", "ratio"):
        table.add_column(column, justify="right")
    first = ways[0].samples[temperature]
    whole = _accepted_length(first)
    for way in ways:
        own = way.samples[temperature]
        length = _accepted_length(own)
        text = (f"{way.coverage or 0:.2%}", f"{length:.3f}", f"{length / whole - 1:+.2%}") if has_text else ()
        draft, head, speed = (
            median(getattr(s, name) for s in own) for name in ("draft_ms", "head_ms", "tokens_per_second")
        )
        faster = median(a.draft_ms / b.draft_ms for a, b in zip(first, own, strict=True))
        gain = median(b.tokens_per_second / a.tokens_per_second for a, b in zip(first, own, strict=True))
        share = median(s.head_ms / s.draft_ms for s in own)
        times = (f"{draft:.3f}", f"{faster:.2f}x", f"{head:.3f}", f"{share:.1%}", f"{speed:.0f}", f"{gain:.2f}x")
        table.add_row(way.name, *text, *times)
    return table


def _accepted_length(samples: Sequence[Sample]) -> float:
    return sum(s.n_committed for s in samples) / max(sum(s.n_rounds for s in samples), 1)


def read_prompts(n_prompts: int) -> list[str]:
    """Take the first prompts of every domain in turns."""
    by_domain: dict[str, list[str]] = {}
    for prompt in json.loads((DATA / "prompts.json").read_text(encoding="utf-8"))["prompts"]:
        by_domain.setdefault(prompt["domain"], []).append(prompt["text"])
    return [text for texts in zip(*by_domain.values(), strict=False) for text in texts][:n_prompts]


def parse_options() -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="random weights of this shape (0.6B, ...) in place of the bundled pair")
    parser.add_argument("--quant", default="q4_k_m", help="of the shape")
    parser.add_argument("--sizes", type=numbers(int), help="default: 1024,512,256; with --shape 32768")
    parser.add_argument("--corpus", type=Path, help="default: answers of the bundled target")
    parser.add_argument("--temperatures", type=numbers(float), default=[0.0, 1.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-prompts", type=int, help="default: 30; with --shape 1")
    parser.add_argument("--n-tokens", type=int, help="most tokens of an answer; default: 96; with --shape 16")
    parser.add_argument("--threads", type=int, default=0, help="0: the engine's choice")
    options = parser.parse_args()
    has_shape = options.shape is not None
    options.sizes = options.sizes or ([32768] if has_shape else [1024, 512, 256])
    options.n_prompts = options.n_prompts or (1 if has_shape else 30)
    options.n_tokens = options.n_tokens or (16 if has_shape else 96)
    return options


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            path, ways = shape_ways(options)
            target = _core.Model.load_target(str(path))
            prompts = [list(range(1000, 1032))] * options.n_prompts
        else:
            target = _core.Model.load_target(str(DEMO / "target.gguf"))
            ways = demo_ways(target, Path(folder), options)
            prompts = [target.tokenize(text) for text in read_prompts(options.n_prompts)]
        measure(target, ways, prompts, options)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    for temperature in options.temperatures:
        console.print(as_table(ways, temperature, has_text=options.shape is None))


if __name__ == "__main__":
    main()
