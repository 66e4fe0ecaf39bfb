"""What a drafter is: the one description that checkpoints and GGUF files are both read into.

Layer ids are kept as llama.cpp counts them, by the input of a layer: Hugging Face id + 1, so that 0 is the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dspark_cpp.errors import ModelLoadError

ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel", "DSparkSpeculator")
HEAD_TYPES = ("vanilla", "gated", "rnn")

HeadType = Literal["vanilla", "gated", "rnn"]
Shapes = Mapping[str, tuple[int, ...]]

MAX_LAYERS = 512  # the largest number that llama.cpp takes
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Sizes and options of one drafter.

    Attributes
    ----------
    target_layers
        Layers of the target whose input is tapped: Hugging Face layer id + 1.
    n_target_layers
        Depth of the target that the drafter was trained for, None when the checkpoint does not say.
    draft_vocab_size
        Rows of the drafter's own output head; smaller than `vocab_size` only with a `d2t` map.
    is_causal
        None when the checkpoint does not say (which means: not causal).
    swa_layers
        One flag per layer, empty when no layer has a sliding window.
    """

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    draft_vocab_size: int
    context_length: int
    block_size: int
    mask_token_id: int
    target_layers: tuple[int, ...]
    markov_rank: int
    markov_head_type: HeadType
    has_confidence_head: bool
    confidence_with_markov: bool
    sample_from_anchor: bool = True
    is_tied: bool = False
    n_target_layers: int | None = None
    is_causal: bool | None = None
    sliding_window: int = 0
    swa_layers: tuple[bool, ...] = ()
    n_rot: int | None = None
    rope_scaling: tuple[str, float, int] | None = None
    scales: tuple[tuple[str, float], ...] = ()

    @property
    def has_reduced_vocab(self) -> bool:
        """Whether the drafter proposes from a subset of the vocabulary."""
        return self.draft_vocab_size < self.vocab_size

    @property
    def confidence_width(self) -> int:
        """Number of inputs of the confidence head."""
        return self.hidden_size + (self.markov_rank if self.confidence_with_markov else 0)


def parse_config(raw: Mapping[str, Any], shapes: Shapes) -> DrafterConfig:
    """Read a checkpoint's config.json; every bad entry is named at once.

    Parameters
    ----------
    raw
        The parsed file: flat (DeepSpec), or with a nested `dflash_config` or `transformer_layer_config` (speculators).
    shapes
        Shapes of the checkpoint's tensors: they answer what some exports leave out of the file (rank, heads).

    Raises
    ------
    ModelLoadError
        If an entry is missing, out of range or of a kind that is not supported.
    """
    fields = _Fields(_flatten(raw))
    _check_kind(fields)
    config = _read_config(fields, shapes)
    _check_config(fields, config)
    if fields.problems:
        raise ModelLoadError("cannot use config.json: " + "; ".join(fields.problems))
    return config


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(raw)
    for nested in ("transformer_layer_config", "dflash_config"):
        if isinstance(raw.get(nested), Mapping):
            flat |= raw[nested]
    is_speculators = "transformer_layer_config" in raw or "aux_hidden_state_layer_ids" in raw
    flat.setdefault("sample_from_anchor", not is_speculators)
    # The architecture is that of the drafter, not that of the layers it is built from.
    flat["architectures"] = raw.get("architectures")
    return flat


