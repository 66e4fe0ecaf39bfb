"""The hub of models: which files a repository has, which of them a name means, and their bytes.

The hub's own library finds, names and authorizes; the bytes are read here, because its downloads start over after a
crash. Nothing but the configured hub (`HF_ENDPOINT`) is ever asked. Must not know: the store.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO, Self

from dspark_cpp.errors import PullError
from dspark_cpp.store.names import ModelName, hub_endpoint
from dspark_cpp.store.parts import group_parts

__all__ = ["HubFile", "HubSource", "choose_drafter", "choose_target", "download", "find_drafter", "list_files"]

_CHUNK_BYTES = 1 << 20
_N_ATTEMPTS = 5
_RETRY_SECONDS = 1.0
_FINAL_STATUSES = range(400, 500)
_TRANSIENT_STATUSES = (408, 416, 429)
_TIMEOUT_SECONDS = 10.0
# llama.cpp's quantizations, the one a user most likely wants first.
_PREFERRED = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q8_0", "Q6_K", "Q4_0", "F16", "BF16")
_PREFERRED_DRAFTERS = ("Q8_0", "F16", "BF16", "Q4_K_M")
_DRAFTER = re.compile(r"(?<![a-z])(draft|drafter|dspark|dflash)(?![a-z])", re.IGNORECASE)
_TARGET = re.compile(r"(?<![a-z])target(?![a-z])", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: `digest` is what the hub says its bytes hash to."""

    repo: str
    revision: str
    name: str
    size: int
    digest: str

    @property
    def origin(self) -> str:
        """Where it comes from, for the record."""
        return f"{self.repo}/{self.name}@{self.revision}"


