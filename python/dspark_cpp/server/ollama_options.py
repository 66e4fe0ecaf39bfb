"""Ollama's `options` to sampling parameters. Pure.

Defaults are Ollama's, except that no repetition penalty applies unless one is asked for: it would change every text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_cpp.config import SamplingParams
from dspark_cpp.server.fields import Fields
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.settings import Limits

__all__ = ["Options", "penalty_window", "read_n_ctx", "read_options"]

_USED = {
    "draft_num_predict",
    "frequency_penalty",
    "min_p",
    "num_ctx",
    "num_keep",
    "num_predict",
    "presence_penalty",
    "repeat_last_n",
    "repeat_penalty",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
}
# Known to Ollama; here the engine's options decide, or there is no such sampler.
_WITHOUT_EFFECT = {
    "f16_kv",
    "logits_all",
    "low_vram",
    "main_gpu",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "num_batch",
    "num_gpu",
    "num_gqa",
    "num_thread",
    "numa",
    "penalize_newline",
    "tfs_z",
    "typical_p",
    "use_mlock",
    "use_mmap",
    "vocab_only",
}
_LONGEST_NAME = 40
_CTX_RANGE = (2, 2**24)


@dataclass(frozen=True, slots=True)
class Options:
    """What the options say.

    Attributes
    ----------
    max_tokens
        None: up to the context's end.
    warnings
        Options that change nothing here.
    """

    params: SamplingParams
    max_tokens: int | None
    n_ctx: int | None
    n_keep: int
    warnings: tuple[str, ...]


def read_options(
    given: Mapping[str, Any] | None, defaults: Mapping[str, Any], limits: Limits, logprobs: int | None = None
) -> Options:
    """Return sampling parameters from a request's options over those of the model.

    Raises
    ------
    BadRequestError
        If an option is out of its range.
    """
    own = {name: value for name, value in (given or {}).items() if value is not None}
    fields = Fields({**defaults, **own}, "options.")
    n_predict = fields.integer("num_predict", -1) or -1  # 0 is no limit either, as in Ollama
    return Options(
        params=_params(fields, limits, logprobs),
        max_tokens=None if n_predict < 0 else n_predict,
        n_ctx=fields.integer_within("num_ctx", *_CTX_RANGE),
        n_keep=fields.integer("num_keep", 4) or 0,
        warnings=tuple(_warn(name) for name in own if name not in _USED),
    )


def read_n_ctx(body: Fields) -> int:
    """Return the context that a request's `options` ask for; 0: whatever there is."""
    options = body.object("options")
    return 0 if options is None else options.integer_within("num_ctx", *_CTX_RANGE) or 0


def _params(fields: Fields, limits: Limits, logprobs: int | None) -> SamplingParams:
    seed = fields.integer("seed", -1)
    draft = fields.integer("draft_num_predict", -1)
    values: dict[str, Any] = {
        "temperature": fields.number("temperature", 0.8),
        "top_k": max(fields.integer("top_k", 40) or 0, 0),
        "top_p": _probability(fields.number("top_p", 0.9)),
        "min_p": fields.number("min_p", 0.0),
        "repetition_penalty": fields.number("repeat_penalty", 1.0),
        "presence_penalty": fields.number("presence_penalty", 0.0),
        "frequency_penalty": fields.number("frequency_penalty", 0.0),
        "penalty_window": penalty_window(fields),
        "seed": None if seed is None or seed < 0 else seed,
        "stop": tuple(stop for stop in fields.texts("stop", limits.stops) if stop),
        "draft": "auto" if draft is None or draft < 0 else draft,
        "logprobs": logprobs,
    }
    try:
        return SamplingParams(**values)
    except ValueError as error:
        raise BadRequestError(f"options: {error}", param="options") from None


def penalty_window(fields: Fields) -> int:
    """Return how many of the newest tokens penalties look at; below 0 is Ollama's word for the whole context."""
    window = fields.integer("repeat_last_n", 64)
    return -1 if window is None or window < 0 else window


def _probability(value: float | None) -> float:
    """Ollama takes 0 for top_p and then keeps the likeliest token; here that is any value this small."""
    return max(value if value is not None else 0.9, 1e-6) if value != 1 else 1.0


def _warn(name: str) -> str:
    what = "has no effect here" if name in _WITHOUT_EFFECT else "is unknown"
    return f"option {name[:_LONGEST_NAME]!r} {what}"
