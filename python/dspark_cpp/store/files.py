"""Writing files so that a crash at any moment leaves either the old or the new one, and locks between processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "default_root",
    "is_locked",
    "list_below",
    "locked",
    "remove_file",
    "sync_folder",
    "write_atomically",
]


def default_root() -> Path:
    """Return the store's folder: `DSPARK_MODELS`, else `~/.dspark/models`."""
    return Path(os.environ.get("DSPARK_MODELS") or "~/.dspark/models").expanduser()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file: beside its place, to the disk, then by one rename.

    The caller holds the lock of the folder; what a crash leaves behind ends in `.tmp` and is collected later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:64]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that excludes other threads and processes; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(path: Path) -> bool:
    """Return whether somebody holds the lock on this file; a file that is gone counts as held."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return True
    return False


def list_below(folder: Path, pattern: str) -> list[Path]:
    """Return the paths that fit a pattern in order, also while others remove folders here."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # a folder went between its name and its contents
            return sorted(folder.glob(pattern))


def remove_file(path: Path, top: Path) -> None:
    """Remove a file, and the folders above it while they are empty, but not `top`."""
    path.unlink()
    folder = path.parent
    sync_folder(folder)
    while folder != top and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
