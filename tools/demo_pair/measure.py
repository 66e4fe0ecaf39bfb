"""Accepted lengths of the demo pair, by the reference loop on the held-out prompts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from tests.reference.dspark_torch import DrafterConfig, LoopOptions, TransformerConfig, Weights, speculative_decode

# (temperature, verification rule) of each measurement
SETTINGS = ((0.0, "exact"), (1.0, "block"), (1.0, "rejection"), (1.0, "exact"))


@dataclass(frozen=True, slots=True)
class Pair:
    """Target and drafter with their configurations."""

    target: Weights
    target_config: TransformerConfig
    drafter: Weights
    config: DrafterConfig


def mean_and_error(committed: list[list[int]]) -> dict[str, float]:
    """Pooled committed tokens per round, with its standard error over prompts (ratio estimator)."""
    n_rounds, n_tokens = sum(map(len, committed)), sum(map(sum, committed))
    ratio = n_tokens / n_rounds
    spread = sum((sum(rounds) - ratio * len(rounds)) ** 2 for rounds in committed)
    n = len(committed)
    error = math.sqrt(spread * n / max(n - 1, 1)) / n_rounds
    return {
        "accepted_length": round(ratio, 4),
        "standard_error": round(error, 4),
        "n_rounds": n_rounds,
        "n_tokens": n_tokens,
    }


def measure(
    pair: Pair, tokenizer: Tokenizer, prompts: list[dict[str, Any]], n_prompts: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Decode the first ``n_prompts`` prompts of each domain under each setting."""
    domains = list(dict.fromkeys(prompt["domain"] for prompt in prompts))
    end_id = tokenizer.token_to_id("<|im_end|>")
    rows = []
    for temperature, rule in SETTINGS:
        for domain in domains:
            texts = [prompt["text"] for prompt in prompts if prompt["domain"] == domain][:n_prompts]
            began, committed = time.monotonic(), []
            for seed, text in enumerate(texts):
                options = LoopOptions(temperature, rule, 64, max_tokens, (end_id,), seed)
                ids = tokenizer.encode(text).ids
                result = speculative_decode(pair.target, pair.target_config, pair.drafter, pair.config, ids, options)
                committed.append(result.committed_per_round)
            row = {
                "domain": domain,
                "temperature": temperature,
                "rule": rule,
                **mean_and_error([r for r in committed if r]),
            }
            rows.append(row)
            print(f"{pair.config.markov_head_type} {row}, {time.monotonic() - began:.1f} s", flush=True)
    return rows
