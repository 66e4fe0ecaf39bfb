"""Options of a model by Ollama's names: which there are and what they may hold.

The store keeps every option that Ollama knows, also those that this engine has no use for: a Modelfile from elsewhere
must not fail over them. What they do is decided where a request is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["checked_parameters", "parse_parameter"]

_NAMES: dict[type, str] = {
    int: "draft_num_predict main_gpu mirostat num_batch num_ctx num_gpu num_gqa num_keep num_predict num_thread "
    "repeat_last_n seed top_k",
    float: "frequency_penalty min_p mirostat_eta mirostat_tau presence_penalty repeat_penalty temperature tfs_z top_p "
    "typical_p",
    bool: "f16_kv logits_all low_vram numa penalize_newline use_mlock use_mmap vocab_only",
    str: "stop",
}
_TYPES = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_TRUTHS = {"true": True, "1": True, "false": False, "0": False}


def parse_parameter(name: str, text: str) -> Any:
    """Return the value of a Modelfile's `PARAMETER name text`.

    Raises
    ------
    ValueError
        If there is no such option, or it cannot hold this.
    """
    kind = _type_of(name)
    try:
        return _TRUTHS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"parameter {name} must be {_describe(kind)}, got {text!r}") from None


def checked_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with their types checked; `stop` becomes a list.

    Raises
    ------
    ValueError
        If there is no such option, or it cannot hold this.
    """
    return {name: _checked(name, value) for name, value in parameters.items()}


def _checked(name: str, value: Any) -> Any:
    kind = _type_of(name)
    if kind is str:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
            raise ValueError(f"parameter {name} must be a text or a list of texts, got {value!r}")
        return list(values)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"parameter {name} must be {_describe(kind)}, got {value!r}")
    return value


def _type_of(name: str) -> type:
    if name not in _TYPES:
        raise ValueError(f"parameter must be one of {', '.join(sorted(_TYPES))}, got {name!r}")
    return _TYPES[name]


def _describe(kind: type) -> str:
    return {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[kind]
