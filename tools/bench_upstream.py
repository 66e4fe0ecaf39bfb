"""Compare dspark-cpp with upstream's own `llama-server --spec-type draft-dspark`: same tree, same files, same prompts.

    python tools/bench_upstream.py                       # the bundled pair; builds the server on first use
    python tools/bench_upstream.py --sweep --json result.json      # speeds: every setting of upstream's beside ours
    python tools/bench_upstream.py --drafting --shape 0.6B         # the time to draft a block, random weights
    python tools/bench_upstream.py --target T.gguf --drafter D.gguf --draft-length 1..7 --json result.json

Both decode greedily, plainly and with the drafter, one prompt after the other in turns, so that a machine that slows
down slows all of them. At the trained block size the texts must be identical and the accepted counts of the full head,
which computes what upstream does, within 2 %: then both agree on context, positions and heads of the drafter. The other
heads leave out tokens that only the Markov bias would have lifted to the top. A shorter draft is a narrower block
upstream, which changes every slot of a non-causal drafter, and a prefix of the full block here: its counts are shown,
not compared. Speed is tokens per second after the first token, each side by its own clock: HTTP, prompt and tokenizer
are in neither. Exit status 1: a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dspark_cpp import LLM, SamplingParams, build_info
from dspark_cpp.config import Head
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from upstream_server import cached_server, free_port, post, running_server, server_command, uses_flash_attention

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "python/dspark_cpp/demo"
PROMPTS = ROOT / "tests/data/demo_pair/prompts.json"
TOLERANCE = 0.02  # of accepted tokens: batches may be cut differently, and a near tie may then fall differently
UPSTREAM, OURS = "upstream", "dspark-cpp"


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's greedy continuation, without its end-of-text token."""

    token_ids: list[int]
    n_decoded: int  # tokens after the first one, the end-of-text token included
    decode_ms: float
    n_drafted: int
    n_accepted: int


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of a way of decoding over all prompts and repetitions."""

    n_decoded: int
    decode_ms: float
    n_drafted: int
    n_accepted: int

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Total:
        return cls(**{name: sum(getattr(answer, name) for answer in answers) for name in cls.__slots__})

    @property
    def tokens_per_second(self) -> float:
        return 1000.0 * self.n_decoded / self.decode_ms if self.decode_ms else 0.0

    @property
    def accepted_length(self) -> float:
        """Tokens per round: each round commits its accepted tokens and one of the target's own."""
        n_rounds = self.n_decoded - self.n_accepted
        return self.n_decoded / n_rounds if n_rounds > 0 else 0.0


@dataclass(slots=True)
class Run:
    """What one draft length gave: totals by way of decoding, and what differed."""

    draft_length: int
    totals: dict[str, Total]
    n_equal: int  # prompts whose text is the same by every way
    different: list[str]


AskFunction = Callable[[list[int]], Answer]


# ---- upstream's side ----


def ask_server(address: str, prompt: list[int], options: argparse.Namespace, is_end: Callable[[int], bool]) -> Answer:
    body = {"prompt": prompt, "n_predict": options.n_tokens, "temperature": 0.0, "seed": 1, "samplers": ["temperature"]}
    body |= {"cache_prompt": False, "return_tokens": True, "stream": False}
    reply = post(f"{address}/completion", body)
    timings = reply["timings"]
    tokens = reply["tokens"]
    if tokens and is_end(tokens[-1]):
        tokens = tokens[:-1]
    return Answer(
        token_ids=tokens,
        n_decoded=timings["predicted_n"] - 1,
        decode_ms=timings["predicted_ms"],
        n_drafted=timings.get("draft_n", 0),
        n_accepted=timings.get("draft_n_accepted", 0),
    )


# ---- our side ----


def ask_llm(llm: LLM, prompt: list[int], options: argparse.Namespace) -> Answer:
    """Ask dspark-cpp; a drafted end-of-text token counts as its round's own, as upstream does but in the last slot."""
    [completion] = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=options.n_tokens))
    stats = completion.stats
    return Answer(
        token_ids=list(completion.token_ids),
        n_decoded=stats.n_committed,
        decode_ms=stats.decode_ms,
        n_drafted=stats.n_scheduled,  # what was verified: upstream counts those too
        n_accepted=stats.n_committed - stats.n_rounds,
    )


def load(options: argparse.Namespace, draft_length: int, head: Head = "full") -> LLM:
    return LLM(
        options.target,
        options.drafter if draft_length > 0 else None,
        n_ctx=options.n_ctx,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        n_gpu_layers=options.n_gpu_layers,
        flash_attention=uses_flash_attention(options),
        head=head,
        n_candidates=options.n_candidates,
        policy=draft_length,
        prefix_reuse=False,  # repeated prompts must not become free
    )


