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

__all__ = ["BlobStore", "BlobWriter"]

_PARTIAL_AGE_S = 7 * 24 * 3600.0


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
        self.root = root
        self._folder = root / "blobs"
        self._incoming = root / "incoming"
        self._partial = root / "partial"
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

    @contextlib.contextmanager
    def partial(self, digest: str) -> Iterator[BinaryIO]:
        """Open the beginning of a blob that is being fetched, for this caller alone; it survives a crash.

        Raises
        ------
        BlockingIOError
            If somebody else is fetching it.
        """
        path = self._partial / self.path(digest).name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                is_this = path.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                is_this = False
            if not is_this:
                raise BlockingIOError  # it became a blob or was collected between the two calls
            yield file

    def keep_partial(self, file: BinaryIO, digest: str) -> None:
        """Make a blob of a complete file that `partial` opened and the caller has checked."""
        file.flush()
        self._keep(file, self._partial / self.path(digest).name, digest)

    def remove(self, digest: str) -> None:
        """Delete a blob; one that is not here is no error. Who has it open keeps it until it is closed."""
        self.path(digest).unlink(missing_ok=True)

    def collect(self, kept: Collection[str], min_age_s: float) -> int:
        """Delete blobs that are not in `kept` and were not touched for `min_age_s`, and what crashed writers left.

        Downloads that were interrupted stay for a week: the next pull goes on from there.

        Returns
        -------
        int
            Bytes freed.
        """
        stale = time.time() - min_age_s
        names = {digest.replace(":", "-") for digest in kept}
        orphans = [path for path in _files(self._folder) if path.name not in names]
        n_bytes = sum(_unlink(path) for path in orphans if path.stat().st_mtime < stale)
        n_bytes += sum(map(self._collect_partial, _files(self._partial)))
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

    def _collect_partial(self, path: Path) -> int:
        """Delete an old download whose lock is free; who opens it meanwhile finds that it is gone and tries again."""
        with contextlib.suppress(BlockingIOError, FileNotFoundError), path.open("rb") as file:  # it may become a blob
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _unlink(path) if path.stat().st_mtime < time.time() - _PARTIAL_AGE_S else 0
        return 0

    def _keep(self, file: BinaryIO, path: Path, digest: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        os.fsync(file.fileno())
        path.replace(self.path(digest))
        sync_folder(self._folder)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _unlink(path: Path) -> int:
    try:
        n_bytes = path.stat().st_size
        path.unlink()
    except FileNotFoundError:  # its writer was faster
        return 0
    return n_bytes
