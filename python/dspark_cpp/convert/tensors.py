"""The one table of a drafter's tensors: names on both sides, shapes, and how each may be stored.

Knows names and shapes only, never a file or a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dspark_cpp.convert.drafter_config import DrafterConfig, Shapes
from dspark_cpp.convert.gguf_file import drop_unit_rows

Role = Literal["matrix", "head", "vector", "embedding", "output", "map"]
Shape = tuple[int, ...]

F32, F16, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16

# The largest finite float16.
F16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One line of the table.

    Attributes
    ----------
    source, gguf
        Name in the checkpoint and in the GGUF file; `{i}` is the layer.
    shape
        Row-major shape as a function of the config.
    role
        What the tensor is for, which decides how it may be stored: `matrix` takes the requested type, `head` stays at
        f16 or better, `vector` is f32, `embedding` and `output` may be absent and then come from the target, `map` is
        int64.
    needed
        For which drafters it must be there; elsewhere it is superfluous.
    """

    source: str
    gguf: str
    shape: Callable[[DrafterConfig], Shape]
    role: Role = "matrix"
    needed: Callable[[DrafterConfig], bool] = lambda c: True


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A line of the table for one drafter."""

    source: str
    gguf: str
    shape: Shape
    role: Role
    is_optional: bool


def _is_gated(c: DrafterConfig) -> bool:
    return c.markov_head_type == "gated"


def _is_rnn(c: DrafterConfig) -> bool:
    return c.markov_head_type == "rnn"


def _has_confidence(c: DrafterConfig) -> bool:
    return c.has_confidence_head


_S = TensorSpec

TENSORS = (
    _S("embed_tokens.weight", "token_embd.weight", lambda c: (c.vocab_size, c.hidden_size), "embedding"),
    _S("lm_head.weight", "output.weight", lambda c: (c.draft_vocab_size, c.hidden_size), "output"),
    _S("d2t", "d2t", lambda c: (c.draft_vocab_size,), "map", lambda c: c.has_reduced_vocab),
    _S("fc.weight", "fc.weight", lambda c: (c.hidden_size, len(c.target_layers) * c.hidden_size)),
    _S("hidden_norm.weight", "enc.output_norm.weight", lambda c: (c.hidden_size,), "vector"),
    _S("norm.weight", "output_norm.weight", lambda c: (c.hidden_size,), "vector"),
    _S("markov_head.markov_w1.weight", "markov_w1.weight", lambda c: (c.vocab_size, c.markov_rank), "head"),
    _S("markov_head.markov_w2.weight", "markov_w2.weight", lambda c: (c.draft_vocab_size, c.markov_rank), "head"),
    _S(
        "markov_head.gate_proj.weight",
        "markov_gate.weight",
        lambda c: (c.markov_rank, c.hidden_size + c.markov_rank),
        "head",
        _is_gated,
    ),
    _S("markov_head.gate_proj.bias", "markov_gate.bias", lambda c: (c.markov_rank,), "vector", _is_gated),
    _S(
        "markov_head.joint_proj.weight",
        "markov_joint.weight",
        lambda c: (3 * c.markov_rank, c.hidden_size + 2 * c.markov_rank),
        "head",
        _is_rnn,
    ),
    _S("markov_head.joint_proj.bias", "markov_joint.bias", lambda c: (3 * c.markov_rank,), "vector", _is_rnn),
    # One row: as f32 it costs nothing, and the scheduler lives on its output.
    _S("confidence_head.proj.weight", "conf_proj.weight", lambda c: (1, c.confidence_width), "vector", _has_confidence),
    _S("confidence_head.proj.bias", "conf_proj.bias", lambda c: (1,), "vector", _has_confidence),
)

LAYER_TENSORS = (
    _S("input_layernorm.weight", "attn_norm.weight", lambda c: (c.hidden_size,), "vector"),
    _S("self_attn.q_proj.weight", "attn_q.weight", lambda c: (c.n_heads * c.head_dim, c.hidden_size)),
    _S("self_attn.k_proj.weight", "attn_k.weight", lambda c: (c.n_kv_heads * c.head_dim, c.hidden_size)),
    _S("self_attn.v_proj.weight", "attn_v.weight", lambda c: (c.n_kv_heads * c.head_dim, c.hidden_size)),
    _S("self_attn.o_proj.weight", "attn_output.weight", lambda c: (c.hidden_size, c.n_heads * c.head_dim)),
    _S("self_attn.q_norm.weight", "attn_q_norm.weight", lambda c: (c.head_dim,), "vector"),
    _S("self_attn.k_norm.weight", "attn_k_norm.weight", lambda c: (c.head_dim,), "vector"),
    _S("post_attention_layernorm.weight", "ffn_norm.weight", lambda c: (c.hidden_size,), "vector"),
    _S("mlp.gate_proj.weight", "ffn_gate.weight", lambda c: (c.intermediate_size, c.hidden_size)),
    _S("mlp.up_proj.weight", "ffn_up.weight", lambda c: (c.intermediate_size, c.hidden_size)),
    _S("mlp.down_proj.weight", "ffn_down.weight", lambda c: (c.hidden_size, c.intermediate_size)),
)

# Buffers that some exports store beside the weights: the inverse of d2t, and frequencies that follow from rope_theta.
_IGNORED_SUFFIXES = ("t2d", "rotary_emb.inv_freq")

# What llama.cpp's loader takes in GGUF drafters of other families, beyond the table; its graph handles them.
_FOREIGN_SUFFIXES = (
    ".scale",
    ".attn_sinks.weight",
    ".post_attention_norm.weight",
    ".post_ffw_norm.weight",
    ".layer_output_scale.weight",
    "rope_freqs.weight",
)


def list_expected(config: DrafterConfig) -> list[ExpectedTensor]:
    """Return every tensor that a drafter of this config has, in the order of the file."""
    layers = [_expand(spec, config, layer) for layer in range(config.n_layers) for spec in LAYER_TENSORS]
    return [_expand(spec, config) for spec in TENSORS if spec.needed(config)] + layers


def _expand(spec: TensorSpec, config: DrafterConfig, layer: int | None = None) -> ExpectedTensor:
    # A head over a reduced vocabulary exists nowhere else: it cannot be borrowed.
    is_optional = spec.role == "embedding" or (spec.role == "output" and not config.has_reduced_vocab)
    source = spec.source if layer is None else f"layers.{layer}.{spec.source}"
    gguf = spec.gguf if layer is None else f"blk.{layer}.{spec.gguf}"
    return ExpectedTensor(source, gguf, spec.shape(config), spec.role, is_optional)


def compare_shapes(config: DrafterConfig, shapes: Shapes, side: Literal["source", "gguf"] = "source") -> list[str]:
    """Compare the tensors that are there with the table.

    Parameters
    ----------
    config
        The drafter's config.
    shapes
        Name to row-major shape, as found.
    side
        Whose names `shapes` has: the checkpoint's or the GGUF file's.

    Returns
    -------
    list of str
        One entry each for all missing, all superfluous and every misshapen tensor; empty when all is well.
    """
    is_gguf = side == "gguf"
    expected = {tensor.gguf if is_gguf else tensor.source: tensor for tensor in list_expected(config)}
    ignored = _FOREIGN_SUFFIXES if is_gguf else _IGNORED_SUFFIXES
    present = {name: shape for name, shape in shapes.items() if not name.endswith(ignored)}
    needed = [name for name, tensor in expected.items() if not tensor.is_optional]
    # llama.cpp takes the keys for values where a GGUF drafter has no value projection.
    missing = [name for name in needed if name not in present and not (is_gguf and name.endswith("attn_v.weight"))]
    problems = ["missing tensors: " + ", ".join(missing)] if missing else []
    if superfluous := sorted(present.keys() - expected.keys()):
        problems.append("superfluous tensors: " + ", ".join(superfluous))
    return problems + _compare_each(expected, present)


def _compare_each(expected: Mapping[str, ExpectedTensor], present: Shapes) -> list[str]:
    return [
        f"shape of {name} must be {list(tensor.shape)}, got {list(present[name])}"
        for name, tensor in expected.items()
        if name in present and drop_unit_rows(present[name]) != drop_unit_rows(tensor.shape)
    ]


@dataclass(frozen=True, slots=True)
class OutType:
    """A requested storage: the type of the large matrices and the number that llama.cpp gives the mix.

    `quantizer` is the name of the mix for `llama_model_quantize`, empty where numpy quantizes.
    """

    type: GGMLQuantizationType
    file_type: int
    quantizer: str = ""


_Q = GGMLQuantizationType

OUT_TYPES: Mapping[str, OutType] = {
    "f32": OutType(_Q.F32, 0),
    "f16": OutType(_Q.F16, 1),
    "bf16": OutType(_Q.BF16, 32),
    "q8_0": OutType(_Q.Q8_0, 7),
    "q5_1": OutType(_Q.Q5_1, 9),
    "q5_0": OutType(_Q.Q5_0, 8),
    "q4_1": OutType(_Q.Q4_1, 3),
    "q4_0": OutType(_Q.Q4_0, 2),
    "q6_k": OutType(_Q.Q6_K, 18, "q6_k"),
    "q5_k_m": OutType(_Q.Q5_K, 17, "q5_k_m"),
    "q5_k_s": OutType(_Q.Q5_K, 16, "q5_k_s"),
    "q4_k_m": OutType(_Q.Q4_K, 15, "q4_k_m"),
    "q4_k_s": OutType(_Q.Q4_K, 14, "q4_k_s"),
    "q3_k_l": OutType(_Q.Q3_K, 13, "q3_k_l"),
    "q3_k_m": OutType(_Q.Q3_K, 12, "q3_k_m"),
    "q3_k_s": OutType(_Q.Q3_K, 11, "q3_k_s"),
    "q2_k": OutType(_Q.Q2_K, 10, "q2_k"),
    "iq4_nl": OutType(_Q.IQ4_NL, 25, "iq4_nl"),
    "iq4_xs": OutType(_Q.IQ4_XS, 30, "iq4_xs"),
}


def choose_type(
    role: Role, width: int, largest: float, wanted: GGMLQuantizationType
) -> tuple[GGMLQuantizationType, str]:
    """Decide how one tensor is stored.

    Parameters
    ----------
    role
        The tensor's role in the table.
    width
        Length of a row.
    largest
        Largest magnitude in the tensor.
    wanted
        Requested type of the large matrices.

    Returns
    -------
    tuple
        The type, and a note when it is not what was asked for.
    """
    if role == "map":
        return GGMLQuantizationType.I64, ""
    if role == "vector":
        return F32, ""
    kind, note = wanted, ""
    if role == "head" and wanted not in (F32, BF16):
        kind = F16
    elif width % GGML_QUANT_SIZES[wanted][0]:
        kind, note = F16, f"f16: rows of {width} do not divide into blocks of {GGML_QUANT_SIZES[wanted][0]}"
    if kind == F16 and largest > F16_MAX:
        kind, note = F32, f"f32: values up to {largest:.3g} exceed f16"
    return kind, note


def count_bytes(shape: Shape, kind: GGMLQuantizationType) -> int:
    """Return the size of a tensor's data in bytes."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    return _product(shape) // per_block * block_bytes


def _product(numbers: Iterable[int]) -> int:
    total = 1
    for n in numbers:
        total *= n
    return total
