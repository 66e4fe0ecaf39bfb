"""Names of models and digests of blobs: what is allowed, and where a manifest of that name lies.

Every part of a name becomes one part of a path, so the grammar is the store's fence: no part can be empty, begin with a
dot or hold a separator. Must not know: files.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Self
from urllib.parse import urlsplit

__all__ = ["DEFAULT_TAG", "ModelName", "checked_digest", "hub_endpoint"]

DEFAULT_TAG = "latest"
_NO_NAMESPACE = "_"  # no namespace may begin with it, so the two kinds of names never meet
_HUB_HOSTS = ("hf.co", "huggingface.co")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_MAX_SHOWN = 100


def hub_endpoint() -> str:
    """Return the address of the hub that models may be pulled from: `HF_ENDPOINT`, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@dataclass(frozen=True, slots=True)
class ModelName:
    """`[host/][namespace/]model[:tag]`, as the user wrote it; two names are the same model when their `key` is.

    Attributes
    ----------
    host
        The hub's name when it was given (`hf.co`), else None. It is shown but is no part of the key.
    namespace
        Owner of a hub repository, None for a model made here.
    model, tag
        The rest; the tag is `latest` when none was given.
    """

    host: str | None
    namespace: str | None
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name.

        Raises
        ------
        ValueError
            If it is no name of a model, or names a host that is not the hub.
        """
        if not isinstance(text, str):
            raise TypeError(f"model name must be a text, got {type(text).__name__}")
        path, host = text.split("/"), None
        if len(path) == 3:
            host = _checked_host(path.pop(0))
        path[-1], colon, tag = path[-1].partition(":")
        tag = tag if colon else DEFAULT_TAG
        if len(path) > 2 or not all(map(_PART.fullmatch, path)) or not _TAG.fullmatch(tag):
            shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
            raise ValueError(f"model name must read [owner/]model[:tag], got {shown!r}")
        return cls(host, path[0] if len(path) == 2 else None, path[-1], tag)

    def __str__(self) -> str:
        path = "/".join(part for part in (self.host, self.namespace, self.model) if part)
        return f"{path}:{self.tag}"

    @property
    def repo(self) -> str | None:
        """The hub repository of this name, None for a name without owner."""
        return None if self.namespace is None else f"{self.namespace}/{self.model}"

    @property
    def key(self) -> PurePosixPath:
        """Where the manifest lies below the folder of manifests; names that differ in case only are one model."""
        parts = (self.namespace or _NO_NAMESPACE, self.model, self.tag)
        return PurePosixPath(*(part.lower() for part in parts))


def checked_digest(text: str) -> str:
    """Return a digest as `sha256:` and 64 small hexadecimal digits (`sha256-` is read as well).

    Raises
    ------
    ValueError
        If it is anything else.
    """
    match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f"digest must be sha256: and 64 hexadecimal digits, got {str(text)[:_MAX_SHOWN]!r}")
    return f"sha256:{match[1].lower()}"


def _checked_host(host: str) -> str:
    configured = urlsplit(hub_endpoint()).netloc
    if host.lower() not in (*_HUB_HOSTS, configured.lower()):
        raise ValueError(f"host of a model must be the hub ({configured}), got {host[:_MAX_SHOWN]!r}")
    return host
