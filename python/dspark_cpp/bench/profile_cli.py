"""`dspark profile`: measures what passes cost on this machine and shows it. No arithmetic here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dspark_cpp.bench.cost_report import best_lengths, cost_table, draw_costs, length_table
from dspark_cpp.llm import LLM

__all__ = ["profile_command"]

_FILE_WIDTH = 120  # where the output is no terminal


def profile_command(
    target: Annotated[str, typer.Argument(help="GGUF file of the target, or `demo` for the bundled pair.")] = "demo",
    draft: Annotated[str | None, typer.Option("--draft", "-d", help="GGUF file of the drafter.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most streams at the same time.")] = 4,
    head: Annotated[str, typer.Option(help="candidates, full, graph.")] = "candidates",
    n_ctx: Annotated[int, typer.Option(help="Tokens of prompt and answer; 0: the model's.")] = 0,
    n_threads: Annotated[int, typer.Option(help="0: the engine's choice.")] = 0,
    n_gpu_layers: Annotated[int, typer.Option(help="-1: all.")] = -1,
    cpu_kernels: Annotated[str, typer.Option(help="auto (ours, where they are faster), ggml.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw into this folder; needs matplotlib.")] = None,
) -> None:
    """Show what a pass costs here by its size, where the cost jumps, and which draft length pays."""
    if draft is None and target != "demo":
        raise ValueError("draft must be a GGUF file for a target other than `demo`, got none")
    options: dict[str, Any] = {"head": head, "n_ctx": n_ctx, "n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    options |= {"n_parallel": concurrency, "cpu_kernels": cpu_kernels, "costs": "measure"}
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    with LLM.demo(**options) if draft is None else LLM(target, draft, **options) as llm:
        costs = llm.costs
        assert llm.drafter is not None
        block_size = llm.drafter.drafter_info.block_size
    streams = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < concurrency] + [concurrency]
    lengths = best_lengths(costs, block_size, streams)
    console.print(cost_table(costs))
    console.print(length_table(lengths))
    if json_file is not None:
        figures = {"kind": "dspark profile", "costs": costs, "best_lengths": [asdict(one) for one in lengths]}
        json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if plots is not None:
        for path in draw_costs(costs, lengths, plots):
            console.print(str(path), soft_wrap=True)
