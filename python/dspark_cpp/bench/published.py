"""Accepted lengths of published pairs, and the rates that give a random pair the same lengths.

Source: DSpark paper, table 1: tokens per round with the bonus token, temperature 1, block 7.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PUBLISHED", "Rates", "conditional_rate", "parse_rates"]

Rates = Mapping[str, list[float]]  # by domain: P(draft k accepted | those before it were), k = 0 .. block - 1

_DOMAINS = ("gsm8k", "math", "aime25", "mbpp", "humaneval", "livecodebench", "mt-bench", "alpaca", "arena-hard")
_LENGTHS = {
    "qwen3-4b": (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    "qwen3-4b-dflash": (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    "qwen3-8b": (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    "gemma4-12b": (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
}
PUBLISHED = {pair: dict(zip(_DOMAINS, lengths, strict=True)) for pair, lengths in _LENGTHS.items()}
_BLOCK_SIZE = 7


def conditional_rate(accepted_length: float, block_size: int = _BLOCK_SIZE) -> float:
    """Return the rate p with 1 + p + ... + p^block_size = accepted_length.

    Raises
    ------
    ValueError
        If the length is not in [1, 1 + block_size].
    """
    if not 1.0 <= accepted_length <= 1.0 + block_size:
        raise ValueError(f"accepted length must be in [1, {1 + block_size}], got {accepted_length}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        is_short = sum(middle**k for k in range(block_size + 1)) < accepted_length
        low, high = (middle, high) if is_short else (low, middle)
    return (low + high) / 2


def parse_rates(text: str) -> Rates:
    """Read the rates of `--synthetic-acceptance`.

    Parameters
    ----------
    text
        Numbers, one per position (`0.9,0.8`; the last one goes on), several domains apart by `;`. Or a published
        pair, `qwen3-4b`, or some of its domains, `qwen3-4b:gsm8k,alpaca`.

    Raises
    ------
    ValueError
        If it is neither.
    """
    pair, _, names = text.partition(":")
    if pair in PUBLISHED:
        lengths = PUBLISHED[pair]
        chosen = names.split(",") if names else list(lengths)
        if unknown := [name for name in chosen if name not in lengths]:
            raise ValueError(f"domain must be one of {', '.join(lengths)}, got {', '.join(unknown)}")
        return {name: [conditional_rate(lengths[name])] for name in chosen}
    try:
        domains = [[float(rate) for rate in part.split(",")] for part in text.split(";")]
    except ValueError:
        known = ", ".join(PUBLISHED)
        raise ValueError(f"synthetic acceptance must be rates or one of {known}, got {text}") from None
    return {f"rates-{i + 1}" if len(domains) > 1 else "rates": rates for i, rates in enumerate(domains)}
