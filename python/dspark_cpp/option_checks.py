"""What an option may hold: `<name> must <rule>, got <value>` as ValueError, a wrong type as TypeError. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

__all__ = [
    "FLOAT_MAX",
    "INT_MAX",
    "check_bool",
    "check_choice",
    "checked_biases",
    "checked_count",
    "checked_integer",
    "checked_number",
    "checked_policy",
    "checked_stops",
    "store",
]

INT_MAX = 2**31 - 1
FLOAT_MAX = 1e30  # the engine computes in 32-bit floats: anything larger would silently become infinite there


def store(options: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass: in __post_init__ alone, to keep the checked form."""
    object.__setattr__(options, name, value)


def checked_integer(name: str, value: object, low: int, high: int) -> int:
    """Return an integer of a range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if not low <= number <= high:
        rule = f"be at least {low}" if number < low else f"be at most {high}"
        raise ValueError(f"{name} must {rule}, got {number}")
    return number


def checked_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """Return a finite number of a range; `above`: the lower end is not part of it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value}")
    if number < low or number > high or (above and number == low):
        rule = f"be {'above' if above else 'at least'} {low:g}" if number <= low else f"be at most {high:g}"
        raise ValueError(f"{name} must {rule}, got {value}")
    return number


def check_bool(name: str, value: object) -> None:
    """Demand True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Demand one of a few words."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {value!r}")
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def checked_count(name: str, value: object, choices: Sequence[str]) -> str | int:
    """Return one of a few words, or a number of tokens."""
    if isinstance(value, str):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)} or a number of tokens, got {value!r}")
        return value
    return checked_integer(name, value, 0, INT_MAX)


def checked_policy(value: object) -> str:
    """Return the policy as the engine takes it: a number is a fixed length, "auto" the default."""
    if not isinstance(value, str):
        length = checked_integer("policy", value, 0, INT_MAX)
        return f"fixed:{length}" if length else "off"
    name, _, argument = value.partition(":")
    rule = "be off, full, fixed:n, threshold:p, algorithm1, adaptive or a number of tokens"
    if value in ("auto", "adaptive"):
        return "adaptive"
    if value in ("off", "full", "algorithm1"):
        return value
    if name == "fixed" and argument.isascii() and argument.isdecimal():
        return checked_policy(int(argument))
    if name == "threshold":
        try:
            threshold = float(argument)
        except ValueError:
            raise ValueError(f"policy must {rule}, got {value!r}") from None
        return f"threshold:{checked_number('policy threshold', threshold, 0.0, 1.0)!r}"
    raise ValueError(f"policy must {rule}, got {value!r}")


def checked_stops(value: object) -> tuple[str, ...]:
    """Return stop strings as a tuple."""
    if not isinstance(value, str | Sequence) or isinstance(value, bytes):
        raise TypeError(f"stop must be a string or a sequence of strings, got {value!r}")
    strings = (value,) if isinstance(value, str) else tuple(value)
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"stop must hold strings, got {string!r}")
        if not string:
            raise ValueError("stop must hold strings of at least one character, got ''")
    return strings


def checked_biases(value: object) -> dict[int, float] | None:
    """Return a bias for each token id."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, got {value!r}")
    return {
        checked_integer("logit_bias token", token, 0, INT_MAX): checked_number(
            "logit_bias value", bias, -FLOAT_MAX, FLOAT_MAX
        )
        for token, bias in value.items()
    }
