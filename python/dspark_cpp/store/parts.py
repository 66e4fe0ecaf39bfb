"""Targets that come in several files.

llama.cpp finds the other parts by the name of the first, and blobs have no such names: so the store keeps a folder of
links for each of these targets, named as llama.cpp looks for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

__all__ = ["collect_links", "group_parts", "in_order", "linked_path", "parts_beside"]

_PART = re.compile(r".*-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)


def in_order(names: Iterable[str]) -> list[str]:
    """Return the names of a target's files in order: one, or all parts of a split model.

    Raises
    ------
    ValueError
        If a part is missing or one is too many.
    """
    names = sorted(names)
    if len(names) == 1 and _PART.fullmatch(names[0]) is None:
        return names
    found = [match.groups() for name in names if (match := _PART.fullmatch(name))]
    wanted = [(f"{i:05}", f"{len(names):05}") for i in range(1, len(names) + 1)]
    if not names or found != wanted:
        raise ValueError(
            f"files must be one GGUF file or all parts of one split model, got {', '.join(names) or 'none'}"
        )
    return names


def group_parts(names: Iterable[str]) -> list[list[str]]:
    """Return files that belong together: each model's parts in order, models by name."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name)
        key = (name, "") if match is None else (name[: match.start(1)], match[2])
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def parts_beside(path: Path) -> list[Path]:
    """Return all parts of the split model that this file is the first of; just the file when it is no part."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[1]) != 1:
        return [path]
    pattern = path.name[: match.start(1)] + "{:05}" + path.name[match.end(1) :]
    return [path.with_name(pattern.format(i)) for i in range(1, int(match[2]) + 1)]


def linked_path(folder: Path, blobs: Sequence[Path]) -> Path:
    """Return the first of the links to the parts of a split model, making them where they are missing.

    Parameters
    ----------
    folder
        Where the store keeps links.
    blobs
        The parts in order.
    """
    home = folder / _name(blobs)
    links = [home / f"model-{i:05}-of-{len(blobs):05}.gguf" for i in range(1, len(blobs) + 1)]
    while not all(map(os.path.lexists, links)):
        with contextlib.suppress(FileNotFoundError):  # `collect_links` may take the folder away in between
            _make_links(home, dict(zip(links, blobs, strict=True)))
    return links[0]


def collect_links(folder: Path, kept: Collection[Sequence[Path]]) -> None:
    """Remove the links of all targets but these."""
    names = {_name(blobs) for blobs in kept}
    for home in folder.iterdir() if folder.is_dir() else ():
        if home.name not in names:
            shutil.rmtree(home, ignore_errors=True)


def _make_links(home: Path, blobs: Mapping[Path, Path]) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for link, blob in blobs.items():
        with contextlib.suppress(FileExistsError):
            link.symlink_to(os.path.relpath(blob, home))


def _name(blobs: Sequence[Path]) -> str:
    return hashlib.sha256("\n".join(blob.name for blob in blobs).encode()).hexdigest()[:32]
