"""The sequential head and the confidence head in float64, straight from the equations (DESIGN section 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import sampling

Array = np.ndarray[Any, Any]


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


@dataclass
class Slot:
    """What one slot computed: e (r,), q (r,) with B = W2 q, B (n_vocab_draft,), p^d (n_vocab,)."""

    embedding: Array
    state: Array
    transition_bias: Array
    probs: Array
    token: int
    confidence_logit: float | None


def transition_state(
    weights: Mapping[str, Any], hidden: Array, embedding: Array, recurrent: Array
) -> tuple[Array, Array]:
    """The vector that W2 is applied to, and the new recurrent state."""
    if weights["type"] == "vanilla":
        return embedding, recurrent
    if weights["type"] == "gated":
        gate = sigmoid(weights["gate"] @ np.concatenate([hidden, embedding]) + weights["gate_bias"])
        return gate * embedding, recurrent
    joint = weights["joint"] @ np.concatenate([recurrent, embedding, hidden]) + weights["joint_bias"]
    gate, candidate, output = np.split(joint, 3)
    new = sigmoid(gate) * recurrent + (1.0 - sigmoid(gate)) * np.tanh(candidate)
    return np.tanh(output), new


def draft_block(
    weights: Mapping[str, Any],
    request: Mapping[str, Any],
    n_candidates: int,
    uniform: Callable[[int], float],
    n_followers: int = 0,
) -> list[Slot]:
    """One block of one request, slot by slot; `n_candidates` = 0 is the full vocabulary.

    `weights` and `request` hold what the binding `draft_blocks` takes; `uniform(slot)` decides a sampled slot.
    """
    n_vocab = weights["n_vocab"]
    to_row = {int(t): i for i, t in enumerate(weights.get("d2t", range(n_vocab)))}
    recurrent = np.zeros(weights["rank"])
    previous, drafted, slots = request["anchor"], [], []
    for k, hidden in enumerate(np.asarray(request["hidden"], dtype=np.float64)):
        embedding = np.asarray(weights["w1"], dtype=np.float64)[previous]
        state, recurrent = transition_state(weights, hidden, embedding, recurrent)
        bias = np.asarray(weights["w2"], dtype=np.float64) @ state
        logits = combined_logits(weights, request["base_logits"][k], bias, to_row, n_candidates, n_followers)
        if "output" in request:
            logits = sampling.adjust_logits(logits, request, [], [*request["output"], *drafted])
        probs = sampling.truncate(logits, request)
        previous = int(np.argmax(probs)) if request.get("temperature", 1.0) == 0 else sampling.sample(probs, uniform(k))
        drafted.append(previous)
        slots.append(Slot(embedding, state, bias, probs, previous, confidence(weights, hidden, embedding)))
    return slots


def combined_logits(
    weights: Mapping[str, Any],
    base: Array,
    bias: Array,
    to_row: Mapping[int, int],
    n_candidates: int,
    n_followers: int = 0,
) -> Array:
    """U + B over the target vocabulary, -inf outside the candidates and the draft vocabulary.

    Candidates are the tokens of the `n_candidates` largest U, and of the `n_followers` largest B.
    """
    base = np.asarray(base, dtype=np.float64)
    to_token = {row: token for token, row in to_row.items()}
    followers = [to_token[int(row)] for row in np.argsort(-bias)[:n_followers]]
    chosen = {*np.lexsort((np.arange(len(base)), -base))[: n_candidates or None].tolist(), *followers}
    cap = weights.get("logit_softcap", 0.0)
    logits = np.full(len(base), -np.inf)
    for token in chosen:
        if int(token) in to_row and base[token] > -np.inf:
            capped = cap * np.tanh(base[token] / cap) if cap else base[token]
            logits[token] = capped + bias[to_row[int(token)]]
    return logits


def confidence(weights: Mapping[str, Any], hidden: Array, embedding: Array) -> float | None:
    """w . [h; e] + b, or w . h + b when the weight is only as long as h."""
    if "confidence" not in weights:
        return None
    weight = np.asarray(weights["confidence"], dtype=np.float64)
    features = np.concatenate([hidden, embedding])[: len(weight)]
    return float(weight @ features) + float(weights["confidence_bias"])