@dataclass(frozen=True, slots=True)
class HubSource:
    """`[host/]owner/repo[:selector]`: a repository, and which of its files; None leaves the choice."""

    repo: str
    selector: str | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a source; a selector may also be the path of a file in the repository.

        Raises
        ------
        ValueError
            If it names no repository of the hub.
        """
        path, _, selector = text.partition(":")
        repo = ModelName.parse(path).repo
        if repo is None:
            raise ValueError(f"source must be a repository of the hub such as owner/repo:Q4_K_M, got {text[:100]!r}")
        return cls(repo, None if selector in ("", "latest") else selector)


def list_files(repo: str) -> list[HubFile]:
    """Return the GGUF files of a repository.

    Raises
    ------
    PullError
        If the hub does not answer or does not have it.
    ImportError
        If huggingface_hub is not installed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = HfApi(endpoint=hub_endpoint()).model_info(repo, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError:
        raise PullError(f"cannot pull {repo}: its owner must grant access first, and HF_TOKEN must be set") from None
    except RepositoryNotFoundError:
        raise PullError(f"{hub_endpoint()} has no repository {repo} (or it is private: set HF_TOKEN)") from None
    except Exception as error:  # which classes come from below it differs between versions of the library
        raise PullError(f"cannot list {repo} at {hub_endpoint()}: {_first_line(error)}") from error
    return [
        HubFile(repo, info.sha or "main", item.rfilename, item.size or 0, f"sha256:{item.lfs.sha256}")
        for item in info.siblings or ()
        if item.rfilename.lower().endswith(".gguf") and item.lfs is not None
    ]


def choose_target(files: Sequence[HubFile], selector: str | None) -> list[HubFile]:
    """Return the files of the target that a selector means, all parts of it in order.

    Parameters
    ----------
    files
        All GGUF files of a repository.
    selector
        A quantization, a file name, or None for a choice.

    Raises
    ------
    PullError
        If there is none; the message lists what there is.
    """
    models = [file for file in files if not _NO_MODEL.search(file.name)]
    targets = [file for file in models if not _is_drafter(file)] or models
    return _choose(targets if selector is None else [*targets, *models], selector, _PREFERRED)


def choose_drafter(files: Sequence[HubFile], selector: str | None) -> HubFile:
    """Return the drafter that a selector means; files that are named like one go first.

    Raises
    ------
    PullError
        If there is none.
    """
    models = [file for file in files if not _NO_MODEL.search(file.name)]
    drafters = [file for file in models if _is_drafter(file)] or models
    return _choose(drafters, selector, _PREFERRED_DRAFTERS)[0]


def find_drafter(files: Sequence[HubFile]) -> HubFile | None:
    """Return the drafter that lies beside a target in its repository, None if there is none."""
    drafters = [file for file in files if _is_drafter(file)]
    return _choose(drafters, None, _PREFERRED_DRAFTERS)[0] if drafters else None


def download(file: HubFile, destination: BinaryIO) -> Iterator[int]:
    """Append the missing bytes of a file, yielding how many it has after each piece.

    Parameters
    ----------
    file
        What to fetch.
    destination
        Open for reading and writing; what is in it is taken for the file's beginning.

    Raises
    ------
    PullError
        If the hub does not deliver. What came stays in `destination`, so that another call goes on from there.
    """
    n_failures, n_best = 0, 0
    while (n_best := max(n_best, destination.seek(0, 2))) < file.size:
        try:
            yield from _read_rest(file, destination)
            cause: Exception = PullError("the connection ended early")
        except PullError:
            raise
        except Exception as error:  # of the transport; GeneratorExit passes
            cause = error
        if destination.tell() >= file.size:
            break
        n_failures = n_failures + 1 if destination.tell() <= n_best else 0
        if n_failures >= _N_ATTEMPTS:
            raise PullError(f"cannot download {file.name} of {file.repo}: {_first_line(cause)}") from cause
        time.sleep(_RETRY_SECONDS if n_failures else 0)


def _read_rest(file: HubFile, destination: BinaryIO) -> Iterator[int]:
    from huggingface_hub import get_session, get_token, hf_hub_url

    n_bytes = destination.seek(0, 2)
    url = hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=hub_endpoint())
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={n_bytes}-"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS) as reply:
        _check_status(file, reply.status_code)
        if reply.status_code != 206:  # the range was ignored: from the start
            destination.seek(0)
            destination.truncate()
        for chunk in reply.iter_bytes(_CHUNK_BYTES):
            destination.write(chunk)
            yield destination.tell()


def _check_status(file: HubFile, status: int) -> None:
    if status in _FINAL_STATUSES and status not in _TRANSIENT_STATUSES:
        raise PullError(f"cannot download {file.name} of {file.repo}: the hub answers with status {status}")
    if status >= 400:
        raise ConnectionError(f"the hub answers with status {status}")


def _choose(files: Sequence[HubFile], selector: str | None, preferred: Sequence[str]) -> list[HubFile]:
    by_name = {file.name: file for file in files}
    models = group_parts(list(by_name))
    for wish in preferred if selector is None else (selector,):
        fitting = [names for names in models if _is_meant(names[0], wish)]
        if fitting:
            return [by_name[name] for name in min(fitting, key=lambda names: (len(names[0]), names[0]))]
    if selector is None and models:
        return [by_name[name] for name in models[0]]
    have = ", ".join(names[0] for names in models[:20]) or "no GGUF file"
    raise PullError(f"no file of the repository fits {selector or 'a model'!r}; it has {have}")


def _is_meant(name: str, wish: str) -> bool:
    stem = PurePosixPath(name).name.lower().removesuffix(".gguf")
    wish = wish.lower()
    if wish in (name.lower(), f"{stem}.gguf", stem):
        return True
    return re.search(rf"(?<![a-z0-9]){re.escape(wish)}(?![a-z0-9]|_[a-z0-9])", stem) is not None


def _is_drafter(file: HubFile) -> bool:
    name = PurePosixPath(file.name).name
    return bool(_DRAFTER.search(name)) and not _TARGET.search(name)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
