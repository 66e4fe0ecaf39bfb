"""`dspark bench`: its options, and what it prints and writes. No measuring here."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from dspark_cpp import _core
from dspark_cpp.bench.cases import MIXED, Cell, Workload, read_questions, ways_of
from dspark_cpp.bench.plots import check_drawing, draw_all
from dspark_cpp.bench.published import Rates, parse_rates
from dspark_cpp.bench.report import CellReport, as_json, cell_table, report_cell, summary, summary_table
from dspark_cpp.bench.runner import Pair, Plan, Run, measure
from dspark_cpp.bench.step_split import step_split
from dspark_cpp.chat import render_chat, without_second_bos

__all__ = ["bench_command"]

_DEMO = Path(__file__).parents[1] / "demo"
_FILE_WIDTH = 140  # where the output is no terminal
_POLICIES = "off,fixed:1..7,threshold:0.5,algorithm1,adaptive"
NO_TEXT = "Synthetic acceptance: accept events are drawn from given rates. Times are real, the output is NO TEXT."


def bench_command(
    target: Annotated[str, typer.Argument(help="GGUF file of the target, or `demo` for the bundled pair.")] = "demo",
    draft: Annotated[
        str | None, typer.Option("--draft", "-d", help="GGUF file of the drafter, or `random`: a useless one.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Streams at the same time.")] = "1",
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures.")] = "0,1",
    policies: Annotated[str, typer.Option(help="What takes turns with plain decoding.")] = _POLICIES,
    domains: Annotated[str, typer.Option(help="Names of domains, `mixed` traffic of all of them, or `all`.")] = "all",
    prompts: Annotated[Path | None, typer.Option(help="JSON object: lists of questions by domain.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Length of every prompt; 0: as it is.")] = 0,
    n_tokens: Annotated[int, typer.Option("--n-tokens", "-n", min=2, help="Most tokens of an answer.")] = 96,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of text.")] = False,
    n_prompts: Annotated[int, typer.Option(min=1, help="Answers of a run, at least one per stream.")] = 3,
    repeats: Annotated[
        int, typer.Option(min=1, help="Turns of every way; up to three times as many until ratios are known to 0.01.")
    ] = 6,
    run_seconds: Annotated[
        float, typer.Option(min=0, help="Least length of a run, by further answers; 0: as many as asked for.")
    ] = 0.15,
    budget: Annotated[float, typer.Option(help="Seconds for all cells; each has at least one repetition.")] = 1e9,
    synthetic_acceptance: Annotated[
        str, typer.Option(help="Rates per position, or a published pair (qwen3-4b:gsm8k): times random weights.")
    ] = "",
    synthetic_spread: Annotated[float, typer.Option(help="Spread of a round's difficulty, in logits.")] = 1.5,
    synthetic_noise: Annotated[float, typer.Option(help="Noise in what the confidence sees of it.")] = 0.7,
    synthetic_bias: Annotated[float, typer.Option(help="Added to confidence logits: a wrong calibration.")] = 0.0,
    head: Annotated[str, typer.Option(help="candidates, full, graph.")] = "candidates",
    n_candidates: Annotated[int | None, typer.Option(min=1, help="Default: the engine's.")] = None,
    n_threads: Annotated[int, typer.Option(help="0: the engine's choice.")] = 0,
    n_gpu_layers: Annotated[int, typer.Option(help="-1: all.")] = -1,
    kv_type: Annotated[str, typer.Option(help="f16, f32, bf16, q8_0, q4_0.")] = "f16",
    profile: Annotated[bool, typer.Option("--profile", help="Show where a step's time goes.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Only the matrix kernels, types by rows, against ggml.")
    ] = False,
    isa: Annotated[str, typer.Option(help="With --kernels: their instruction set; empty: the one in use.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw into this folder; needs matplotlib.")] = None,
) -> None:
    """Measure decoding: plain, every fixed draft length and every policy in turns, ratios within one run."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    if isa and not kernels:
        raise typer.BadParameter("--isa needs --kernels")
    if kernels:
        from dspark_cpp.bench_kernels import run_kernel_bench

        timings = run_kernel_bench(n_threads=n_threads, isa=isa)
        if json_file is not None:
            rows = [asdict(timing) for timing in timings]
            json_file.write_text(json.dumps({"kind": "dspark bench --kernels", "rows": rows}, indent=1) + "\n", "utf-8")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    if plots is not None:
        check_drawing()  # before minutes of measuring
    rates = parse_rates(synthetic_acceptance) if synthetic_acceptance else None
    options: dict[str, Any] = {
        "head": head,
        "n_candidates": n_candidates,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
        "kv_type": kv_type,
    }
    synthetic = None
    if rates is not None:
        synthetic = _core.SyntheticAcceptance(
            rates=list(rates.values()), spread=synthetic_spread, noise=synthetic_noise, bias=synthetic_bias
        )
        console.print(NO_TEXT, style="bold yellow", soft_wrap=True)
    with _files(target, draft) as (target_file, draft_file):
        pair = Pair(target_file, draft_file, synthetic, **options)
        workload = Workload.build(_questions(prompts, rates), lambda text: _tokenize(pair.target, text), prompt_tokens)
        cells = _cells(workload, domains, temperatures, concurrency)
        ignores_end = rates is not None or ignore_eos
        plan = Plan(n_tokens, n_prompts, repeats, budget, ignores_end, run_seconds, n_more_repeats=2 * repeats)
        runs, reports = _measure_all(console, pair, workload, cells, ways_of(policies, pair.block_size), plan)
    if profile:
        _show_splits(console, reports)
    about = {"asked": asked, "target": pair.target.description, "drafter": pair.drafter.description}
    if rates is not None:
        about |= {"no_text": NO_TEXT, "rates": dict(rates)}
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(runs, reports, about), indent=1) + "\n", encoding="utf-8")
    if plots is not None:
        for path in draw_all(reports, plots, NO_TEXT if rates is not None else ""):
            console.print(str(path), soft_wrap=True)