# ---- the comparison ----


def compare(server: Path, options: argparse.Namespace, draft_length: int, prompts: dict[str, str]) -> Run:
    """Run all prompts through plain and speculative decoding of both sides, in turns."""
    with ExitStack() as stack:
        plain = stack.enter_context(load(options, 0))
        ways: dict[str, AskFunction] = {}
        for name, length in ((f"{UPSTREAM} plain", 0), (UPSTREAM, draft_length)):
            port = free_port()
            address = stack.enter_context(running_server(server_command(server, options, port, length), port))
            ways[name] = lambda prompt, at=address: ask_server(at, prompt, options, plain.model.is_end_of_generation)
        ways[f"{OURS} plain"] = lambda prompt: ask_llm(plain, prompt, options)
        for head in [*options.heads, "full"]:
            llm = stack.enter_context(load(options, draft_length, head))
            ways[f"{OURS} {head}"] = lambda prompt, llm=llm: ask_llm(llm, prompt, options)
        return take_turns(ways, {name: plain.tokenize(text) for name, text in prompts.items()}, options, draft_length)


def take_turns(
    ways: dict[str, AskFunction], prompts: dict[str, list[int]], options: argparse.Namespace, draft_length: int
) -> Run:
    first = next(iter(prompts.values()))
    for ask in ways.values():
        ask(first)  # warms it up
    answers: dict[str, list[Answer]] = {name: [] for name in ways}
    different: list[str] = []
    for _ in range(options.repeats):
        for prompt_name, prompt in prompts.items():
            latest = {way: ask(prompt) for way, ask in ways.items()}
            different += differences(prompt_name, latest)
            for way, answer in latest.items():
                answers[way].append(answer)
    n_equal = sum(len({tuple(one.token_ids) for one in each}) == 1 for each in zip(*answers.values(), strict=True))
    return Run(draft_length, {way: Total.of(answers[way]) for way in ways}, n_equal, different)


def differences(prompt_name: str, answers: dict[str, Answer]) -> list[str]:
    """Name the answers of ours that are neither upstream's plain nor its DSpark text.

    Those two may differ themselves: a batch of several rows rounds otherwise than a single row, which can flip a near
    tie of a quantized target. With 32-bit floats and flash attention off all texts are the same.
    """
    references = [answers[way].token_ids for way in (f"{UPSTREAM} plain", UPSTREAM)]
    lines = []
    for way, answer in answers.items():
        if answer.token_ids not in references:
            at = max(n_common(answer.token_ids, reference) for reference in references)
            lines.append(f"{prompt_name}: {way} leaves upstream's text at token {at} of {len(references[0])}")
    return lines


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def failures(run: Run, block_size: int) -> list[str]:
    """Say which check failed; counts are comparable where both sides draft the trained block over all tokens."""
    lines = list(run.different)
    ours, theirs = run.totals[f"{OURS} full"], run.totals[UPSTREAM]
    for name in ("n_drafted", "n_accepted") if run.draft_length == block_size else ():
        a, b = getattr(ours, name), getattr(theirs, name)
        if abs(a - b) > TOLERANCE * max(a, b):
            lines.append(f"{name} must agree within {TOLERANCE:.0%}, got {a} here and {b} upstream")
    return lines


def show(console: Console, run: Run, options: argparse.Namespace, n_prompts: int, block_size: int) -> None:
    console.print(as_table(run, options, n_prompts))
    wrong = failures(run, block_size)
    for line in wrong:
        console.print(line, style="red", soft_wrap=True)
    if not wrong:
        n_answers = n_prompts * options.repeats
        text = f"Text identical by all ways for {run.n_equal} of {n_answers} answers"
        text += "" if run.n_equal == n_answers else ", upstream's plain or DSpark text for the rest"
        counts = f"counts of the full head agree within {TOLERANCE:.0%}" if run.draft_length == block_size else ""
        console.print(f"{text}; {counts or 'counts are not comparable here'}.", style="green", soft_wrap=True)


def as_table(run: Run, options: argparse.Namespace, n_prompts: int) -> Table:
    title = f"draft length {run.draft_length}, {n_prompts} prompts x {options.n_tokens} tokens, {options.repeats} runs"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("")
    for heading in ("tokens/s", "ratio to\nown plain", "drafted", "accepted", "accepted\nlength"):
        table.add_column(heading, justify="right")
    for way, total in run.totals.items():
        plain = run.totals[f"{UPSTREAM if way.startswith(UPSTREAM) else OURS} plain"]
        ratio = total.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0
        counts = (str(total.n_drafted), str(total.n_accepted), f"{total.accepted_length:.3f}")
        table.add_row(way, f"{total.tokens_per_second:.0f}", f"{ratio:.2f}x", *counts)
    return table


