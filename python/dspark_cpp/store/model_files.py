"""GGUF files as the store sees them: sound or not, changed or not, and what they say about themselves."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gguf import LlamaFileType

from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.inspect import compare_files, summarize
from dspark_cpp.errors import BlobError, ModelLoadError, ModelMismatchError
from dspark_cpp.store.manifest import Details, ModelFile

__all__ = ["check_file", "check_pair_of_files", "describe", "list_capabilities", "record_blob", "record_in_place"]


def record_blob(path: Path, digest: str, origin: str | None = None) -> ModelFile:
    """Return the record of a blob that holds a GGUF file.

    Raises
    ------
    ModelLoadError
        If it does not.
    """
    size, header_size, header_digest, _ = _measure(path)
    return ModelFile(size, header_size, header_digest, digest=digest, origin=origin)


def record_in_place(path: Path) -> ModelFile:
    """Return the record of a GGUF file that stays where it is.

    Raises
    ------
    ModelLoadError
        If there is no sound GGUF file.
    """
    path = path.expanduser().resolve()
    size, header_size, header_digest, mtime_ns = _measure(path)
    return ModelFile(size, header_size, header_digest, path=str(path), mtime_ns=mtime_ns)


def check_file(file: ModelFile, path: Path) -> None:
    """Demand that a file is still the one that was recorded; reads its header only.

    Raises
    ------
    BlobError
        If it is missing, damaged or changed; the message says what to do.
    """
    advice = "create the model again" if file.digest is None else "remove the model and fetch it again"
    try:
        stat = path.stat()
        if stat.st_size != file.size:
            raise BlobError(f"{path} must have {file.size} bytes, got {stat.st_size}: it is damaged; {advice}")
        if file.mtime_ns is not None and stat.st_mtime_ns != file.mtime_ns:
            raise BlobError(f"{path} was changed after the model was created; {advice}")
        if _hash_start(path, file.header_size) != file.header_digest:
            raise BlobError(f"the header of {path} is damaged or was changed; {advice}")
    except OSError as error:
        raise BlobError(f"cannot read {path}: {error.strerror}; {advice}") from None


def check_pair_of_files(target: Path, draft: Path) -> None:
    """Demand that a drafter was made for this target.

    Raises
    ------
    ModelMismatchError
        If it was not; the message names every reason.
    """
    if reasons := compare_files(target, draft):
        raise ModelMismatchError(f"{draft} does not fit {target}: {'; '.join(reasons)}")


def demand_kind(path: Path, kind: str) -> None:
    """Demand that a GGUF file is a `target` or a `drafter` that can be used.

    Raises
    ------
    ModelLoadError
        If it is the other one, or something is wrong with it.
    """
    summary = summarize(path)
    if summary.kind != kind:
        raise ModelLoadError(f"{path} must be a {kind}, got a {summary.kind}")
    if summary.problems:
        raise ModelLoadError(f"cannot use {path}: {'; '.join(summary.problems)}")


def describe(paths: Sequence[Path]) -> Details:
    """Return what the files of a target say about it, in Ollama's words; the first one names its kind."""
    files = [GGUFFile(path) for path in paths]
    n_parameters = sum(info.n_elements for file in files for info in file.tensors.values())
    return Details(
        family=str(files[0].get("general.architecture") or ""),
        parameter_size=_short_count(n_parameters),
        quantization_level=_name_quantization(files),
    )


def list_capabilities(path: Path) -> list[str]:
    """Return what a target can do, in Ollama's words: completion, tools, thinking, insert, embedding."""
    file = GGUFFile(path)
    architecture = file.get("general.architecture")
    if f"{architecture}.pooling_type" in file.values:
        return ["embedding"]
    template = str(file.get("tokenizer.chat_template") or "")
    can = {
        "completion": True,
        "tools": "tools" in template or "tool_calls" in template,
        "thinking": "<think>" in template or "enable_thinking" in template or "reasoning_content" in template,
        "insert": any(f"tokenizer.ggml.{name}_token_id" in file.values for name in ("fim_pre", "prefix")),
    }
    return [name for name, it_can in can.items() if it_can]


def _measure(path: Path) -> tuple[int, int, str, int]:
    file = GGUFFile(path)
    header_size = min(file.data_offset, file.n_bytes)
    try:
        return file.n_bytes, header_size, _hash_start(path, header_size), path.stat().st_mtime_ns
    except OSError as error:  # it may have gone since its header was read
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None


def _hash_start(path: Path, n_bytes: int) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.sha256(file.read(n_bytes)).hexdigest()}"


def _short_count(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            digits = 0 if n % size == 0 else 2 if unit == "M" else 1
            return f"{n / size:.{digits}f}{unit}"
    return str(n)


def _name_quantization(files: Sequence[GGUFFile]) -> str:
    number = files[0].get("general.file_type")
    if isinstance(number, int) and number in {kind.value for kind in LlamaFileType}:
        return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    bytes_by_type: Counter[str] = Counter()
    for info in (info for file in files for info in file.tensors.values()):
        bytes_by_type[info.type_name] += info.n_bytes or 0
    return bytes_by_type.most_common(1)[0][0] if bytes_by_type else "unknown"
