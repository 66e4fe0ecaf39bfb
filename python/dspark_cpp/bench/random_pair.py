"""Target and drafter files of a given shape with random weights: for timing, never for text.

Owns: the shapes, which type llama.cpp's mixes give each tensor, the synthetic tokenizer. Files are written a few rows
at a time. Types follow `llama_model_quantize` for targets and K-quants and `dspark_cpp.convert` for the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from dspark_cpp.bench.random_blocks import random_rows
from dspark_cpp.bench.random_tokenizer import tokenizer_metadata
from dspark_cpp.convert.drafter_config import DrafterConfig
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.gguf_writer import TensorPlan, encode_value, replace_on_success, write_gguf
from dspark_cpp.convert.metadata import MASK_KEY, encode_metadata
from dspark_cpp.convert.pair import TargetInfo, optional_integer, read_target
from dspark_cpp.convert.tensors import OUT_TYPES, ExpectedTensor, OutType, choose_type, list_expected

__all__ = ["QUANTS", "SHAPES", "Shape", "write_random_drafter", "write_random_target"]

NAME = "random weights, for timing"
QUANTS = ("q4_0", "q4_k_m", "q6_k", "q8_0", "f16")
_Q = GGMLQuantizationType

_CONTEXT_LENGTH = 40960
_N_TAPS = 5
_BLOCK_SIZE = 7
_MARKOV_RANK = 256
_MARKOV_STD = 0.25  # the bias W2 W1[x] then has the standard deviation 0.25^2 * sqrt(256) = 1
_LOGIT_STD = 4.5  # as peaked as a language model's, so that samplers meet candidates of the usual number
_N_DRAFT_LAYERS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a target; a drafter takes over all but the depth."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    is_tied: bool
    head_dim: int = 128
    vocab_size: int = 151936

    @property
    def target_layers(self) -> tuple[int, ...]:
        """Stored ids (Hugging Face's + 1) of the tapped layers, spread as in the published checkpoints."""
        last = max(self.n_layers - 3, 1)
        taps = {round(1 + i * (last - 1) / (_N_TAPS - 1)) for i in range(_N_TAPS)}
        return tuple(min(tap + 1, self.n_layers - 1) for tap in sorted(taps))


SHAPES = {
    "0.6B": Shape(1024, 3072, 28, 16, 8, True),
    "1.7B": Shape(2048, 6144, 28, 16, 8, True),
    "4B": Shape(2560, 9728, 36, 32, 8, True),
    "8B": Shape(4096, 12288, 36, 32, 8, False),
}


@dataclass(frozen=True, slots=True)
class _RandomSource:
    """A tensor of random weights as the writer takes it."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    std: float
    random: np.random.Generator
    dtype: str = "random"

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return a vector as float32: ones for norms (std 0), else normal numbers."""
        width = self.shape[-1]
        if self.std == 0.0:
            return np.ones((stop - start, width), dtype=np.float32)
        return self.random.normal(0.0, self.std, (stop - start, width)).astype(np.float32)

    def encoded_rows(self, start: int, stop: int) -> bytes:
        """Return rows in their stored form."""
        if self.kind == _Q.F32:
            return self.rows(start, stop).tobytes()
        return random_rows(self.random, self.kind, (stop - start, self.shape[-1]), self.std).tobytes()


def write_random_target(path: Path, shape: Shape, quant: str, seed: int = 0) -> None:
    """Write a qwen3 target of random weights.

    Parameters
    ----------
    path
        File to write.
    shape
        Sizes; rows must be whole numbers of the quantization's blocks.
    quant
        One of `QUANTS`: the mix llama.cpp knows by this name.
    seed
        Of the weights.

    Raises
    ------
    ValueError
        If `quant` is not known or the shape does not fit it.
    DSparkError
        If the file cannot be written.
    """
    out_type = _out_type(quant)
    random = np.random.Generator(np.random.SFC64(seed))
    plans = [
        _plan(name, size, _target_type(name, out_type, shape), _target_std(name, size, shape), random)
        for name, size in _target_tensors(shape).items()
    ]
    with replace_on_success(path) as temporary:
        write_gguf(temporary, _target_metadata(shape, out_type), plans, lambda name, n: None)


def write_random_drafter(
    path: Path, target: Path, quant: str, *, draft_vocab: int = 0, seed: int = 0, block_size: int = _BLOCK_SIZE
) -> None:
    """Write a drafter of random weights for a target: a useless one, or one for synthetic acceptance.

    Parameters
    ----------
    path
        File to write.
    target
        GGUF file of the target: its sizes, its tokenizer.
    quant
        One of `QUANTS`, as `dspark-convert` would store it.
    draft_vocab
        Tokens the drafter can propose; 0 is the whole vocabulary with the target's head.
    seed
        Of the weights.
    block_size
        Drafted tokens of a block.

    Raises
    ------
    ValueError
        If `quant` or `draft_vocab` is wrong or the shape does not fit.
    ModelLoadError
        If the target cannot be read.
    DSparkError
        If the file cannot be written.
    """
    out_type = _out_type(quant)
    file = GGUFFile(target)
    info = read_target(file)
    config = _drafter_config(info, draft_vocab, block_size)
    random = np.random.Generator(np.random.SFC64(seed))
    plans = [
        _drafter_plan(expected, config, out_type, random)
        for expected in list_expected(config)
        if not expected.is_optional
    ]
    metadata = encode_metadata(config, f"drafter, {NAME}", out_type.file_type, info)
    with replace_on_success(path) as temporary:
        write_gguf(temporary, metadata, plans, lambda name, n: None)


def _out_type(quant: str) -> OutType:
    if quant not in QUANTS:
        raise ValueError(f"quant must be one of {', '.join(QUANTS)}, got {quant}")
    return OUT_TYPES[quant]


def _plan(
    name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, std: float, random: np.random.Generator
) -> TensorPlan:
    source = _RandomSource(shape, kind, std, random)
    return TensorPlan(name, shape, "vector" if len(shape) == 1 else "matrix", source, kind)


# ---- the target ----


def _target_tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    d, f, v = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (d,),
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        "attn_q_norm": (shape.head_dim,),
        "attn_k_norm": (shape.head_dim,),
        "ffn_norm": (d,),
        "ffn_gate": (f, d),
        "ffn_up": (f, d),
        "ffn_down": (d, f),
    }
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (v, d), "output_norm.weight": (d,)}
    if not shape.is_tied:
        tensors["output.weight"] = (v, d)
    blocks = {f"blk.{i}.{name}.weight": size for i in range(shape.n_layers) for name, size in layer.items()}
    return tensors | blocks


