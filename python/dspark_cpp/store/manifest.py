"""What one name of the store stands for, and its form on the disk: a small JSON file.

Must not know: folders, locks, GGUF.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from dspark_cpp.errors import StoreError
from dspark_cpp.store.names import ModelName, checked_digest

__all__ = ["Details", "Manifest", "ModelFile", "checked_message", "checked_text"]

_SCHEMA = 1
_ROLES = ("system", "user", "assistant", "tool")
_NEVER = datetime.fromtimestamp(0, UTC)
_PLACE = ("name", "modified_at")  # differ between copies of one model


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One GGUF file of a model: a blob of the store, or a file of the user's that is used where it lies.

    Attributes
    ----------
    size
        Bytes.
    header_size, header_digest
        Length and digest of the part before the tensors: cheap to check, unlike the whole file.
    digest
        Digest of the whole file, for a blob; None for a file in place.
    path, mtime_ns
        Absolute path and time of change, for a file in place; None for a blob.
    origin
        Where it came from, such as `hf.co/owner/repo/file.gguf@revision`.
    """

    size: int
    header_size: int
    header_digest: str
    digest: str | None = None
    path: str | None = None
    mtime_ns: int | None = None
    origin: str | None = None

    @property
    def id(self) -> str:
        """What tells this file from others: its digest, for a file in place that of its header."""
        return self.digest or self.header_digest


@dataclass(frozen=True, slots=True)
class Details:
    """What Ollama's clients show beside a name; texts are empty when the file does not say."""

    family: str = ""
    parameter_size: str = ""
    quantization_level: str = ""
    format: str = "gguf"
    parent_model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return them as `details` of Ollama's answers."""
        return asdict(self) | {"families": [self.family] if self.family else []}


@dataclass(frozen=True, slots=True)
class Manifest:
    """One model of the store.

    Attributes
    ----------
    name
        `[host/][owner/]model:tag`.
    target
        Files of the target: one, or all parts of a split model in order.
    draft
        File of the drafter, None without one.
    system, template, license
        Texts, None when not given. The template is kept for Ollama's clients; the file's own one is used.
    parameters
        Options by Ollama's names, as `/api/chat` takes them in `options`.
    messages
        Conversation that every chat begins with: `{"role": ..., "content": ...}`.
    details
        What clients show.
    modified_at
        When it was written (UTC).
    target_path, draft_path
        Where the files lie, filled in by the store; for a split target its first part.
    """

    name: str
    target: tuple[ModelFile, ...]
    draft: ModelFile | None = None
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, str], ...] = ()
    details: Details = Details()
    modified_at: datetime = _NEVER
    target_path: Path = Path()
    draft_path: Path | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def files(self) -> tuple[ModelFile, ...]:
        """All files, the drafter last."""
        return self.target if self.draft is None else (*self.target, self.draft)

    @property
    def blobs(self) -> frozenset[str]:
        """Digests of the blobs it needs."""
        return frozenset(file.digest for file in self.files if file.digest is not None)

    @property
    def digest(self) -> str:
        """`sha256:...` over everything but the name and the time: copies have the same one."""
        return f"sha256:{hashlib.sha256(_encode(self._content())).hexdigest()}"

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        return _encode({"schema": _SCHEMA, "name": self.name, **self._content()})

    @classmethod
    def from_json(cls, data: bytes, modified_at: datetime) -> Self:
        """Read a manifest.

        Raises
        ------
        StoreError
            If these are not the bytes of one.
        """
        try:
            found = json.loads(data)
            if found.pop("schema") != _SCHEMA:
                raise ValueError("it was written by another version")
            return cls(**_decode(found), modified_at=modified_at)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(f"cannot read manifest: {type(error).__name__}: {error}") from None

    def _content(self) -> dict[str, Any]:
        names = {item.name for item in fields(self)} - {*_PLACE, "target_path", "draft_path"}
        plain = asdict(replace(self, target_path=Path(), draft_path=None))
        return {name: plain[name] for name in sorted(names)}


def _encode(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _decode(found: dict[str, Any]) -> dict[str, Any]:
    ModelName.parse(found["name"])
    target = tuple(_decode_file(item) for item in found["target"])
    if not target:
        raise ValueError("it has no target")
    draft = None if found.get("draft") is None else _decode_file(found["draft"])
    messages = tuple(dict(message) for message in found.get("messages", ()))
    return found | {
        "target": target,
        "draft": draft,
        "messages": messages,
        "parameters": dict(found.get("parameters", {})),
        "details": Details(**found.get("details", {})),
    }


def _decode_file(found: dict[str, Any]) -> ModelFile:
    file = ModelFile(**found)
    if (file.digest is None) == (file.path is None):
        raise ValueError("a file must have either a digest or a path")
    if file.digest is not None:
        checked_digest(file.digest)
    return file


def checked_text(name: str, text: str) -> str:
    """Return a text of a manifest.

    Raises
    ------
    TypeError
        If it is none.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a text, got {type(text).__name__}")
    return text


def checked_message(message: Mapping[str, str]) -> dict[str, str]:
    """Return a message that every conversation begins with.

    Raises
    ------
    ValueError
        If it has no role or no content.
    """
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(f"message must have a role of {', '.join(_ROLES)} and a content, got {dict(message)!r}")
    return {"role": role, "content": content}
