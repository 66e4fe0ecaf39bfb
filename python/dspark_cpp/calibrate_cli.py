"""The arguments of `dspark calibrate`: to options, one run, its result on the terminal and in files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dspark_cpp import _core
from dspark_cpp.calibrate_run import CaseResult, calibrate_pair
from dspark_cpp.calibration import Calibration
from dspark_cpp.calibration_files import describe_target, side_file, write_gguf_keys, write_side_file
from dspark_cpp.calibration_prompts import Prompt, read_prompts, split_prompts
from dspark_cpp.calibration_report import case_table, draw_reliability, mean_ece, mean_noise, require_matplotlib
from dspark_cpp.config import CalibrateConfig, default_candidates

__all__ = ["calibrate_command"]

_DEMO = Path(__file__).parent / "demo"
_CONFIG = CalibrateConfig()
_N_PARALLEL = 8
_DEMO_TOKENS = 120_000  # minutes: the error that a finite sample shows by itself falls to 1 %
_FILE_WIDTH = 120  # where the output is no terminal


def calibrate_command(
    target: Annotated[str, typer.Argument(help="GGUF file of the target, or `demo` for the bundled pair.")],
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="GGUF file of the drafter.")] = None,
    data: Annotated[Path | None, typer.Option(help="Your own prompts: .jsonl, .json or plain text.")] = None,
    rules: Annotated[str, typer.Option(help="Verification rules.")] = ",".join(_CONFIG.rules),
    temperatures: Annotated[str, typer.Option(help="Sampling temperatures.")] = "0,0.7,1",
    n_tokens: Annotated[
        int, typer.Option(help=f"Tokens per rule and temperature; 0: {_CONFIG.n_tokens}, for the demo {_DEMO_TOKENS}.")
    ] = 0,
    max_tokens: Annotated[int, typer.Option(help="Most tokens per answer.")] = _CONFIG.max_tokens,
    seed: Annotated[int, typer.Option(help="Of the split and the answers.")] = _CONFIG.seed,
    n_ctx: Annotated[int, typer.Option(help="Tokens of prompt and answer; 0: as the prompts need.")] = 0,
    n_threads: Annotated[int, typer.Option(help="0: the engine's choice.")] = 0,
    n_gpu_layers: Annotated[int, typer.Option(help="-1: all.")] = -1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: beside the drafter.")] = None,
    write: Annotated[bool, typer.Option("--write", help="Also into the drafter's GGUF metadata.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Reliability diagram: .png or .svg.")] = None,
) -> None:
    """Fit a drafter's confidence to a target, and say how far it is from the truth on held-out prompts."""
    wanted = tuple(_as_number(part) for part in temperatures.split(","))
    n_tokens = n_tokens or (_DEMO_TOKENS if target == "demo" else _CONFIG.n_tokens)
    config = CalibrateConfig(
        rules=tuple(rules.split(",")), temperatures=wanted, n_tokens=n_tokens, max_tokens=max_tokens, seed=seed
    )
    if plot is not None:
        _check_plot(plot)
    target_path, draft_path, data = _paths(target, draft, data)
    target_model = _core.Model.load_target(str(target_path), n_gpu_layers=n_gpu_layers)
    drafter = _core.Model.load_drafter(str(draft_path), target_model, n_gpu_layers=n_gpu_layers)
    block_size = drafter.drafter_info.block_size
    halves = split_prompts(read_prompts(target_model, data), seed)
    n_ctx = n_ctx or _context_size(halves, config, block_size, target_model.n_ctx_train)
    engine = _core.Engine(
        target_model,
        drafter,
        n_ctx=n_ctx,
        n_parallel=_N_PARALLEL,
        n_threads=n_threads,
        n_candidates=default_candidates("candidates", drafter.drafter_info.head_type),
        policy="full",
    )
    try:
        cases = _run(engine, block_size, halves, config)
    finally:
        engine.close()
    calibration = Calibration(block_size, describe_target(target_path), tuple(case.entry for case in cases))
    _store(calibration, draft_path, output, write)
    if plot is not None and calibration.has_sts:
        draw_reliability(cases, plot)
        typer.echo(f"wrote {plot}")


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"temperatures must be numbers with commas between them, got {text!r}") from None


def _check_plot(path: Path) -> None:
    """Refuse what could not be drawn before minutes are spent on measuring."""
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"plot must end in .png or .svg, got {path}")
    require_matplotlib()


def _paths(target: str, draft: Path | None, data: Path | None) -> tuple[Path, Path, Path | None]:
    if target == "demo":
        return _DEMO / "target.gguf", draft or _DEMO / "drafter.gguf", data or _DEMO / "calibration_prompts.json"
    if draft is None:
        raise ValueError("draft must name the drafter's GGUF file, got nothing")
    return Path(target), draft, data


def _context_size(
    halves: tuple[list[Prompt], list[Prompt]], config: CalibrateConfig, block_size: int, n_ctx_train: int
) -> int:
    """As the longest prompt and its answer need: eight times a large model's own context would not fit."""
    longest = max(len(prompt) for half in halves for prompt in half)
    if longest >= n_ctx_train:
        raise ValueError(f"prompts must be shorter than the model's context of {n_ctx_train} tokens, got {longest}")
    return min(longest + config.max_tokens + block_size + 1, n_ctx_train)


def _run(
    engine: _core.Engine, block_size: int, halves: tuple[list[Prompt], list[Prompt]], config: CalibrateConfig
) -> list[CaseResult]:
    console, cases = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH), []
    n_cases = sum(len(config.rules) if temperature > 0 else 1 for temperature in config.temperatures)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("generating", total=n_cases * config.n_tokens)
        for case in calibrate_pair(engine, block_size, halves, config, lambda n: bar.advance(task, n)):
            cases.append(case)
            console.print(case_table(case))
    if not cases[0].entry.sts:
        console.print("This drafter has no confidence head: acceptance rates are stored, temperatures are not.")
        return cases
    for case in cases:
        before, scaled, after = (f"{mean_ece(figures):.2%}" for figures in (case.before, case.sts, case.after))
        console.print(
            f"mean ECE, {case.entry.rule} at {case.entry.temperature:g}: {before} -> {after} "
            f"(temperatures alone: {scaled}; finite sample: {mean_noise(case.after):.2%})"
        )
    return cases


def _store(calibration: Calibration, drafter: Path, output: Path | None, is_written: bool) -> None:
    path = output or side_file(drafter)
    write_side_file(calibration, path)
    typer.echo(f"wrote {path}")
    if is_written:
        write_gguf_keys(calibration, drafter)
        typer.echo(f"wrote the calibration into {drafter}")