def _target_type(name: str, out_type: OutType, shape: Shape) -> GGMLQuantizationType:
    if "norm" in name:
        return _Q.F32
    is_head = name == "output.weight" or (shape.is_tied and name == "token_embd.weight")
    return _mixed_type(name, is_head, out_type, shape.n_layers)


def _mixed_type(name: str, is_head: bool, out_type: OutType, n_layers: int) -> GGMLQuantizationType:
    """Say what `llama_model_quantize` makes of a matrix; read in src/llama-quant.cpp, checked by a test."""
    if is_head and out_type.type in (_Q.Q4_0, _Q.Q4_K):
        return _Q.Q6_K
    if out_type.type == _Q.Q4_K and (".attn_v." in name or ".ffn_down." in name):
        layer = int(name.split(".")[1])
        eighth = n_layers // 8
        is_finer = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
        return _Q.Q6_K if is_finer else _Q.Q4_K
    return out_type.type


def _target_std(name: str, size: tuple[int, ...], shape: Shape) -> float:
    if len(size) == 1:
        return 0.0
    gain = _LOGIT_STD if name in ("output.weight", "token_embd.weight") else 1.0
    return gain / math.sqrt(size[-1])


def _target_metadata(shape: Shape, out_type: OutType) -> dict[str, bytes]:
    values: dict[str, Any] = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.name": f"target, {NAME}",
        "general.file_type": out_type.file_type,
        "general.quantization_version": 2,
        "qwen3.context_length": _CONTEXT_LENGTH,
        "qwen3.embedding_length": shape.hidden_size,
        "qwen3.block_count": shape.n_layers,
        "qwen3.feed_forward_length": shape.intermediate_size,
        "qwen3.attention.head_count": shape.n_heads,
        "qwen3.attention.head_count_kv": shape.n_kv_heads,
        "qwen3.attention.key_length": shape.head_dim,
        "qwen3.attention.value_length": shape.head_dim,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 1e6,
    }
    return {key: encode_value(value) for key, value in values.items()} | tokenizer_metadata(shape.vocab_size)


# ---- the drafter ----


def _drafter_config(target: TargetInfo, draft_vocab: int, block_size: int) -> DrafterConfig:
    if not 0 <= draft_vocab <= target.vocab_size:
        raise ValueError(f"draft_vocab must be in 0 .. {target.vocab_size}, got {draft_vocab}")

    def size(key: str, default: int = 0) -> int:
        return optional_integer(target.file, f"{target.architecture}.{key}") or default

    n_heads = size("attention.head_count")
    rope_theta = target.file.get(f"{target.architecture}.rope.freq_base")
    width = size("feed_forward_length", 2 * target.hidden_size)  # hybrid targets have one per layer
    shape = Shape(target.hidden_size, width, target.n_layers, n_heads, n_heads, True)
    return DrafterConfig(
        hidden_size=target.hidden_size,
        intermediate_size=shape.intermediate_size,
        n_layers=_N_DRAFT_LAYERS,
        n_heads=n_heads,
        n_kv_heads=size("attention.head_count_kv", n_heads),
        head_dim=size("attention.key_length", target.hidden_size // max(n_heads, 1)),
        rms_norm_eps=1e-6,
        rope_theta=float(rope_theta) if isinstance(rope_theta, float) else 1e6,
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab or target.vocab_size,
        context_length=_CONTEXT_LENGTH,
        block_size=block_size,
        mask_token_id=_mask_token(target),
        target_layers=shape.target_layers,
        markov_rank=_MARKOV_RANK,
        markov_head_type="vanilla",
        has_confidence_head=True,
        confidence_with_markov=True,
    )


def _mask_token(target: TargetInfo) -> int:
    mask = optional_integer(target.file, MASK_KEY)
    return target.vocab_size - 1 if mask is None else mask


def _drafter_plan(
    expected: ExpectedTensor, config: DrafterConfig, out_type: OutType, random: np.random.Generator
) -> TensorPlan:
    name, shape = expected.gguf, expected.shape
    if expected.role == "map":
        ids = np.sort(random.permutation(config.vocab_size)[: config.draft_vocab_size])
        plan = _plan(name, shape, _Q.I64, 0.0, random)
        return replace(plan, role="map", integers=ids.astype(np.int64))
    kind, _ = choose_type(expected.role, shape[-1], 1.0, out_type.type)
    if out_type.quantizer and expected.role in ("matrix", "output"):
        kind = _mixed_type(name, expected.role == "output", out_type, config.n_layers)
    return replace(_plan(name, shape, kind, _drafter_std(expected), random), role=expected.role)


def _drafter_std(expected: ExpectedTensor) -> float:
    if "norm" in expected.gguf:
        return 0.0
    if expected.gguf.startswith("markov_"):
        return _MARKOV_STD
    gain = _LOGIT_STD if expected.role == "output" else 1.0
    return gain / math.sqrt(expected.shape[-1])
