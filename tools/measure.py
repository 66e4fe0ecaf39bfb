"""Measures what docs/BENCHMARKS.md states, on this machine, and writes that page.

    python tools/measure.py                          # everything, half an hour; builds upstream's server first
    python tools/measure.py --steps demo,mixed       # some; the page keeps the others as they were measured before
    python tools/measure.py --list                   # the steps and their commands

Every step is a command that anybody can run by hand; the page shows what it printed. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dspark_cpp import build_info

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/BENCHMARKS.md"
FOLDER = ROOT / "build/measured"
SHAPES = ROOT / "build/shapes"

INTRODUCTION = """# Benchmarks

Written by `python tools/measure.py`, which runs the commands below one after the other and puts here what they print.
Ratios are taken within one run of both sides in turns; figures are medians; what follows a plus-minus sign is the
standard error of a median. `adaptive` is the default policy; `plain` is an engine without a drafter. Each stream asks
its next question when its answer has ended; speeds are those of the time in which all streams are busy.
"""

Command = list[str]


@dataclass(frozen=True, slots=True)
class Step:
    """One section of the page.

    Attributes
    ----------
    commands
        Run in this order; all print into the section.
    keep_from
        The section begins with the first line that contains this.
    """

    name: str
    title: str
    note: str
    commands: list[Command]
    keep_from: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a step printed, where and when."""

    machine: str
    commit: str
    date: str
    seconds: float
    text: str


def bench(target: str, *options: str) -> Command:
    return ["dspark", "bench", target, *options]


def shape_files(shape: str, quant: str, draft_vocab: int) -> tuple[Command, str, str]:
    """Return the command that makes a pair of random weights, and its two files."""
    make = ["python", "tools/make_shape_pair.py", "--shape", shape, "--quant", quant, "--keep"]
    make += ["--draft-vocab", str(draft_vocab)]
    stem = (SHAPES / f"qwen3-{shape}-{quant}").relative_to(ROOT)
    return make, f"{stem}.gguf", f"{stem}-drafter-{quant}-{draft_vocab}-tokens.gguf"


def shape_bench(shape: str, quant: str, *options: str, rates: str = "gsm8k") -> list[Command]:
    make, target, drafter = shape_files(shape, quant, 32768)
    synthetic = ["--synthetic-acceptance", f"qwen3-4b:{rates}", "--temperatures", "0"]
    return [make, bench(target, "--draft", drafter, *synthetic, *options)]


def costs(shape: str, quant: str) -> list[Command]:
    make, target, drafter = shape_files(shape, quant, 32768)
    profile = ["dspark", "profile", target, "--draft", drafter, "--concurrency", "1"]
    return [make, profile, [*profile, "--cpu-kernels", "ggml"]]


def steps() -> list[Step]:
    """Return every section, in the order of the page."""
    short, upstream = ["--run-seconds", "0"], ["python", "tools/bench_upstream.py"]
    policies = ["--policies", "off,fixed:6..7,adaptive", "--n-tokens", "64"]
    only = ["--domains", "mixed", "--policies", "adaptive"]
    fixed = ["--policies", "off,fixed:5..7,adaptive", "--n-tokens", "64", "--repeats", "3", "--budget", "60"]
    streams = ["--policies", "off,fixed:4..7,adaptive", "--n-tokens", "96", "--repeats", "3", "--concurrency"]
    rates = (
        "Random weights, accept events drawn at the rates published for Qwen3-4B on GSM8K, which is easy to draft for, "
        "and Alpaca, which is not; mixed: questions of both at the same time."
    )
    deep = ["--prompt-tokens", "3900", "--n-prompts", "1", "--policies", "off,fixed:7,adaptive", "--n-tokens", "96"]
    make, target, drafter = shape_files("0.6B", "q4_k_m", 32768)
    cells = "Default policy, cell by cell"
    sweep = [*upstream, "--sweep", "--n-prompts", "12", "--n-tokens", "64", "--repeats", "2", "--budget", "80"]
    return [
        Step("demo", "The bundled pair", "What `make demo` prints.", [["dspark", "demo"]], "Greedy text"),
        Step(
            "pair",
            "The bundled pair: one and four streams",
            "The default policy against plain decoding and against the best fixed choice, made in hindsight.",
            [bench("demo", "--concurrency", "1,4", *policies, "--budget", "130")],
            cells,
        ),
        Step(
            "mixed",
            "Mixed traffic by load",
            "Questions of all domains at the same time.",
            [bench("demo", "--concurrency", "2,8,16", "--domains", "mixed", *policies, "--budget", "70")],
            cells,
        ),
        Step(
            "short",
            "Short answers",
            "24 tokens: the start of a request weighs most.",
            [bench("demo", "--concurrency", "1,2,8", *only, "--n-tokens", "24", "--budget", "40")],
            cells,
        ),
        Step(
            "useless",
            "A useless drafter",
            "Random weights: nothing that it proposes is accepted.",
            [bench("demo", "--draft", "random", "--concurrency", "1,4,16", *only, "--budget", "50")],
            cells,
        ),
        *(
            Step(
                f"costs-{shape}-{quant}",
                f"What a pass costs: Qwen3-{shape}'s shape in {quant.upper()}",
                "Random weights; first with our kernels, then with ggml's best path.",
                costs(shape, quant),
                "Measured costs",
            )
            for shape in ("0.6B", "1.7B")
            for quant in ("q8_0", "q4_0", "q4_k_m")
        ),
        *(
            Step(
                f"shape-1.7B-{quant}",
                f"Speed at paper-like acceptance: Qwen3-1.7B's shape in {quant.upper()}",
                "Random weights, accept events drawn at the rates published for Qwen3-4B on GSM8K.",
                shape_bench("1.7B", quant, *fixed),
                "gsm8k",
            )
            for quant in ("q8_0", "q4_k_m")
        ),
        Step(
            "streams-0.6B-q4_k_m",
            "Several streams: Qwen3-0.6B's shape in Q4_K_M",
            rates,
            shape_bench("0.6B", "q4_k_m", *streams, "1,2,4,8", "--budget", "300", rates="gsm8k,alpaca"),
            cells,
        ),
        Step(
            "streams-0.6B-q8_0",
            "Several streams: Qwen3-0.6B's shape in Q8_0",
            rates,
            shape_bench(
                "0.6B", "q8_0", "--domains", "mixed", *streams, "1,4,8", "--budget", "90", rates="gsm8k,alpaca"
            ),
            cells,
        ),
        Step(
            "deep",
            "3,900 tokens of context: Qwen3-0.6B's shape in Q4_K_M",
            "The same rates.",
            shape_bench("0.6B", "q4_k_m", *deep, "--repeats", "2", *short, "--budget", "60"),
            "gsm8k",
        ),
        Step(
            "prefill",
            "Reading a prompt with and without a drafter",
            "Qwen3-0.6B's shape in Q4_K_M.",
            [make, ["python", "tools/bench_prefill.py", "--target", target, "--drafter", drafter]],
            "tokens:",
        ),
        Step(
            "drafting",
            "Drafting one block beside llama.cpp's server",
            "Qwen3-0.6B's shape, V = 152k: its whole vocabulary, and a draft vocabulary of 32,768.",
            [[*upstream, "--drafting", "--shape", "0.6B", "--repeats", "2", "--n-tokens", "64"]],
        ),
        Step(
            "upstream",
            "Beside llama.cpp's server from the same tree",
            "The default policy beside every setting of upstream's. With several streams a setting's speed is the sum "
            "of its streams' speeds, which flatters whoever ends raggedly.",
            [sweep],
            "adaptive beside upstream's best",
        ),
        Step(
            "reuse",
            "Prefix reuse: time to the first token",
            "The bundled pair.",
            [["python", "tools/bench_reuse.py", "--repeats", "3"]],
        ),
        Step(
            "window",
            "The draft window at long contexts",
            "The bundled pair.",
            [["python", "tools/bench_window.py", "--n-texts", "3"]],
        ),
        Step(
            "vocabulary",
            "A reduced draft vocabulary",
            "The bundled pair with its own answers as corpus, then times at Qwen3-0.6B's shape.",
            [
                ["python", "tools/bench_draft_vocab.py", "--n-prompts", "9", "--repeats", "2"],
                ["python", "tools/bench_draft_vocab.py", "--shape", "0.6B"],
            ],
        ),
        Step(
            "kernels",
            "Matrix products alone",
            "One thread; ggml's plain and repacked paths beside our kernels.",
            [bench("demo", "--kernels", "--n-threads", "1")],
            "ggml's best path over our kernels",
        ),
    ]


