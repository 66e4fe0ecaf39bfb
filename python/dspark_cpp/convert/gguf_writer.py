"""Writes a GGUF file a few rows at a time, and compares what was written with its source.

The writer never holds a whole matrix; the check opens the file anew and reads it as any other reader would.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from dspark_cpp.convert.checkpoint import TensorSource
from dspark_cpp.convert.gguf_file import (
    DEFAULT_ALIGNMENT,
    GGUFFile,
    ValueType,
    count_elements,
    drop_unit_rows,
    tensor_type,
)
from dspark_cpp.convert.tensors import Role, count_bytes
from dspark_cpp.errors import DSparkError, ModelLoadError

Progress = Callable[[str, int], None]


@runtime_checkable
class EncodedSource(Protocol):
    """A source that has its rows in the stored form already."""

    def encoded_rows(self, start: int, stop: int) -> bytes:
        """Return the bytes of rows `start` to `stop`."""


# Elements handled at a time: 16 MB as float32, and a few times that while numpy quantizes.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor to write: where it comes from and how it is stored. `integers` replaces `source` for the map."""

    name: str
    shape: tuple[int, ...]
    role: Role
    source: TensorSource
    type: GGMLQuantizationType
    note: str = ""
    integers: NDArray[np.int64] | None = None

    @property
    def n_bytes(self) -> int:
        """Size of the stored data."""
        return count_bytes(self.shape, self.type)


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What came of one tensor: its stored type and its distance from the source."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    max_error: float
    relative_error: float
    note: str = ""


def encode_value(value: Any) -> bytes:
    """Encode a metadata value with its type: bool, int (u32), float (f32), str, and sequences of int (i32) or bool."""
    match value:
        case bool():
            return struct.pack("<I?", ValueType.BOOL, value)
        case int():
            return struct.pack("<II", ValueType.U32, value)
        case float():
            return struct.pack("<If", ValueType.F32, value)
        case str():
            raw = value.encode()
            return struct.pack("<IQ", ValueType.STRING, len(raw)) + raw
        case [bool(), *_]:
            return struct.pack("<IIQ", ValueType.ARRAY, ValueType.BOOL, len(value)) + bytes(value)
        case [int(), *_]:
            return struct.pack(f"<IIQ{len(value)}i", ValueType.ARRAY, ValueType.I32, len(value), *value)
    raise TypeError(f"value must be a bool, int, float, str or a sequence of int or bool, got {value!r}")


@contextmanager
def replace_on_success(output: Path) -> Iterator[Path]:
    """Yield a temporary path beside `output` that takes its place at the end, or vanishes on any error.

    Raises
    ------
    DSparkError
        If the directory cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent)
    except OSError as error:
        raise DSparkError(f"cannot write {output}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_read_umask())
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_gguf(path: Path, values: Mapping[str, bytes], plans: Sequence[TensorPlan], progress: Progress) -> None:
    """Write a GGUF file.

    Parameters
    ----------
    path
        File to write.
    values
        Metadata: key to encoded type and value, see `encode_value`.
    plans
        Tensors, in the order of the file.
    progress
        Called with a tensor's name and the number of elements just written.

    Raises
    ------
    DSparkError
        If the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            file.write(_encode_header(values, plans))
            for plan in plans:
                _pad(file)
                _write_tensor(file, plan, progress)
            _pad(file)
    except OSError as error:
        raise DSparkError(f"cannot write {path}: {error.strerror or error}") from error


