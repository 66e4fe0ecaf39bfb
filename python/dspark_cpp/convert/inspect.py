"""Says what a GGUF file is, as data: drafter or target, sizes, heads, calibration, and whether two files fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.metadata import read_drafter
from dspark_cpp.convert.pair import (
    DRAFTER_ARCHITECTURE,
    LAST_LAYER_ARCHITECTURES,
    TAPPABLE_ARCHITECTURES,
    DraftInfo,
    TargetInfo,
    check_pair,
    count_tokens,
    list_upstream_limits,
    name_tokenizer,
    optional_integer,
    read_target,
)
from dspark_cpp.convert.tensors import compare_shapes
from dspark_cpp.errors import ModelLoadError

_CALIBRATION_PREFIX = "dspark.calibration."
_LONG_TEXT = 80


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What one GGUF file is.

    Attributes
    ----------
    kind
        `drafter` or `target`.
    facts
        Name to value, in the order to be shown.
    types
        Element type to `n_tensors` and `n_bytes`.
    calibration
        All keys under `dspark.calibration`.
    metadata
        All other keys; arrays and long texts are abbreviated.
    problems
        What keeps the file from being used, none when it is sound.
    notes
        What is worth knowing beside it.
    """

    path: str
    kind: str
    n_bytes: int
    facts: Mapping[str, Any]
    types: Mapping[str, Mapping[str, int]]
    calibration: Mapping[str, Any]
    metadata: Mapping[str, Any]
    problems: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain data for JSON."""
        return asdict(self)


def summarize(path: str | Path) -> ModelSummary:
    """Read the header of a GGUF file and say what it is.

    Raises
    ------
    ModelLoadError
        If the file cannot be read or is neither drafter nor language model.
    """
    file = GGUFFile(path)
    architecture = file.get("general.architecture")
    if not isinstance(architecture, str) and not optional_integer(file, "split.no"):
        raise ModelLoadError(f"cannot read {file.path}: general.architecture must be a text, got {architecture!r}")
    if architecture == DRAFTER_ARCHITECTURE:
        draft = read_drafter(file)
        return _summarize(file, "drafter", _describe_drafter(file, draft), *_judge_drafter(file, draft))
    target = read_target(file)
    return _summarize(file, "target", _describe_target(file, target), [], _judge_target(target))


def compare_files(target: str | Path, draft: str | Path) -> list[str]:
    """Return every reason why two GGUF files do not fit together, none when they do.

    Raises
    ------
    ModelLoadError
        If a file cannot be read or `draft` is no drafter.
    """
    return check_pair(read_target(GGUFFile(target)), read_drafter(GGUFFile(draft)))


def _summarize(
    file: GGUFFile, kind: str, facts: Mapping[str, Any], problems: list[str], notes: list[str]
) -> ModelSummary:
    metadata = {key: _abbreviate(file, key) for key in file.values}
    calibration = {key: value for key, value in metadata.items() if key.startswith(_CALIBRATION_PREFIX)}
    rest = {key: value for key, value in metadata.items() if key not in calibration}
    types = _count_types(file)
    return ModelSummary(str(file.path), kind, file.n_bytes, facts, types, calibration, rest, problems, notes)


def _abbreviate(file: GGUFFile, key: str) -> Any:
    value = file.values[key]
    if value.is_array:
        numbers = file.get_numbers(key) if value.count <= 16 else None
        return numbers if numbers is not None else f"[{value.count} x {value.type.name.lower()}]"
    found = file.get(key)
    if isinstance(found, str) and len(found) > _LONG_TEXT:
        return f"{found[:_LONG_TEXT]}... ({len(found)} characters)"
    return found


def _count_types(file: GGUFFile) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for info in file.tensors.values():
        counts = types.setdefault(info.type_name, {"n_tensors": 0, "n_bytes": 0})
        counts["n_tensors"] += 1
        counts["n_bytes"] += info.n_bytes or 0
    return dict(sorted(types.items(), key=lambda item: -item[1]["n_bytes"]))


def _describe_common(file: GGUFFile) -> dict[str, Any]:
    return {
        "name": file.get("general.name"),
        "architecture": file.get("general.architecture"),
        "parameters": sum(info.n_elements for info in file.tensors.values()),
        "tensors": len(file.tensors),
        "tokenizer": name_tokenizer(file),
        "tokens": count_tokens(file),
    }


def _describe_target(file: GGUFFile, target: TargetInfo) -> dict[str, Any]:
    is_tappable = target.architecture in TAPPABLE_ARCHITECTURES
    last = target.n_layers - (1 if target.architecture in LAST_LAYER_ARCHITECTURES else 2)
    return _describe_common(file) | {
        "layers": target.n_layers,
        "hidden_size": target.hidden_size,
        "vocabulary": target.vocab_size,
        "context_length": file.get(f"{target.architecture}.context_length"),
        "output_head": _describe_target_output(target),
        "can_be_tapped": f"yes, layers 0 to {last}" if is_tappable else "no",
    }


def _describe_target_output(target: TargetInfo) -> str:
    if "output.weight" in target.file.tensors:
        return "own"
    return "in another part of the split model" if target.is_split else "tied to the embedding"


def _describe_drafter(file: GGUFFile, draft: DraftInfo) -> dict[str, Any]:
    c = draft.config
    return _describe_common(file) | {
        "layers": c.n_layers,
        "hidden_size": c.hidden_size,
        "vocabulary": c.vocab_size,
        "draft_vocabulary": c.draft_vocab_size,
        "context_length": c.context_length,
        "block_size": c.block_size,
        "samples_from_anchor": c.sample_from_anchor,
        "attention_in_block": "causal" if c.is_causal else "bidirectional",
        "sliding_window": c.sliding_window or "none",
        "mask_token": c.mask_token_id,
        "taps_target_layers": [layer - 1 for layer in c.target_layers],
        "sequential_head": f"{c.markov_head_type}, rank {c.markov_rank}",
        "confidence_head": _describe_confidence(draft),
        "embedding": "own" if draft.has_own_embedding else "borrowed from the target",
        "output_head": _describe_output(draft),
    }


def _describe_confidence(draft: DraftInfo) -> str:
    if not draft.config.has_confidence_head:
        return "none"
    return "on hidden state and Markov feature" if draft.config.confidence_with_markov else "on hidden state"


def _describe_output(draft: DraftInfo) -> str:
    if draft.has_own_output:
        return "own"
    return "own, tied to the embedding" if draft.has_own_embedding else "borrowed from the target"


def _judge_drafter(file: GGUFFile, draft: DraftInfo) -> tuple[list[str], list[str]]:
    shapes = {name: info.shape for name, info in file.tensors.items()}
    notes = [f"llama.cpp itself cannot load this file: {limit}" for limit in list_upstream_limits(draft.config)]
    if draft.has_own_embedding and not draft.has_own_output:
        notes.append("it carries an embedding but no output head: wrong for a target whose head is not tied")
    if optional_integer(file, "dflash.hyper_connection.count"):
        return [], [*notes, "its layers are DeepSeek-V4 blocks: their tensors were not checked"]
    return compare_shapes(draft.config, shapes, "gguf"), notes


def _judge_target(target: TargetInfo) -> list[str]:
    if target.architecture in TAPPABLE_ARCHITECTURES:
        return []
    return [f"no drafter can be used: llama.cpp offers no hidden states of {target.architecture} models"]
