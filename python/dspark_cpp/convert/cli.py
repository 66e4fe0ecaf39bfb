"""The command line of conversion: `dspark-convert`, and the function behind `dspark inspect`. Parses, calls, prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dspark_cpp.convert.conversion import ConvertOptions, ConvertReport, convert
from dspark_cpp.convert.inspect import ModelSummary, compare_files, summarize
from dspark_cpp.convert.tensors import OUT_TYPES
from dspark_cpp.errors import DSparkError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_MIB = 1 << 20


@app.command()
def convert_command(
    checkpoint: Annotated[
        str, typer.Argument(help="Checkpoint directory of the drafter, or a hub id like owner/name.")
    ],
    target: Annotated[Path, typer.Option("--target", "-t", help="GGUF file of the target model.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write; without it, <checkpoint>-<outtype>.gguf here.")
    ] = None,
    outtype: Annotated[str, typer.Option("--outtype", help=f"One of {', '.join(OUT_TYPES)}.")] = "q8_0",
    own_embeddings: Annotated[
        bool, typer.Option("--own-embeddings", help="Write embedding and output head too, not borrowing the target's.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="Model name inside the file.")] = "",
    draft_vocab: Annotated[
        int, typer.Option("--draft-vocab", metavar="N", help="Propose N tokens only: faster drafts; 0: all.")
    ] = 0,
    corpus: Annotated[
        Path | None,
        typer.Option("--corpus", help="Text (or .jsonl with `text`) whose most frequent tokens the N are."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show the plan; write nothing.")
    ] = False,
) -> None:
    """Convert a DSpark drafter checkpoint to one GGUF file that dspark-cpp and llama.cpp read."""
    path = output or Path(f"{Path(checkpoint).name}-{outtype}.gguf")
    options = ConvertOptions(
        checkpoint, target, path, outtype.lower(), own_embeddings, dry_run, name, draft_vocab, corpus
    )
    with report_errors():
        report = _convert_with_bar(options)
        _print_report(report, dry_run)


def inspect_command(
    file: Annotated[Path, typer.Argument(help="GGUF file of a target or a drafter.")],
    target: Annotated[Path | None, typer.Option("--target", "-t", help="Does the drafter fit this target?")] = None,
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="Does the target fit this drafter?")] = None,
    metadata: Annotated[bool, typer.Option("--metadata", "-m", help="Show every key of the file too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (with every key).")] = False,
) -> None:
    """Show what a target or drafter GGUF file is, and whether two of them fit together (exit status 1 if not)."""
    if target is not None and draft is not None:
        raise typer.BadParameter("give --target or --draft, not both")
    with report_errors():
        summary = summarize(file)
        reasons = _judge_pair(file, target, draft)
        if as_json:
            print(json.dumps(summary.to_dict() | ({} if reasons is None else _pair_to_dict(reasons)), indent=2))
        else:
            _print_summary(summary, reasons, metadata)
    if reasons or summary.problems:
        raise typer.Exit(1)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn this package's errors, and wrong arguments, into one line on stderr and exit status 1."""
    try:
        yield
    except (DSparkError, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run `dspark-convert`."""
    app()


def _convert_with_bar(options: ConvertOptions) -> ConvertReport:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    is_quiet = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=is_quiet) as bar:
        task = bar.add_task("reading", total=1.0)
        return convert(options, lambda name, fraction: bar.update(task, description=name, completed=fraction))


def _console() -> Console:
    # File names and metadata are shown as they are; and piped output must not be folded at the 80 columns that rich
    # assumes for it.
    width = None if sys.stdout.isatty() else 160
    return Console(highlight=False, markup=False, emoji=False, width=width)


def _print_report(report: ConvertReport, is_dry_run: bool) -> None:
    console = _console()
    table = Table(box=None, pad_edge=False)
    for heading in ("tensor", "type"):
        table.add_column(heading)
    for heading in ("shape", "KiB", "largest error", "relative RMS error"):
        table.add_column(heading, justify="right")
    table.add_column("note")
    for t in report.tensors:
        errors = ("-", "-") if is_dry_run else (f"{t.max_error:.2e}", f"{t.relative_error:.2e}")
        shape = " x ".join(map(str, t.shape))
        table.add_row(t.name, t.type.lower(), shape, f"{t.n_bytes / 1024:.1f}", *errors, t.note)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    outcome = "would write" if is_dry_run else "wrote and verified"
    console.print(
        f"{outcome} {report.output}: {len(report.tensors)} tensors, {report.n_bytes / _MIB:.1f} MiB", soft_wrap=True
    )


def _judge_pair(file: Path, target: Path | None, draft: Path | None) -> list[str] | None:
    if target is not None:
        return compare_files(target, file)
    return None if draft is None else compare_files(file, draft)


def _pair_to_dict(reasons: list[str]) -> dict[str, Any]:
    return {"fits": not reasons, "reasons": reasons}


def _print_summary(summary: ModelSummary, reasons: list[str] | None, with_metadata: bool) -> None:
    console = _console()
    console.print(f"{summary.path}: {summary.kind}, {summary.n_bytes / _MIB:.1f} MiB", soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary.facts.items():
        table.add_row(name.replace("_", " "), _show(value))
    for name, counts in summary.types.items():
        table.add_row(name.lower(), f"{counts['n_tensors']} tensors, {counts['n_bytes'] / _MIB:.1f} MiB")
    calibration = summary.calibration or {"calibration": "none"}
    for name, value in [*calibration.items(), *(summary.metadata.items() if with_metadata else ())]:
        table.add_row(name, _show(value))
    console.print(table)
    _print_verdict(console, summary, reasons)


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print_verdict(console: Console, summary: ModelSummary, reasons: list[str] | None) -> None:
    for heading, lines in (("problem", summary.problems), ("note", summary.notes)):
        for line in lines:
            console.print(f"{heading}: {line}", soft_wrap=True)
    if reasons is not None:
        console.print("the two do not fit together:" if reasons else "the two fit together", soft_wrap=True)
        for reason in reasons:
            console.print(f"- {reason}", soft_wrap=True)
