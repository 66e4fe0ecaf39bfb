"""Reads a drafter checkpoint: config.json and safetensors, sharded or not, without torch.

Tensors are mapped and turned into float32 a few rows at a time, so memory does not grow with the checkpoint. Only this
file knows the safetensors format.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dspark_cpp.convert.drafter_config import DrafterConfig, parse_config
from dspark_cpp.errors import ModelLoadError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "BOOL": "?"}
_MAX_HEADER_BYTES = 1 << 27
_MAX_JSON_BYTES = 1 << 26


class TensorSource(Protocol):
    """Something whose rows can be read as float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""

    @property
    def dtype(self) -> str:
        """Element type, as safetensors or ggml calls it."""

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` as (n, width); a vector is one row."""


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """One tensor of a safetensors file; `data` is mapped, and holds the bit patterns where numpy lacks the type."""

    shape: tuple[int, ...]
    dtype: str
    data: NDArray[Any]

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` as float32 (n, width)."""
        part = self.data.reshape(-1, self.shape[-1] if self.shape else 1)[start:stop]
        if self.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            return (part.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return part.astype(np.float32)

    def integers(self) -> NDArray[np.int64]:
        """Return all elements as int64 (the vocabulary map)."""
        return self.data.astype(np.int64)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A drafter as its authors store it: sizes and mapped tensors, names without the `model.` prefix."""

    path: Path
    config: DrafterConfig
    tensors: Mapping[str, SafeTensor]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint directory, or download one from the Hugging Face hub.

    Parameters
    ----------
    source
        Directory, or a repository id (`owner/name`, which needs the `hub` extra).

    Raises
    ------
    ModelLoadError
        If files are missing, damaged or of a kind that is not supported.
    """
    path = _locate(source)
    raw = _read_json(path / "config.json")
    tensors = _read_tensors(path)
    try:
        return Checkpoint(path, parse_config(raw, {name: tensor.shape for name, tensor in tensors.items()}), tensors)
    except ModelLoadError as error:
        raise ModelLoadError(f"cannot convert {path}: {error}") from None


def _locate(source: str | Path) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise ModelLoadError(f"cannot read {source}: a checkpoint must be a directory or a hub id like owner/name")
    return _download(str(source))


def _download(repo: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ModelLoadError(
            f"cannot read {repo}: no such directory, and downloading it as a hub repository needs the hub extra "
            "(pip install 'dspark-cpp[hub]')"
        ) from None
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises classes of several libraries
        raise ModelLoadError(f"cannot download {repo}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"cannot read {path}: the file must have at most {_MAX_JSON_BYTES} bytes")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ModelLoadError(f"cannot read {path}: it must hold an object, got {type(data).__name__}")
    return data


def _read_tensors(path: Path) -> dict[str, SafeTensor]:
    tensors: dict[str, SafeTensor] = {}
    for file in _list_shards(path):
        for name, tensor in read_safetensors(file).items():
            short = name.removeprefix("model.")
            if short in tensors:
                raise ModelLoadError(f"cannot convert {path}: tensor {short} stands there twice")
            tensors[short] = tensor
    return tensors


def _list_shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(f"cannot convert {path}: it holds no .safetensors file")
        return files
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(_is_plain_name(name) for name in weights.values()):
        raise ModelLoadError(f"cannot read {index}: weight_map must map tensor names to files of the same directory")
    files = [path / name for name in sorted(set(weights.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelLoadError(f"cannot convert {path}: missing shards: {', '.join(missing)}")
    return files


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def read_safetensors(path: Path) -> dict[str, SafeTensor]:
    """Map the tensors of one safetensors file.

    Raises
    ------
    ModelLoadError
        If the file cannot be read or its header contradicts its size.
    """
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    length = int.from_bytes(data[:8].tobytes(), "little")
    if data.size < 8 or length > min(data.size - 8, _MAX_HEADER_BYTES):
        raise ModelLoadError(f"cannot read {path}: not a safetensors file, or cut off")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: damaged header: {error}") from error
    body = data[8 + length :]
    return {name: _map_tensor(path, body, name, entry) for name, entry in entries.items()}


def _map_tensor(path: Path, body: NDArray[np.uint8], name: str, entry: Any) -> SafeTensor:
    try:
        dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: damaged entry of tensor {name}: {error!r}") from None
    if dtype not in _DTYPES:
        raise ModelLoadError(f"cannot read {path}: dtype of {name} must be one of {', '.join(_DTYPES)}, got {dtype}")
    n_bytes = np.dtype(_DTYPES[dtype]).itemsize
    for n in shape:
        n_bytes *= n
    if min(shape, default=1) < 1 or start < 0 or stop - start != n_bytes or stop > body.size:
        raise ModelLoadError(
            f"cannot read {path}: tensor {name} of shape {list(shape)} needs {n_bytes} bytes inside the file, "
            f"got bytes {start} to {stop} of {body.size}; the file is damaged or incomplete"
        )
    return SafeTensor(shape, dtype, body[start:stop].view(_DTYPES[dtype]))