def machine_name() -> str:
    """Processor and cores, as Linux or the platform names them."""
    names, flags = [], ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                names.append(value.strip())
            flags = value if key.strip() == "flags" else flags
    except OSError:
        pass
    vectors = [name for name in ("avx2", "avx_vnni", "avx512f", "avx512_vnni") if name in flags.split()]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()} {' '.join(vectors)}"


def run(step: Step) -> Measured:
    """Run a step's commands.

    Raises
    ------
    SystemExit
        If one of them fails.
    """
    began, text = time.perf_counter(), ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in step.commands:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        text += done.stdout
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Measured(machine_name(), commit.stdout.strip(), date, time.perf_counter() - began, text)


def file_of(step: Step) -> Path:
    return FOLDER / f"{step.name}.json"


def sections_of(page: Path) -> dict[str, str]:
    """Return the parts of a page by their titles."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    parts = text.split("\n## ")[1:]
    return {part.split("\n", 1)[0]: "\n## " + part for part in parts}


def section(step: Step, before: Mapping[str, str]) -> str:
    """Return a step's part of the page; the one before if it was not measured here, empty if it never was."""
    if not file_of(step).exists():
        return before.get(step.title, "")
    measured = Measured(**json.loads(file_of(step).read_text(encoding="utf-8")))
    commands = "\n".join(shlex.join(command) for command in step.commands)
    lines = [line.rstrip() for line in measured.text.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if step.keep_from in line), 0)
    where = f"{measured.machine}; {measured.date}, commit {measured.commit}, {measured.seconds:.0f} s."
    output = "\n".join(lines[first:])
    return f"\n## {step.title}\n\n{step.note} {where}\n\n```\n{commands}\n```\n\n```\n{output}\n```\n"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default="", help="names with commas between them; default: all")
    parser.add_argument("--list", action="store_true", help="show the steps, measure nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    known = [step.name for step in steps()]
    options.steps = options.steps.split(",") if options.steps else known
    if unknown := [name for name in options.steps if name not in known]:
        parser.error(f"--steps must be among {', '.join(known)}, got {', '.join(unknown)}")
    return options


def main() -> None:
    options = parse_options()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for step in steps():
        if options.list:
            print(step.name, *(f"    {shlex.join(command)}" for command in step.commands), sep="\n")
        elif step.name in options.steps:
            print(f"{step.name} ...", flush=True)
            file_of(step).write_text(json.dumps(asdict(run(step)), indent=1) + "\n", encoding="utf-8")
    if not options.list:
        about = f"\nllama.cpp commit {build_info().llama_cpp_commit}.\n"
        before = sections_of(options.page)
        parts = (section(step, before) for step in steps())
        options.page.write_text(INTRODUCTION + about + "".join(parts), encoding="utf-8")
        print(options.page)


if __name__ == "__main__":
    main()
