"""Where a drafter's calibration is kept: the side file `<drafter>.calibration.json`, and `dspark.calibration.*` keys.

Owns: both forms, and which of them counts. A calibration is looked for in this order: the caller's own, the side file,
the GGUF's keys. The first that exists counts; a damaged one is an error, not a reason to go on to the next.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import LlamaFileType

from dspark_cpp.calibration import MAP_POINTS, VERSION, Calibration, CalibrationEntry, require
from dspark_cpp.convert.gguf_file import GGUFFile, ValueType
from dspark_cpp.convert.gguf_writer import encode_value, replace_on_success
from dspark_cpp.errors import DSparkError, ModelLoadError, ModelMismatchError

__all__ = [
    "describe_target",
    "find_calibration",
    "read_gguf_keys",
    "read_side_file",
    "side_file",
    "write_gguf_keys",
    "write_side_file",
]

_log = logging.getLogger(__name__)

_PREFIX = "dspark.calibration."
_COPY_BYTES = 1 << 24


def write_side_file(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write the side file, in one step: a reader sees the old or the new one.

    Raises
    ------
    DSparkError
        If it cannot be written.
    """
    with replace_on_success(Path(path)) as temporary:
        temporary.write_text(calibration.to_json(), encoding="utf-8")


def read_side_file(path: str | os.PathLike[str]) -> Calibration:
    """Read a side file.

    Raises
    ------
    ModelLoadError
        Naming the file and the key that is wrong.
    """
    try:
        return Calibration.from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read the calibration {os.fspath(path)}: {error}") from error


def write_gguf_keys(
    calibration: Calibration, path: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> None:
    """Put a calibration into a drafter's metadata in place of any it has; tensors keep every byte.

    Parameters
    ----------
    path : path
        The drafter.
    output : path, optional
        The file to write; None replaces the drafter itself, in one step and only when all is written.

    Raises
    ------
    ModelLoadError
        If `path` is no GGUF file.
    ModelMismatchError
        If its blocks have another size.
    DSparkError
        If the file cannot be written.
    """
    file = GGUFFile(Path(path))
    _check_block_size(calibration, file.get("dflash.block_size"), Path(path))
    kept = {key: file.encoded(key) for key in file.values if not key.startswith(_PREFIX)}
    destination = Path(path) if output is None else Path(output)
    with replace_on_success(destination) as temporary:
        _write_like(file, kept | _encode_keys(calibration), temporary)
        _check_same_tensors(file, GGUFFile(temporary))


def read_gguf_keys(path: str | os.PathLike[str]) -> Calibration | None:
    """Read a drafter's calibration keys; None when it has none.

    Raises
    ------
    ModelLoadError
        Naming the file and the key that is missing or wrong.
    """
    file = GGUFFile(Path(path))
    if not any(key.startswith(_PREFIX) for key in file.values):
        return None
    try:
        return _decode_keys(file)
    except ValueError as error:
        raise ModelLoadError(f"cannot read the calibration of {os.fspath(path)}: {_PREFIX}{error}") from error


def _decode_keys(file: GGUFFile) -> Calibration:
    version, block_size, target = (file.get(_PREFIX + name) for name in ("version", "block_size", "target"))
    require(version == VERSION, "version", f"be {VERSION}", version)
    require(isinstance(block_size, int) and block_size >= 1, "block_size", "be at least 1", block_size)
    rules = [raw.decode("utf-8", "replace") for raw in file.get_strings(_PREFIX + "rules") or []]
    names = ("temperatures", "sts", "acceptance", "offsets", "maps")
    numbers = {name: _shortest(file.get_numbers(_PREFIX + name)) for name in names}
    n_blocks = file.get_numbers(_PREFIX + "n_blocks") or []
    require(all(isinstance(n, int) for n in n_blocks), "n_blocks", "be counts", n_blocks)
    size = int(block_size or 0)
    n_values = len(rules) * size
    n_sts, n_offsets, n_maps = (
        n_values * n_each if _PREFIX + name in file.values else 0
        for name, n_each in (("sts", 1), ("offsets", 1), ("maps", MAP_POINTS))
    )
    for name, values, count in (
        ("temperatures", numbers["temperatures"], len(rules)),
        ("sts", numbers["sts"], n_sts),
        ("acceptance", numbers["acceptance"], n_values),
        ("offsets", numbers["offsets"], n_offsets),
        ("maps", numbers["maps"], n_maps),
        ("n_blocks", n_blocks, len(rules)),
    ):
        require(len(values) == count, name, f"have {count} values", len(values))
    entries = []
    for i, rule in enumerate(rules):
        row = slice(i * size, (i + 1) * size)
        sts, acceptance, offsets = (tuple(numbers[name][row]) for name in ("sts", "acceptance", "offsets"))
        maps = tuple(numbers["maps"][i * size * MAP_POINTS : (i + 1) * size * MAP_POINTS])
        temperature = numbers["temperatures"][i]
        entries.append(CalibrationEntry(rule, temperature, sts, acceptance, int(n_blocks[i]), offsets, maps))
    return Calibration(size, target, tuple(entries))  # type: ignore[arg-type]  # the constructor checks it


def _encode_keys(calibration: Calibration) -> dict[str, bytes]:
    keys = {
        "version": encode_value(calibration.version),
        "block_size": encode_value(calibration.block_size),
        "target": encode_value(calibration.target),
        "rules": _encode_strings([entry.rule for entry in calibration.entries]),
        "temperatures": _encode_floats([entry.temperature for entry in calibration.entries]),
        "acceptance": _encode_floats([value for entry in calibration.entries for value in entry.acceptance]),
        "n_blocks": _encode_counts([entry.n_blocks for entry in calibration.entries]),
    }
    if calibration.has_sts:  # left out without a confidence head: an empty array is a poor citizen of a GGUF
        keys["sts"] = _encode_floats([value for entry in calibration.entries for value in entry.sts])
    if calibration.has_offsets:
        keys["offsets"] = _encode_floats([value for entry in calibration.entries for value in entry.offsets])
    if calibration.has_maps:
        keys["maps"] = _encode_floats([value for entry in calibration.entries for value in entry.maps])
    return {_PREFIX + name: value for name, value in keys.items()}


def side_file(drafter: str | os.PathLike[str]) -> Path:
    """Return the path of a drafter's side file."""
    return Path(os.fspath(drafter) + ".calibration.json")


def describe_target(path: str | os.PathLike[str]) -> str:
    """Return a target's name and file type, as `Calibration.target` has them: "Qwen3 4B, Q4_K_M".

    Raises
    ------
    ModelLoadError
        If it is no GGUF file.
    """
    file = GGUFFile(Path(path))
    name, file_type = file.get("general.name"), file.get("general.file_type")
    try:
        type_name = (
            LlamaFileType(int(file_type if file_type is not None else -1))
            .name.removeprefix("MOSTLY_")
            .removeprefix("ALL_")
        )
    except ValueError:
        type_name = "unknown type"
    return f"{name or Path(path).stem}, {type_name}"


def find_calibration(
    drafter: str | os.PathLike[str],
    block_size: int,
    *,
    target: str | os.PathLike[str] | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> Calibration | None:
    """Return the calibration that counts for a drafter: the caller's, the side file's, the GGUF's, or None.

    Parameters
    ----------
    drafter : path
        The drafter's GGUF file.
    block_size : int
        Positions of its block.
    target : path, optional
        The target's GGUF file; a calibration that was measured with another one is used, with a warning in the log.
    calibration : Calibration or path, optional
        The caller's own: the record, or a file in the side file's form.

    Raises
    ------
    ModelLoadError
        A damaged calibration; file and key are named.
    ModelMismatchError
        One for blocks of another size.
    """
    found, place = _first_calibration(drafter, calibration)
    if found is None:
        return None
    _check_block_size(found, block_size, place)
    if target is not None and (actual := describe_target(target)) != found.target:
        _log.info("the calibration in %s was measured with %s, not with %s", place, found.target, actual)
    return found


def _first_calibration(
    drafter: str | os.PathLike[str], own: Calibration | str | os.PathLike[str] | None
) -> tuple[Calibration | None, Path]:
    if isinstance(own, Calibration):
        return own, Path("calibration")
    if own is not None:
        return read_side_file(own), Path(own)
    if (beside := side_file(drafter)).exists():
        return read_side_file(beside), beside
    return read_gguf_keys(drafter), Path(drafter)


def _check_block_size(calibration: Calibration, block_size: object, place: Path) -> None:
    if calibration.block_size != block_size:
        raise ModelMismatchError(
            f"{_PREFIX}block_size must be the drafter's {block_size}, got {calibration.block_size} from {place}"
        )


def _encode_strings(values: Sequence[str]) -> bytes:
    parts = [struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(values))]
    for raw in (value.encode() for value in values):
        parts.append(struct.pack("<Q", len(raw)) + raw)
    return b"".join(parts)


def _encode_floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}f", ValueType.ARRAY, ValueType.F32, len(values), *values)


