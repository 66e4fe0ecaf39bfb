"""Reads the header of a GGUF file, with every length checked against the file before it is believed.

A damaged or hostile header must cost neither time nor memory: lengths are compared with the bytes that are left, arrays
are located but only decoded when asked for, and tensor data stays in the file until a row is wanted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeAlias

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from dspark_cpp.errors import ModelLoadError

Scalar: TypeAlias = int | float | bool | str

MAX_DIMS = 4
MAX_NAME_BYTES = 65535
PROLOGUE_BYTES = 24
MAX_HEADER_ARRAY_BYTES = 1 << 29
DEFAULT_ALIGNMENT = 32


class ValueType(IntEnum):
    """Types of metadata values, as numbered in the file."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


_DTYPES = {
    ValueType.U8: "<u1",
    ValueType.I8: "<i1",
    ValueType.U16: "<u2",
    ValueType.I16: "<i2",
    ValueType.U32: "<u4",
    ValueType.I32: "<i4",
    ValueType.F32: "<f4",
    ValueType.BOOL: "?",
    ValueType.U64: "<u8",
    ValueType.I64: "<i8",
    ValueType.F64: "<f8",
}
_SIZES = {kind: np.dtype(dtype).itemsize for kind, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class MetadataValue:
    """Where a metadata value lies: `count` items of `type` between `start` and `end`."""

    type: ValueType
    is_array: bool
    count: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `shape` slowest first, as numpy has it; absolute `offset`; `n_bytes` None for unknown types."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    n_bytes: int | None

    @property
    def type_name(self) -> str:
        """Name of the element type, `type 99` when unknown."""
        kind = tensor_type(self.type_id)
        return kind.name if kind is not None else f"type {self.type_id}"

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return count_elements(self.shape)


def count_elements(shape: tuple[int, ...]) -> int:
    """Return the product of the dimensions (a Python integer: it cannot overflow)."""
    total = 1
    for n in shape:
        total *= n
    return total


def drop_unit_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading ones: llama.cpp drops them when it writes, and takes both forms for the same."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def tensor_type(type_id: int) -> GGMLQuantizationType | None:
    """Return the element type with this number, None when it is not known here."""
    try:
        return GGMLQuantizationType(type_id)
    except ValueError:
        return None


class GGUFFile:
    """The header of one GGUF file, and its data on demand.

    Parameters
    ----------
    path
        File to read. It stays mapped as long as this object or an array taken from it lives.

    Raises
    ------
    ModelLoadError
        If the file cannot be read, is no GGUF file, or contradicts itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        data = _map_file(self.path)
        self.n_bytes = int(data.size)
        self._data = data
        cursor = _Cursor(self.path, data.data)
        self.version, n_tensors, n_values = cursor.read_prologue()
        self.values: dict[str, MetadataValue] = cursor.read_values(n_values)
        self.alignment = self._read_alignment()
        infos = cursor.read_infos(n_tensors)
        self.data_offset = -(-cursor.pos // self.alignment) * self.alignment
        self.tensors: Mapping[str, TensorInfo] = {info.name: self._place(info) for info in infos}

    def get(self, key: str) -> Scalar | None:
        """Return a scalar or string value; None when the key is missing or holds an array."""
        value = self.values.get(key)
        if value is None or value.is_array:
            return None
        if value.type is ValueType.STRING:
            return self._text(value.start, value.end)
        item: Scalar = np.frombuffer(self._data, _DTYPES[value.type], 1, value.start)[0].item()
        return item

    def get_numbers(self, key: str) -> list[int | float] | None:
        """Return an array of numbers; None when the key is missing or holds something else."""
        value = self.values.get(key)
        if value is None or not value.is_array or value.type is ValueType.STRING:
            return None
        numbers: list[int | float] = np.frombuffer(self._data, _DTYPES[value.type], value.count, value.start).tolist()
        return numbers

    def get_strings(self, key: str) -> list[bytes] | None:
        """Return an array of strings, undecoded (tokens need not be UTF-8); None when there is none."""
        value = self.values.get(key)
        if value is None or not value.is_array or value.type is not ValueType.STRING:
            return None
        raw = bytes(self._data[value.start : value.end])
        strings, pos = [], 0
        for _ in range(value.count):
            (length,) = struct.unpack_from("<Q", raw, pos)
            strings.append(raw[pos + 8 : pos + 8 + length])
            pos += 8 + length
        return strings

    def encoded(self, key: str) -> bytes:
        """Return type and value of a key exactly as they stand in the file, ready to be written into another one."""
        value = self.values[key]
        body = bytes(self._data[value.start : value.end])
        if value.is_array:
            return struct.pack("<IIQ", ValueType.ARRAY, value.type, value.count) + body
        if value.type is ValueType.STRING:
            return struct.pack("<IQ", value.type, len(body)) + body
        return struct.pack("<I", value.type) + body

    def tensor_rows(self, name: str) -> NDArray[np.uint8]:
        """Return a tensor's bytes as (n_rows, bytes per row), mapped from the file."""
        info = self.tensors[name]
        if info.n_bytes is None:
            raise ModelLoadError(f"cannot read {name} of {self.path}: unknown tensor {info.type_name}")
        n_rows = count_elements(info.shape[:-1])
        raw = self._data[info.offset : info.offset + info.n_bytes]
        return raw.reshape(n_rows, -1)

    def _text(self, start: int, end: int) -> str:
        return bytes(self._data[start:end]).decode("utf-8", "replace")

    def _read_alignment(self) -> int:
        alignment = self.get("general.alignment")
        if alignment is None:
            return DEFAULT_ALIGNMENT
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise ModelLoadError(
                f"cannot read {self.path}: general.alignment must be a power of two up to 1048576, got {alignment}"
            )
        return alignment

    def _place(self, info: TensorInfo) -> TensorInfo:
        offset = self.data_offset + info.offset
        if offset % self.alignment or offset + (info.n_bytes or 0) > self.n_bytes:
            raise ModelLoadError(
                f"cannot read {self.path}: tensor {info.name} must lie inside the file, got bytes {offset} to "
                f"{offset + (info.n_bytes or 0)} of {self.n_bytes}; the file is damaged or incomplete"
            )
        return TensorInfo(info.name, info.shape, info.type_id, offset, info.n_bytes)


def _map_file(path: Path) -> NDArray[np.uint8]:
    try:
        if not path.is_file():
            raise ModelLoadError(f"cannot read {path}: no such file")
        if path.stat().st_size < PROLOGUE_BYTES:
            raise ModelLoadError(f"cannot read {path}: not a GGUF file (it has only {path.stat().st_size} bytes)")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


class _Cursor:
    """Walks through a header; every step is checked against the bytes that are left."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.pos = 0

    def fail(self, cause: str) -> ModelLoadError:
        return ModelLoadError(f"cannot read {self.path}: {cause}")

    def advance(self, n: int) -> int:
        start = self.pos
        if n > len(self.data) - start:
            raise self.fail(f"the header ends early or is damaged (at byte {start}, {n} bytes wanted)")
        self.pos = start + n
        return start

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.advance(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.advance(8))[0])

    def name(self) -> str:
        length = self.u64()
        start = self.advance(length)
        if length > MAX_NAME_BYTES:
            raise self.fail(f"a name must have at most {MAX_NAME_BYTES} bytes, got {length}")
        try:
            return bytes(self.data[start : start + length]).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"a name at byte {start} is not UTF-8") from None

    def read_prologue(self) -> tuple[int, int, int]:
        if bytes(self.data[:4]) != b"GGUF":
            raise self.fail("not a GGUF file (it does not begin with GGUF)")
        self.pos = 4
        version, n_tensors, n_values = self.u32(), self.u64(), self.u64()
        if version not in (2, 3):
            raise self.fail(f"GGUF version must be 2 or 3 in little-endian order, got {version}")
        # The shortest entries possible bound both counts before anything is allocated.
        left = len(self.data) - self.pos
        if n_tensors > left // 24 or n_values > left // 13:
            raise self.fail(f"a file of {len(self.data)} bytes cannot hold {n_tensors} tensors and {n_values} keys")
        return version, n_tensors, n_values

    def read_values(self, n_values: int) -> dict[str, MetadataValue]:
        values: dict[str, MetadataValue] = {}
        for _ in range(n_values):
            key = self.name()
            if key in values:
                raise self.fail(f"key {key} stands twice in the header")
            values[key] = self.read_value(key)
        return values

    def value_type(self, key: str) -> ValueType:
        number = self.u32()
        if number >= len(ValueType):
            raise self.fail(f"key {key} has the unknown type {number}")
        return ValueType(number)

    def read_value(self, key: str) -> MetadataValue:
        kind = self.value_type(key)
        if kind is ValueType.ARRAY:
            return self.read_array(key)
        size = self.u64() if kind is ValueType.STRING else _SIZES[kind]
        start = self.advance(size)
        return MetadataValue(kind, False, 1, start, self.pos)

    def read_array(self, key: str) -> MetadataValue:
        kind = self.value_type(key)
        if kind is ValueType.ARRAY:
            raise self.fail(f"key {key} is an array of arrays")
        count = self.u64()
        start = self.pos
        if kind is ValueType.STRING:
            self.skip_strings(key, count)
        else:
            self.advance(count * _SIZES[kind])
        if self.pos - start > MAX_HEADER_ARRAY_BYTES:
            raise self.fail(f"the array of key {key} must have at most {MAX_HEADER_ARRAY_BYTES} bytes")
        return MetadataValue(kind, True, count, start, self.pos)

    def skip_strings(self, key: str, count: int) -> None:
        # Vocabularies have 150,000 strings and more: this loop is the cost of opening a file.
        data, pos, end = self.data, self.pos, len(self.data)
        if count > (end - pos) // 8:
            raise self.fail(f"the array of key {key} claims {count} strings, more than the file can hold")
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if pos + 8 > end:
                raise self.fail(f"the array of key {key} ends early or is damaged")
            pos += 8 + unpack(data, pos)[0]
        if pos > end:
            raise self.fail(f"the array of key {key} ends early or is damaged")
        self.pos = pos

    def read_infos(self, n_tensors: int) -> list[TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            info = self.read_info()
            if info.name in infos:
                raise self.fail(f"tensor {info.name} stands twice in the header")
            infos[info.name] = info
        return list(infos.values())

    def read_info(self) -> TensorInfo:
        name, n_dims = self.name(), self.u32()
        if n_dims > MAX_DIMS:
            raise self.fail(f"tensor {name} must have at most {MAX_DIMS} dimensions, got {n_dims}")
        shape = tuple(self.u64() for _ in range(n_dims))[::-1]
        type_id, offset = self.u32(), self.u64()
        return TensorInfo(name, shape, type_id, offset, self.tensor_bytes(name, shape, type_id))

    def tensor_bytes(self, name: str, shape: tuple[int, ...], type_id: int) -> int | None:
        kind = tensor_type(type_id)
        if kind is None:
            return None
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % per_block:
            raise self.fail(f"rows of tensor {name} must be a multiple of {per_block} for {kind.name}, got {shape[-1]}")
        return count_elements(shape) // per_block * block_bytes