def _encode_header(values: Mapping[str, bytes], plans: Sequence[TensorPlan]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(plans), len(values))]
    for key, value in values.items():
        parts += [_encode_name(key), value]
    offset = 0
    for plan in plans:
        dims = plan.shape[::-1]
        parts += [_encode_name(plan.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", plan.type, offset))
        offset += -(-plan.n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return b"".join(parts)


def _encode_name(name: str) -> bytes:
    raw = name.encode()
    return struct.pack("<Q", len(raw)) + raw


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))


def _write_tensor(file: BinaryIO, plan: TensorPlan, progress: Progress) -> None:
    if plan.integers is not None:
        file.write(plan.integers.astype("<i8").tobytes())
        progress(plan.name, plan.integers.size)
        return
    for start, stop in row_chunks(plan.shape):
        file.write(_encode_part(plan, start, stop))
        progress(plan.name, (stop - start) * (plan.shape[-1] if plan.shape else 1))


def _encode_part(plan: TensorPlan, start: int, stop: int) -> bytes:
    if isinstance(plan.source, EncodedSource):
        return plan.source.encoded_rows(start, stop)
    return encode_rows(plan.source.rows(start, stop), plan.type)


def row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield row ranges that cover a tensor in pieces of bounded size."""
    width = shape[-1] if shape else 1
    n_rows = count_elements(shape) // width
    step = max(_CHUNK_ELEMENTS // width, 1)
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def encode_rows(rows: NDArray[np.float32], kind: GGMLQuantizationType) -> bytes:
    """Quantize rows (n, width) and return their bytes."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(quants.quantize(rows, kind)).tobytes()


def decode_rows(raw: NDArray[np.uint8], kind: GGMLQuantizationType) -> NDArray[np.float32]:
    """Return the values of stored rows (n, bytes per row) as (n, width)."""
    with np.errstate(all="ignore"):
        return np.asarray(quants.dequantize(np.ascontiguousarray(raw), kind), dtype=np.float32)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """A tensor of a GGUF file as a source of rows (the target's embedding and head)."""

    file: GGUFFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return self.file.tensors[self.name].shape

    @property
    def dtype(self) -> str:
        """Name of the stored type."""
        return self.file.tensors[self.name].type_name

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` as float32 (n, width)."""
        kind = tensor_type(self.file.tensors[self.name].type_id)
        try:
            return decode_rows(self.file.tensor_rows(self.name)[start:stop], _known(kind))
        except NotImplementedError:
            raise ModelLoadError(
                f"cannot read {self.name} of {self.file.path}: {self.dtype} is not supported"
            ) from None


def _known(kind: GGMLQuantizationType | None) -> GGMLQuantizationType:
    if kind is None:
        raise NotImplementedError
    return kind


@dataclass(frozen=True, slots=True)
class _Bound:
    """How far a stored type may be from its source.

    `relative`: error over the value itself; `block`: error over the largest magnitude of its block of `width`;
    `rms`: relative root mean square over the tensor, for types whose scales are themselves searched for.
    `scale_steps` times the smallest float16 is allowed on top, because scales are stored as float16.
    """

    relative: float = 0.0
    block: float = 0.0
    width: int = 1
    rms: float = 0.0
    scale_steps: float = 0.0


_Q = GGMLQuantizationType
_HALF = 2.0**-11  # half a step of float16

# Half a step of the scale, plus the rounding of that scale to float16. q4_0 and q5_0 spend their last level on one sign
# only, so the other sign may be a whole step off.
_BOUNDS: Mapping[GGMLQuantizationType, _Bound] = {
    _Q.F32: _Bound(),
    _Q.F16: _Bound(relative=_HALF, scale_steps=0.5),
    _Q.BF16: _Bound(relative=2.0**-8),
    _Q.Q8_0: _Bound(block=0.501 / 127 + _HALF, width=32, scale_steps=127),
    _Q.Q5_1: _Bound(block=1.01 / 31 + 3 * _HALF, width=32, scale_steps=32),
    _Q.Q5_0: _Bound(block=1.01 / 16 + _HALF, width=32, scale_steps=16),
    _Q.Q4_1: _Bound(block=1.01 / 15 + 3 * _HALF, width=32, scale_steps=16),
    _Q.Q4_0: _Bound(block=1.01 / 8 + _HALF, width=32, scale_steps=8),
    _Q.Q6_K: _Bound(rms=0.05),
    _Q.Q5_K: _Bound(rms=0.10),
    _Q.Q4_K: _Bound(rms=0.20),
    _Q.Q3_K: _Bound(rms=0.35),
    _Q.Q2_K: _Bound(rms=0.60),
    _Q.IQ4_NL: _Bound(rms=0.20),
    _Q.IQ4_XS: _Bound(rms=0.20),
}
_F16_STEP = 2.0**-24


def verify_gguf(path: Path, plans: Sequence[TensorPlan], progress: Progress) -> list[TensorReport]:
    """Open a written file again and compare every tensor with its source.

    Parameters
    ----------
    path
        The file.
    plans
        What it should hold; types may differ (llama.cpp's mixes choose per tensor).
    progress
        Called with a tensor's name and the number of elements just compared.

    Returns
    -------
    list of TensorReport
        One per tensor, in the order of `plans`.

    Raises
    ------
    DSparkError
        Naming every tensor that is missing or further from its source than its type explains.
    """
    file = GGUFFile(path)
    names = {plan.name for plan in plans}
    problems = [f"tensor {name} must be there" for name in sorted(names - file.tensors.keys())]
    problems += [f"tensor {name} must not be there" for name in sorted(file.tensors.keys() - names)]
    reports = []
    for plan in plans:
        if plan.name in file.tensors:
            report, is_close = _compare(file, plan, progress)
            reports.append(report)
            if not is_close:
                problems.append(f"{plan.name} is off by {report.max_error:.3g}, too far for {report.type}")
    if problems:
        raise DSparkError("cannot verify the written file: " + "; ".join(problems))
    return reports


def _compare(file: GGUFFile, plan: TensorPlan, progress: Progress) -> tuple[TensorReport, bool]:
    info = file.tensors[plan.name]
    kind = tensor_type(info.type_id)
    if drop_unit_rows(info.shape) != drop_unit_rows(plan.shape) or kind is None:
        raise DSparkError(f"cannot verify {plan.name}: shape must be {plan.shape}, got {info.shape}")
    if plan.integers is not None:
        stored = file.tensor_rows(plan.name).reshape(-1).view("<i8")
        progress(plan.name, plan.integers.size)
        is_same = bool(np.array_equal(stored, plan.integers))
        return TensorReport(plan.name, info.type_name, plan.shape, plan.n_bytes, 0.0, 0.0, plan.note), is_same
    error = _measure(file, plan, kind, progress)
    report = TensorReport(
        plan.name, info.type_name, plan.shape, info.n_bytes or 0, error.largest, error.relative_rms, plan.note
    )
    return report, error.is_close(_BOUNDS.get(kind, _Bound()).rms)


@dataclass(slots=True)
class _Error:
    largest: float = 0.0
    squares: float = 0.0
    source_squares: float = 0.0
    is_inside: bool = True

    @property
    def relative_rms(self) -> float:
        return float(np.sqrt(self.squares / self.source_squares)) if self.source_squares else float(self.squares > 0)

    def add(self, stored: NDArray[np.float32], source: NDArray[np.float32], bound: _Bound) -> None:
        difference = np.abs(stored.astype(np.float64) - source)
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.squares += float((difference**2).sum())
        self.source_squares += float((source.astype(np.float64) ** 2).sum())
        if not bound.rms:
            self.is_inside &= bool(np.all(difference <= _allow(source, bound)))

    def is_close(self, rms: float) -> bool:
        # NaN compares false, so a stored NaN is never close.
        return self.relative_rms <= rms if rms else self.is_inside


def _allow(source: NDArray[np.float32], bound: _Bound) -> NDArray[np.float64]:
    magnitude = np.abs(source).astype(np.float64)
    blocks = magnitude.reshape(-1, bound.width)
    peak = np.broadcast_to(blocks.max(axis=1, keepdims=True), blocks.shape).reshape(magnitude.shape)
    allowed: NDArray[np.float64] = magnitude * bound.relative + peak * bound.block + bound.scale_steps * _F16_STEP
    return allowed


def _measure(file: GGUFFile, plan: TensorPlan, kind: GGMLQuantizationType, progress: Progress) -> _Error:
    rows, bound, error = file.tensor_rows(plan.name), _BOUNDS.get(kind, _Bound()), _Error()
    for start, stop in row_chunks(plan.shape):
        stored = decode_rows(rows[start:stop], kind)
        error.add(stored, plan.source.rows(start, stop), bound)
        progress(plan.name, stored.size)
    return error