def _encode_counts(values: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}I", ValueType.ARRAY, ValueType.U32, len(values), *values)


def _shortest(numbers: Sequence[float] | None) -> list[float]:
    """32-bit floats as the shortest decimals that name them: 0.7, not 0.699999988079071."""
    return [float(str(np.float32(number))) for number in numbers or []]


def _write_like(file: GGUFFile, values: Mapping[str, bytes], path: Path) -> None:
    """Write a copy of `file` with other metadata. Tensor offsets count from the data's start, so they stay."""
    parts = [b"GGUF", struct.pack("<IQQ", file.version, len(file.tensors), len(values))]
    for key, value in values.items():
        parts += [_encode_name(key), value]
    for info in file.tensors.values():
        dims = info.shape[::-1]
        parts += [_encode_name(info.name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
        parts.append(struct.pack("<IQ", info.type_id, info.offset - file.data_offset))
    header = b"".join(parts)
    try:
        with file.path.open("rb") as source, path.open("wb") as output:
            output.write(header + bytes(-len(header) % file.alignment))
            source.seek(file.data_offset)
            _copy_rest(source, output)
    except OSError as error:
        raise DSparkError(f"cannot write {path}: {error.strerror or error}") from error


def _copy_rest(source: BinaryIO, output: BinaryIO) -> None:
    while chunk := source.read(_COPY_BYTES):
        output.write(chunk)


def _encode_name(name: str) -> bytes:
    raw = name.encode()
    return struct.pack("<Q", len(raw)) + raw


def _check_same_tensors(old: GGUFFile, new: GGUFFile) -> None:
    """Compare what was written, read anew, with the original before it may take its place."""
    is_same = list(old.tensors) == list(new.tensors) and all(
        np.array_equal(old.tensor_rows(name), new.tensor_rows(name))
        for name, info in old.tensors.items()
        if info.n_bytes
    )
    if not is_same:
        raise DSparkError(f"cannot write {old.path}: the copy's tensors differ from the original's")
