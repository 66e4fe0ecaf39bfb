"""How models look on a terminal: Ollama's tables and units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from dspark_cpp.store.manifest import Manifest

__all__ = [
    "describe_age",
    "describe_model",
    "describe_parameters",
    "describe_processor",
    "format_bytes",
    "format_table",
]

_GAP = "    "
_UNITS = (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3))
_SPANS = (
    ("year", 365 * 86400),
    ("month", 30 * 86400),
    ("week", 7 * 86400),
    ("day", 86400),
    ("hour", 3600),
    ("minute", 60),
)
_MAX_LICENSE_LINES = 2


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table without lines, as Ollama prints it."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = (_GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in lines)


def format_bytes(n: int) -> str:
    """Return a size in decimal units, with one digit after the point below ten."""
    for unit, size in _UNITS:
        if n >= size:
            value = n / size
            return f"{value:.0f} {unit}" if value >= 10 or n % size == 0 else f"{value:.1f} {unit}"
    return f"{n} B"


def describe_age(when: datetime, now: datetime | None = None) -> str:
    """Return how far a time lies back or ahead, in words."""
    seconds = ((now or datetime.now(UTC)) - when).total_seconds()
    for unit, length in _SPANS:
        if (n := int(abs(seconds) // length)) >= 1:
            text = f"{n} {unit}{'s' if n > 1 else ''}"
            return f"{text} ago" if seconds > 0 else f"{text} from now"
    return "Less than a minute ago" if seconds >= 0 else "Less than a minute from now"


def describe_model(manifest: Manifest) -> str:
    """Return what `dspark show` prints."""
    from dspark_cpp.store.model_files import list_capabilities

    blocks = [("Model", _target_rows(manifest))]
    if manifest.draft_path is not None:
        blocks.append(("Drafter", _drafter_rows(manifest)))
    blocks.append(("Capabilities", [(name, "") for name in list_capabilities(manifest.target_path)]))
    if manifest.parameters:
        blocks.append(("Parameters", list(_parameter_rows(manifest))))
    if manifest.system:
        blocks.append(("System", [(line, "") for line in _wrapped(manifest.system)]))
    if manifest.license:
        lines = [line.strip() for line in manifest.license.splitlines() if line.strip()]
        blocks.append(("License", [(line, "") for line in lines[:_MAX_LICENSE_LINES]]))
    return "\n\n".join(_block(title, rows) for title, rows in blocks) + "\n"


def describe_parameters(manifest: Manifest) -> str:
    """Return a model's own options, one a line, as `dspark show --parameters` prints them."""
    return "\n".join(f"{name:<30} {value}" for name, value in _parameter_rows(manifest))


def describe_processor(n_bytes: int, n_bytes_vram: int) -> str:
    """Return how much of a loaded model lies where."""
    if n_bytes <= 0:
        return "unknown"
    n_percent = round(100 * min(n_bytes_vram / n_bytes, 1.0))
    if n_percent in (0, 100):
        return "100% GPU" if n_percent else "100% CPU"
    return f"{100 - n_percent}%/{n_percent}% CPU/GPU"


def _block(title: str, rows: Sequence[tuple[str, str]]) -> str:
    width = max((len(name) for name, value in rows if value), default=0)
    lines = [f"    {name.ljust(width)}    {value}" if value else f"    {name}" for name, value in rows]
    return "\n".join([f"  {title}", *lines])


def _target_rows(manifest: Manifest) -> list[tuple[str, str]]:
    from dspark_cpp.convert.gguf_file import GGUFFile

    file, details = GGUFFile(manifest.target_path), manifest.details
    numbers = {
        name: file.get(f"{details.family}.{key}")
        for name, key in (("context length", "context_length"), ("embedding length", "embedding_length"))
    }
    return [
        ("architecture", details.family),
        ("parameters", details.parameter_size),
        *((name, str(value)) for name, value in numbers.items() if value is not None),
        ("quantization", details.quantization_level),
        *_place_rows(manifest.target[0].path),
    ]


def _drafter_rows(manifest: Manifest) -> list[tuple[str, str]]:
    from dspark_cpp.convert.inspect import summarize
    from dspark_cpp.store.model_files import describe

    assert manifest.draft is not None
    assert manifest.draft_path is not None
    facts, details = summarize(manifest.draft_path).facts, describe([manifest.draft_path])
    return [
        ("parameters", details.parameter_size),
        ("block size", str(facts["block_size"])),
        ("sequential head", str(facts["sequential_head"])),
        ("confidence head", str(facts["confidence_head"])),
        ("quantization", details.quantization_level),
        *_place_rows(manifest.draft.path),
    ]


def _place_rows(path: str | None) -> list[tuple[str, str]]:
    return [] if path is None else [("file", path)]


def _parameter_rows(manifest: Manifest) -> Iterable[tuple[str, str]]:
    for name, value in manifest.parameters.items():
        for item in value if isinstance(value, list) else [value]:
            yield name, _quoted(item)


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _wrapped(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in (textwrap.wrap(line, 100) or [""])]