def _questions(prompts: Path | None, rates: Rates | None) -> dict[str, list[str]]:
    """Return questions by domain; domains of synthetic acceptance ask all of them."""
    questions = read_questions(prompts)
    if rates is None:
        return questions
    texts = [text for each in questions.values() for text in each]
    return dict.fromkeys(rates, texts)


@contextmanager
def _files(target: str, draft: str | None) -> Iterator[tuple[str, str]]:
    """Resolve the names of the pair; a random drafter lives as long as the benchmark."""
    is_demo = target == "demo"
    target_file = str(_DEMO / "target.gguf") if is_demo else target
    if draft is None and not is_demo:
        raise ValueError("draft must be a GGUF file or `random` for a target other than `demo`, got none")
    if draft != "random":
        yield target_file, draft or str(_DEMO / "drafter.gguf")
        return
    from dspark_cpp.bench.random_pair import write_random_drafter

    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "drafter.gguf"
        write_random_drafter(path, Path(target_file), "q8_0")
        yield target_file, str(path)


def _tokenize(model: _core.Model, question: str) -> list[int]:
    if model.chat_template is None:
        return model.tokenize(question)
    text = render_chat(model, [{"role": "user", "content": question}])
    return without_second_bos(model, model.tokenize(text))


def _cells(workload: Workload, domains: str, temperatures: str, concurrency: str) -> list[Cell]:
    known = [*workload.prompts, *([MIXED] if len(workload.prompts) > 1 else [])]
    names = known if domains == "all" else domains.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"domains must be among {', '.join(known)}, got {', '.join(unknown)}")
    return [
        Cell(name, float(temperature), int(n_streams))
        for n_streams in concurrency.split(",")
        for temperature in temperatures.split(",")
        for name in names
    ]


def _measure_all(
    console: Console, pair: Pair, workload: Workload, cells: list[Cell], ways: list[str], plan: Plan
) -> tuple[list[Run], list[CellReport]]:
    runs: list[Run] = []
    reports: list[CellReport] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cells) * len(ways) * plan.n_repeats)
        turns = measure(pair, workload, cells, ways, plan, lambda label: progress.update(task, advance=1))
        for own in turns:
            runs += own
            reports.append(report_cell(own))
            console.print(cell_table(reports[-1]))
    console.print(summary_table(reports))
    for name, value in summary(reports).items():
        console.print(f"{name:<28} {'-' if value is None else f'{value:.3g}'}")
    return runs, reports


def _show_splits(console: Console, reports: list[CellReport]) -> None:
    for report in reports:
        for way in dict.fromkeys(("plain", report.best, "adaptive")):
            if way in report.ways:
                console.print(step_split(report, way), soft_wrap=True)
