"""Sampling in float64, dense and with full sorts: slow, and plain enough to be checked by eye."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def adjust_logits(logits: Array, options: Mapping[str, Any], prompt: Sequence[int], output: Sequence[int]) -> Array:
    """Logit bias, then penalties.

    Notes
    -----
    Semantics of vLLM: repetition over prompt and output, presence and frequency over the output only; of both what is
    among the newest `penalty_window` tokens (-1: all of it).
    """
    window = options.get("penalty_window", -1)
    if window >= 0:
        n_output = min(window, len(output))
        n_prompt = min(window - n_output, len(prompt))
        prompt, output = prompt[len(prompt) - n_prompt :], output[len(output) - n_output :]
    adjusted = np.array(logits, dtype=np.float64)
    for token, bias in options.get("logit_bias", []):
        adjusted[token] += bias
    counts = Counter(output)
    repetition = options.get("repetition_penalty", 1.0)
    for token in set(prompt) | set(counts):
        value = adjusted[token]
        adjusted[token] = value / repetition if value > 0 else value * repetition
    for token, count in counts.items():
        adjusted[token] -= options.get("frequency_penalty", 0.0) * count + options.get("presence_penalty", 0.0)
    return adjusted


def truncate(logits: Array, options: Mapping[str, Any]) -> Array:
    """Temperature, top_k, top_p, min_p: (n_vocab,) logits to (n_vocab,) probabilities."""
    logits = np.asarray(logits, dtype=np.float64)
    order = np.lexsort((np.arange(len(logits)), -logits))  # descending, ties by lowest id
    probs = np.zeros(len(logits))
    temperature = options.get("temperature", 1.0)
    if temperature == 0:
        probs[order[0]] = 1.0
        return probs
    top_k = options.get("top_k", 0)
    kept = order[:top_k] if top_k > 0 else order
    weights = np.exp((logits[kept] - logits[kept[0]]) / temperature)
    weights /= weights.sum()
    if options.get("top_p", 1.0) < 1:  # the smallest prefix that reaches top_p, its last token included
        n = int(np.searchsorted(np.cumsum(weights), options["top_p"])) + 1
        kept, weights = kept[:n], weights[:n]
    is_kept = weights >= options.get("min_p", 0.0) * weights[0]
    probs[kept[is_kept]] = weights[is_kept]
    return probs / probs.sum()


def target_distribution(
    logits: Array, options: Mapping[str, Any], prompt: Sequence[int] = (), output: Sequence[int] = ()
) -> Array:
    """p^t of one row, as the request samples it: (n_vocab,)."""
    return truncate(adjust_logits(logits, options, prompt, output), options)


def sample(probs: Array, u: float) -> int:
    """Inverse transform over ascending ids."""
    return int(np.searchsorted(np.cumsum(probs), u, side="right"))


def log_softmax(logits: Array) -> Array:
    """Log-probabilities of raw logits."""
    logits = np.asarray(logits, dtype=np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())