class _Fields:
    """Typed access to the entries of a config; problems are collected, not raised."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def first(self, *names: str) -> Any:
        return next((self.raw[name] for name in names if self.raw.get(name) is not None), None)

    def require(self, is_good: bool, name: str, rule: str, value: object) -> None:
        if not is_good:
            self.problems.append(f"{name} must {rule}, got {value!r}")

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = _MAX_INT) -> int:
        value = self.first(name)
        if value is None and default is not None:
            return default
        if not _is_integer(value) or not low <= value <= high:
            self.problems.append(f"{name} must be an integer of {low} to {high}, got {value!r}")
            return low
        return int(value)

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.problems.append(f"{name} must be a positive number, got {value!r}")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.first(name)
        self.require(value is None or isinstance(value, bool), name, "be true or false", value)
        return value if isinstance(value, bool) else default

    def integers(self, name: str, low: int) -> tuple[int, ...]:
        value = self.first(name)
        is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
        if not is_list or not all(_is_integer(item) and low <= item <= _MAX_INT for item in value):
            self.problems.append(f"{name} must be a list of integers of at least {low}, got {value!r}")
            return ()
        return tuple(int(item) for item in value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_kind(fields: _Fields) -> None:
    names = fields.raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    fields.require(name in ARCHITECTURES, "architectures", f"name one of {', '.join(ARCHITECTURES)}", name)
    activation = fields.first("hidden_act")
    fields.require(activation in (None, "silu"), "hidden_act", "be silu", activation)
    fields.require(fields.flag("rope_is_neox_style", True), "rope_is_neox_style", "be true", False)
    fields.require(not fields.flag("attention_bias", False), "attention_bias", "be false", True)


def _read_config(fields: _Fields, shapes: Shapes) -> DrafterConfig:
    hidden_size, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    n_layers, vocab_size = fields.integer("num_hidden_layers", high=MAX_LAYERS), fields.integer("vocab_size", low=2)
    head_dim = fields.integer("head_dim", default=max(hidden_size // n_heads, 1))
    theta, n_rot, scaling = _read_rope(fields, head_dim)
    window, swa_layers = _read_window(fields, n_layers)
    rank = fields.integer("markov_rank", default=shapes.get("markov_head.markov_w1.weight", (0, 0))[-1])
    return DrafterConfig(
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", default=n_heads),
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", fields.first("rms_norm_eps")),
        rope_theta=theta,
        vocab_size=vocab_size,
        draft_vocab_size=fields.integer("draft_vocab_size", default=vocab_size),
        context_length=fields.integer("max_position_embeddings"),
        block_size=fields.integer("block_size"),
        mask_token_id=fields.integer("mask_token_id", low=0),
        target_layers=_read_target_layers(fields),
        markov_rank=rank,
        markov_head_type=_read_head_type(fields),
        has_confidence_head=fields.flag("enable_confidence_head", "confidence_head.proj.weight" in shapes),
        confidence_with_markov=_read_with_markov(fields, shapes, hidden_size),
        sample_from_anchor=fields.flag("sample_from_anchor", True),
        is_tied=fields.flag("tie_word_embeddings", False),
        n_target_layers=_read_target_depth(fields),
        is_causal=_read_causal(fields),
        sliding_window=window,
        swa_layers=swa_layers,
        n_rot=n_rot,
        rope_scaling=scaling,
        scales=_read_scales(fields),
    )


def _read_target_layers(fields: _Fields) -> tuple[int, ...]:
    if fields.first("aux_hidden_state_layer_ids") is not None:
        return fields.integers("aux_hidden_state_layer_ids", low=0)
    return tuple(layer + 1 for layer in fields.integers("target_layer_ids", low=-1))


def _read_target_depth(fields: _Fields) -> int | None:
    # Some exports write the number of taps here, which says nothing about the target.
    depth = fields.integer("num_target_layers", default=0)
    ids = fields.first("target_layer_ids", "aux_hidden_state_layer_ids")
    n_taps = len(ids) if isinstance(ids, list) else 0
    return None if depth in (0, n_taps) else depth


def _read_head_type(fields: _Fields) -> HeadType:
    value = fields.first("markov_head_type")
    match value:
        case None | "vanilla":
            return "vanilla"
        case "gated":
            return "gated"
        case "rnn":
            return "rnn"
    fields.require(False, "markov_head_type", f"be one of {', '.join(HEAD_TYPES)}", value)
    return "vanilla"


def _read_with_markov(fields: _Fields, shapes: Shapes, hidden_size: int) -> bool:
    shape = shapes.get("confidence_head.proj.weight")
    return fields.flag("confidence_head_with_markov", shape is None or shape[-1] != hidden_size)


def _read_causal(fields: _Fields) -> bool | None:
    if fields.first("is_causal", "causal") is None:
        return None
    return fields.flag("is_causal" if fields.first("is_causal") is not None else "causal", False)


def _read_rope(fields: _Fields, head_dim: int) -> tuple[float, int | None, tuple[str, float, int] | None]:
    raw = fields.first("rope_parameters", "rope_scaling") or {}
    params: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
    theta = fields.number("rope_theta", params.get("rope_theta", fields.first("rope_theta")))
    fraction = params.get("partial_rotary_factor", fields.first("partial_rotary_factor"))
    n_rot = None if fraction is None else int(head_dim * fields.number("partial_rotary_factor", fraction))
    return theta, n_rot, _read_rope_scaling(fields, params)


def _read_rope_scaling(fields: _Fields, params: Mapping[str, Any]) -> tuple[str, float, int] | None:
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "default":
        return None
    fields.require(kind in ("linear", "yarn"), "rope_type", "be default, linear or yarn", kind)
    original = params.get("original_max_position_embeddings") or fields.integer("max_position_embeddings")
    return str(kind), fields.number("rope factor", params.get("factor")), original if _is_integer(original) else 1


def _read_window(fields: _Fields, n_layers: int) -> tuple[int, tuple[bool, ...]]:
    types = fields.first("layer_types") or []
    slides = [item == "sliding_attention" for item in types] if isinstance(types, list) else []
    window = fields.integer("swa_window_size", default=fields.integer("sliding_window", default=0, low=0), low=0)
    if fields.flag("use_swa", False):
        slides = [True] * n_layers
    if window == 0 or not any(slides) or not fields.flag("use_sliding_window", True):
        return 0, ()
    fields.require(len(slides) == n_layers, "layer_types", f"have {n_layers} entries", len(slides))
    return window, tuple(slides)


def _read_scales(fields: _Fields) -> tuple[tuple[str, float], ...]:
    """Factors that a few families put on embedding and logits, under their GGUF names."""
    names = {
        "final_logit_softcapping": "final_logit_softcapping",
        "input_embedding_scale": "embedding_scale",
        "output_multiplier": "logit_scale",
    }
    found = ((gguf, fields.first(name), name) for name, gguf in names.items())
    return tuple((gguf, fields.number(name, value)) for gguf, value, name in found if value is not None)


def _check_config(fields: _Fields, config: DrafterConfig) -> None:
    c, require = config, fields.require
    require(c.n_heads % c.n_kv_heads == 0, "num_key_value_heads", f"divide {c.n_heads}", c.n_kv_heads)
    require(c.head_dim % 2 == 0, "head_dim", "be even", c.head_dim)
    require(c.markov_rank > 0, "markov_rank", "be positive (without a Markov head this is no DSpark drafter)", 0)
    require(c.mask_token_id < c.vocab_size, "mask_token_id", f"be below {c.vocab_size}", c.mask_token_id)
    require(c.draft_vocab_size <= c.vocab_size, "draft_vocab_size", f"be at most {c.vocab_size}", c.draft_vocab_size)
