"""The files of the store, named by what is in them.

A blob under its final name is complete and has been checked: it gets there by one rename. Whatever is still being
written lies in `incoming/` and carries its writer's lock, so that the leftovers of a crash can be told from work in
progress. Must not know: manifests.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dspark_cpp.errors import BlobError
from dspark_cpp.store.files import is_locked, locked, sync_folder
from dspark_cpp.store.names import checked_digest

__all__ = ["BlobStore", "BlobWriter", "hash_file"]


class BlobWriter:
    """Takes the bytes of one blob as they come; `BlobStore.writer` makes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.n_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append bytes."""
        self._file.write(chunk)
        self._hash.update(chunk)
        self.n_bytes += len(chunk)

    @property
    def digest(self) -> str:
        """Digest of all bytes so far."""
        return f"sha256:{self._hash.hexdigest()}"


class BlobStore:
    """Blobs below one folder. Any thread, any process.

    Parameters
    ----------
    root
        The store's folder; `blobs/` and `incoming/` are made in it when the first blob comes.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "blobs"
        self._incoming = root / "incoming"
        self._lock = root / "locks" / "incoming"

    def path(self, digest: str) -> Path:
        """Return where the blob of this digest lies, or would lie."""
        return self._folder / checked_digest(digest).replace(":", "-")

    def has(self, digest: str) -> bool:
        """Return whether the blob is here; one that nobody references yet is then kept for another day."""
        path = self.path(digest)
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def put(self, digest: str, chunks: Iterable[bytes]) -> Path:
        """Store a stream of bytes and return its path.

        Raises
        ------
        BlobError
            If the bytes have another digest; nothing is kept then.
        """
        with self.writer(digest) as writer:
            for chunk in chunks:
                writer.write(chunk)
        return self.path(digest)

    @contextlib.contextmanager
    def writer(self, digest: str) -> Iterator[BlobWriter]:
        """Take a blob chunk by chunk; at the end of the `with` block its digest is checked and it is kept.

        Raises
        ------
        BlobError
            If the bytes have another digest; nothing is kept then, nor when the block is left by an exception.
        """
        digest = checked_digest(digest)
        with self._open_incoming() as file:
            writer = BlobWriter(file)
            yield writer
            if writer.digest != digest:
                raise BlobError(f"digest of the bytes must be {digest}, got {writer.digest} ({writer.n_bytes} bytes)")
            file.flush()
            self._keep(file, Path(file.name), digest)

    def adopt(self, path: Path, digest: str | None = None) -> str:
        """Move a complete file of the same file system into the store and return its digest.

        Raises
        ------
        BlobError
            If its digest is not the expected one; the file stays where it is.
        """
        found = hash_file(path)
        if digest is not None and found != checked_digest(digest):
            raise BlobError(f"digest of {path.name} must be {digest}, got {found}: the file is damaged")
        with path.open("rb") as file:
            self._keep(file, path, found)
        return found

    def remove(self, digest: str) -> None:
        """Delete a blob; one that is not here is no error. Who has it open keeps it until it is closed."""
        self.path(digest).unlink(missing_ok=True)

    def collect(self, kept: Collection[str], min_age_s: float) -> int:
        """Delete blobs that are not in `kept` and were not touched for `min_age_s`, and what crashed writers left.

        Returns
        -------
        int
            Bytes freed.
        """
        stale = time.time() - min_age_s
        names = {digest.replace(":", "-") for digest in kept}
        orphans = [path for path in _files(self._folder) if path.name not in names]
        n_bytes = sum(_unlink(path) for path in orphans if path.stat().st_mtime < stale)
        with locked(self._lock):
            return n_bytes + sum(_unlink(path) for path in _files(self._incoming) if not is_locked(path))

    @contextlib.contextmanager
    def _open_incoming(self) -> Iterator[BinaryIO]:
        self._incoming.mkdir(parents=True, exist_ok=True)
        path = self._incoming / secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            with locked(self._lock):  # nobody collects it between its birth and its lock
                file = stack.enter_context(path.open("xb"))
                stack.callback(path.unlink, missing_ok=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _keep(self, file: BinaryIO, path: Path, digest: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.fsync(file.fileno())
        path.replace(self.path(digest))
        sync_folder(self._folder)


def hash_file(path: Path) -> str:
    """Return the digest of a whole file."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _unlink(path: Path) -> int:
    try:
        n_bytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:  # its writer was faster
        return 0
    return n_bytes
