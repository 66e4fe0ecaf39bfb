"""Pulling: files of the hub into blobs, told step by step in Ollama's words.

A download goes to `partial/` under the digest that the hub promises, survives a crash there, is checked as a whole and
only then becomes a blob. Must not know: manifests.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, TypeAlias

from dspark_cpp.errors import PullError
from dspark_cpp.store.blobs import BlobStore
from dspark_cpp.store.hub import HubFile, download

__all__ = ["Record", "pull_file"]

Record: TypeAlias = dict[str, Any]

_REPORT_SECONDS = 0.1
_WAIT_SECONDS = 0.5
_HASH_BYTES = 1 << 24
_SPARE_BYTES = 1 << 26


def pull_file(blobs: BlobStore, file: HubFile) -> Iterator[Record]:
    """Bring a file of the hub into the store, unless it is there; yields progress records.

    Closing the iterator stops the download; the next pull goes on from there, in this process or another.

    Raises
    ------
    PullError
        If the hub does not deliver, its bytes are not what it promised, or the disk is full.
    """
    if blobs.has(file.digest):
        yield _progress(file, file.size)
        return
    while not blobs.has(file.digest):
        try:
            with blobs.partial(file.digest) as partial:
                yield from _fill(blobs, file, partial)
        except BlockingIOError:
            yield {"status": f"waiting for another pull of {file.name}"}
            time.sleep(_WAIT_SECONDS)


def _fill(blobs: BlobStore, file: HubFile, partial: BinaryIO) -> Iterator[Record]:
    if blobs.has(file.digest):  # another pull was faster
        return
    n_old = partial.seek(0, 2)
    yield from _download(blobs, file, partial)
    found = yield from _hash(partial)
    if found != file.digest and n_old:  # what an earlier pull left may be at fault: once more, from the start
        partial.truncate(0)
        yield from _download(blobs, file, partial)
        found = yield from _hash(partial)
    if found != file.digest:
        partial.truncate(0)
        raise PullError(f"{file.name} of {file.repo} must have the digest {file.digest}, got {found}")
    blobs.keep_partial(partial, file.digest)


def _download(blobs: BlobStore, file: HubFile, partial: BinaryIO) -> Iterator[Record]:
    n_bytes = partial.seek(0, 2)
    if n_bytes > file.size:
        n_bytes = partial.seek(partial.truncate(0))
    free = shutil.disk_usage(blobs.root).free
    if file.size - n_bytes + _SPARE_BYTES > free:
        raise PullError(f"cannot download {file.name}: {file.size - n_bytes} bytes to come, the disk has {free} left")
    yield _progress(file, n_bytes)
    reported = time.monotonic()
    for n_bytes in download(file, partial):
        if time.monotonic() - reported > _REPORT_SECONDS:
            yield _progress(file, n_bytes)
            reported = time.monotonic()
    if n_bytes != file.size:
        partial.truncate(0)
        raise PullError(f"{file.name} of {file.repo} must have {file.size} bytes, got {n_bytes}")
    yield _progress(file, n_bytes)


def _hash(partial: BinaryIO) -> Generator[Record, None, str]:
    """Yield while hashing, so that a pull can be stopped here too; returns the digest."""
    digest = hashlib.sha256()
    partial.seek(0)
    while chunk := partial.read(_HASH_BYTES):
        digest.update(chunk)
        if partial.tell() % (_HASH_BYTES * 64) == 0:
            yield {"status": "verifying sha256 digest"}
    yield {"status": "verifying sha256 digest"}
    return f"sha256:{digest.hexdigest()}"


def _progress(file: HubFile, n_bytes: int) -> Record:
    short = file.digest.removeprefix("sha256:")[:12]
    return {"status": f"pulling {short}", "digest": file.digest, "total": file.size, "completed": n_bytes}
