"""The metadata of a drafter's GGUF file: config to keys and back.

Key names are those that llama.cpp reads for the architecture `dflash`; the two that it has no name for (type of the
sequential head, inputs of the confidence head) are ours.
"""

from __future__ import annotations

import math
from typing import Any

from dspark_cpp.convert.drafter_config import HEAD_TYPES, MAX_LAYERS, DrafterConfig
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.gguf_writer import encode_value
from dspark_cpp.convert.pair import (
    DRAFTER_ARCHITECTURE,
    DraftInfo,
    TargetInfo,
    count_tokens,
    name_tokenizer,
    optional_integer,
    require_integer,
)
from dspark_cpp.errors import ModelLoadError

MASK_KEY = "tokenizer.ggml.mask_token_id"


def encode_metadata(config: DrafterConfig, name: str, file_type: int, target: TargetInfo) -> dict[str, bytes]:
    """Return all keys of a drafter file, encoded.

    Parameters
    ----------
    config
        The drafter.
    name
        Value of `general.name`.
    file_type
        llama.cpp's number of the quantization mix.
    target
        Whose tokenizer keys are taken over byte by byte.
    """
    values: dict[str, Any] = {"general.architecture": DRAFTER_ARCHITECTURE, "general.type": "model"}
    values |= {"general.name": name, "general.file_type": file_type, "general.quantization_version": 2}
    for key, value in _list_keys(config, target).items():
        values[f"{DRAFTER_ARCHITECTURE}.{key}"] = value
    encoded = {key: encode_value(value) for key, value in values.items()}
    encoded |= {key: target.file.encoded(key) for key in target.file.values if key.startswith("tokenizer.")}
    return encoded | {MASK_KEY: encode_value(config.mask_token_id)}


def _list_keys(config: DrafterConfig, target: TargetInfo) -> dict[str, Any]:
    c = config
    keys: dict[str, Any] = {
        "block_count": c.n_layers,
        "context_length": c.context_length,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
        "vocab_size": c.vocab_size,
        "block_size": c.block_size,
        "target_layers": list(c.target_layers),
        "sample_from_anchor": c.sample_from_anchor,
        "has_confidence_head": c.has_confidence_head,
        "confidence_with_markov": c.confidence_with_markov,
        "markov_head_type": c.markov_head_type,
    }
    return keys | dict(c.scales) | _list_optional_keys(config, target)


def _list_optional_keys(c: DrafterConfig, target: TargetInfo) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if c.is_causal is not None:
        keys["attention.causal"] = c.is_causal
    if c.sliding_window:
        keys |= {"attention.sliding_window": c.sliding_window, "attention.sliding_window_pattern": list(c.swa_layers)}
    if c.n_rot is not None:
        keys["rope.dimension_count"] = c.n_rot
    if c.rope_scaling is not None:
        kind, factor, original = c.rope_scaling
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
        keys["rope.scaling.original_context_length"] = original
    if target.uses_mrope:
        # A multi-axis target: the drafter rotates along the temporal axis only.
        keys["rope.dimension_sections"] = [c.head_dim // 2, 0, 0, 0]
    return keys


def read_drafter(file: GGUFFile) -> DraftInfo:
    """Read a drafter's config back from a GGUF file, by our converter or by llama.cpp's.

    Raises
    ------
    ModelLoadError
        If the file is no drafter or lacks a key or tensor that every DSpark drafter has.
    """
    if file.get("general.architecture") != DRAFTER_ARCHITECTURE:
        raise ModelLoadError(
            f"cannot read {file.path} as a drafter: its architecture must be dflash, "
            f"got {file.get('general.architecture')}"
        )
    return DraftInfo(
        config=_read_config(file),
        has_own_embedding="token_embd.weight" in file.tensors,
        has_own_output="output.weight" in file.tensors,
        tokenizer=name_tokenizer(file),
        file=file,
    )


def _read_config(file: GGUFFile) -> DrafterConfig:
    def integer(key: str, default: int | None = None) -> int:
        found = optional_integer(file, f"{DRAFTER_ARCHITECTURE}.{key}")
        return default if found is None and default is not None else require_integer(file, f"dflash.{key}")

    def number(key: str, default: float) -> float:
        value = file.get(f"{DRAFTER_ARCHITECTURE}.{key}")
        return float(value) if isinstance(value, float) and math.isfinite(value) else default

    def flag(key: str, default: bool) -> bool:
        value = file.get(f"{DRAFTER_ARCHITECTURE}.{key}")
        return value if isinstance(value, bool) else default

    rank, conf = _read_shape(file, "markov_w1.weight"), _read_shape(file, "conf_proj.weight")
    n_heads, hidden_size, n_layers = (
        integer("attention.head_count"),
        integer("embedding_length"),
        integer("block_count"),
    )
    head_dim = integer("attention.key_length", default=max(hidden_size // n_heads, 1))
    vocab_size = count_tokens(file) or integer("vocab_size")
    if n_layers > MAX_LAYERS:
        raise ModelLoadError(
            f"cannot read {file.path}: dflash.block_count must be at most {MAX_LAYERS}, got {n_layers}"
        )
    causal = file.get("dflash.attention.causal")
    window = optional_integer(file, "dflash.attention.sliding_window") or 0
    return DrafterConfig(
        hidden_size=hidden_size,
        intermediate_size=integer("feed_forward_length"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=integer("attention.head_count_kv", default=n_heads),
        head_dim=head_dim,
        rms_norm_eps=number("attention.layer_norm_rms_epsilon", 1e-6),
        rope_theta=number("rope.freq_base", 10000.0),
        vocab_size=vocab_size,
        draft_vocab_size=(_read_shape(file, "d2t") or (vocab_size,))[0],
        context_length=integer("context_length"),
        block_size=integer("block_size"),
        mask_token_id=_read_mask(file),
        target_layers=_read_target_layers(file),
        markov_rank=rank[-1] if rank else 0,
        markov_head_type=_read_head_type(file),
        has_confidence_head=conf is not None,
        confidence_with_markov=flag("confidence_with_markov", conf is None or conf[-1] != hidden_size),
        sample_from_anchor=flag("sample_from_anchor", True),
        is_causal=causal if isinstance(causal, bool) else None,
        sliding_window=window,
        swa_layers=tuple(map(bool, file.get_numbers("dflash.attention.sliding_window_pattern") or ())),
    )


def _read_shape(file: GGUFFile, name: str) -> tuple[int, ...] | None:
    info = file.tensors.get(name)
    return None if info is None else info.shape


def _read_mask(file: GGUFFile) -> int:
    mask = optional_integer(file, MASK_KEY)
    if mask is None or mask < 0:
        raise ModelLoadError(f"cannot read {file.path}: {MASK_KEY} must be a token id, got {mask}")
    return mask


def _read_target_layers(file: GGUFFile) -> tuple[int, ...]:
    layers = file.get_numbers("dflash.target_layers")
    if not layers or not all(isinstance(layer, int) and layer >= 0 for layer in layers):
        raise ModelLoadError(f"cannot read {file.path}: dflash.target_layers must list layer ids, got {layers}")
    return tuple(int(layer) for layer in layers)


def _read_head_type(file: GGUFFile) -> Any:
    value = file.get("dflash.markov_head_type")
    if value is None:
        return "vanilla"
    if value not in HEAD_TYPES:
        raise ModelLoadError(
            f"cannot read {file.path}: dflash.markov_head_type must be one of {', '.join(HEAD_TYPES)}, got {value}"
        )
    return value