def read_prompts(path: Path, n_prompts: int) -> dict[str, str]:
    """Read the first prompts of every domain in turns: a JSON object whose "prompts" have a "domain" and a "text"."""
    by_domain: dict[str, list[str]] = {}
    for prompt in json.loads(path.read_text(encoding="utf-8"))["prompts"]:
        by_domain.setdefault(prompt["domain"], []).append(prompt["text"])
    rows = {f"{domain} {i}": text for domain, texts in by_domain.items() for i, text in enumerate(texts)}
    in_turns = sorted(rows.items(), key=lambda item: int(item[0].rsplit(maxsplit=1)[1]))
    return dict(in_turns[:n_prompts])


def draft_lengths(text: str) -> list[int]:
    """Read "7", "1,3,7" or "1..7"."""
    if ".." in text:
        first, last = map(int, text.split(".."))
        return list(range(first, last + 1))
    return [int(part) for part in text.split(",")]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DEMO / "target.gguf", help="target GGUF")
    parser.add_argument("--drafter", type=Path, default=DEMO / "drafter.gguf", help="its drafter, by dspark-convert")
    parser.add_argument("--server", type=Path, help="a llama-server to use instead of building one")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON file of prompts")
    parser.add_argument("--n-prompts", type=int, default=30)
    parser.add_argument("--n-tokens", type=int, default=128)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--n-gpu-layers", type=int, default=999)
    parser.add_argument("--heads", nargs="*", choices=("candidates", "graph"), default=["candidates"])
    parser.add_argument("--n-candidates", type=int, default=64, help="of those heads; the full head always runs too")
    parser.add_argument(
        "--flash-attention", choices=("on", "off"), help="default: on, but off on a CPU where texts are compared"
    )
    parser.add_argument("--draft-length", type=draft_lengths, help='"7", "1,3,7" or "1..7"; default: the trained block')
    parser.add_argument("--sweep", action="store_true", help="compare speeds: see tools/upstream_sweep.py")
    parser.add_argument("--drafting", action="store_true", help="time drafts alone: see tools/upstream_drafting.py")
    parser.add_argument("--shape", default="0.6B", help="with --drafting, as are the next two")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--draft-vocab", type=int, default=32768, help="tokens of the reduced draft vocabulary")
    parser.add_argument("--streams", default="1,4", help="with --sweep")
    parser.add_argument("--temperatures", default="0,1", help="with --sweep")
    parser.add_argument("--p-min", default="0.3,0.5,0.7", help="with --sweep: upstream's thresholds, at its full block")
    parser.add_argument(
        "--lengths", type=draft_lengths, default=list(range(1, 8)), help="with --sweep: upstream's n_max"
    )
    parser.add_argument("--random-weights", action="store_true", help="with --sweep: a pair that has no ends of text")
    parser.add_argument("--budget", type=float, default=1e9, help="with --sweep: seconds after which no turn begins")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def trained_block_size(options: argparse.Namespace) -> int:
    with LLM(options.target, options.drafter, n_ctx=options.n_ctx, n_gpu_layers=options.n_gpu_layers) as llm:
        assert llm.drafter is not None
        return llm.drafter.drafter_info.block_size


def main() -> int:
    options = parse_options()
    console = Console(highlight=False)
    server = options.server or cached_server()
    if options.sweep:
        from upstream_sweep import sweep

        sweep(server, options, read_prompts(options.prompts, options.n_prompts), console)
        return 0
    if options.drafting:
        from upstream_drafting import compare_drafting

        times = compare_drafting(server, options, console)
        if options.json:
            options.json.write_text(json.dumps({"draft_ms": times}, indent=1) + "\n", encoding="utf-8")
        return 0
    block_size = trained_block_size(options)
    prompts = read_prompts(options.prompts, options.n_prompts)
    runs = []
    for length in options.draft_length or [block_size]:
        runs.append(compare(server, options, length, prompts))
        show(console, runs[-1], options, len(prompts), block_size)
    is_good = not any(failures(run, block_size) for run in runs)
    if options.json:
        write_json(options, runs, is_good)
    return 0 if is_good else 1


def write_json(options: argparse.Namespace, runs: Sequence[Run], is_good: bool) -> None:
    info = build_info()
    report = {
        "llama_cpp_commit": info.llama_cpp_commit,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "passed": is_good,
        "runs": [asdict(run) for run in runs],
    }
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
