"""A drafter's calibration: what it says, as a record and as JSON.

Plain data with its checks. Must not know: files (calibration_files), how temperatures are fitted (calibration_fit) or
used (the scheduler).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

__all__ = ["MAP_POINTS", "RULES", "VERSION", "Calibration", "CalibrationEntry", "require"]

VERSION = 1
MAP_POINTS = 11  # of a survival map: its values at survivals 0, 0.1, .. 1
RULES = ("exact", "rejection", "block")

# Whose entry stands in for a rule that has none: rejection and block accept alike, exact a little less often.
_FALLBACKS = {
    "exact": ("exact", "rejection", "block"),
    "rejection": ("rejection", "block", "exact"),
    "block": ("block", "rejection", "exact"),
}


@dataclass(frozen=True, slots=True)
class CalibrationEntry:
    """What was learnt under one verification rule at one sampling temperature.

    Parameters
    ----------
    rule : {"exact", "rejection", "block"}
        The verification rule.
    temperature : float
        The requests' sampling temperature, at least 0.
    sts : tuple of float, shape (block_size,)
        Temperature T_k of the confidence logit at each position, above 0; empty for a drafter without a confidence
        head.
    acceptance : tuple of float, shape (block_size,)
        P(token k accepted | those before it were), in [0, 1].
    n_blocks : int
        Blocks it was learnt from.
    offsets : tuple of float, shape (block_size,)
        b_k, finite: the confidence is c_k = sigmoid(logit_k / T_k + b_k). Empty: 0, temperatures alone.
    maps : tuple of float, shape (block_size * 11,)
        Per position the values of M_k at 0, 0.1, .. 1, in [0, 1] and never falling, linear between: the survival of the
        first k tokens is a_k = min(a_{k-1}, M_k(a_{k-1} c_k)). Empty: a_k = a_{k-1} c_k.

    Raises
    ------
    ValueError
        `<name> must <rule>, got <value>`.
    """

    rule: str
    temperature: float
    sts: tuple[float, ...]
    acceptance: tuple[float, ...]
    n_blocks: int
    offsets: tuple[float, ...] = ()
    maps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(self.rule in RULES, "rules", f"be one of {', '.join(RULES)}", self.rule)
        require(
            _is_number(self.temperature) and self.temperature >= 0, "temperatures", "be 0 or more", self.temperature
        )
        require(_is_count(self.n_blocks), "n_blocks", "be a count", self.n_blocks)
        for name, values, is_right, rule in (
            ("sts", self.sts, _is_positive, "be finite and above 0"),
            ("acceptance", self.acceptance, _is_rate, "be in [0, 1]"),
            ("offsets", self.offsets, _is_number, "be finite"),
            ("maps", self.maps, _is_rate, "be in [0, 1]"),
        ):
            require(isinstance(values, tuple), name, "be a list of numbers", values)
            for value in values:
                require(is_right(value), name, rule, value)
        for i, (low, high) in enumerate(pairwise(self.maps), 1):
            require(low <= high or i % MAP_POINTS == 0, "maps", "never fall", f"{high} after {low}")


@dataclass(frozen=True, slots=True)
class Calibration:
    """All entries of one drafter, for one target.

    Parameters
    ----------
    block_size : int
        Positions of a block, at least 1.
    target : str
        Name and file type of the target it was measured with, see `describe_target`.
    entries : tuple of CalibrationEntry
        At least one; no two for the same rule and temperature.
    version : int
        1.

    Raises
    ------
    ValueError
        `<name> must <rule>, got <value>`.
    """

    block_size: int
    target: str
    entries: tuple[CalibrationEntry, ...]
    version: int = VERSION

    def __post_init__(self) -> None:
        require(self.version == VERSION, "version", f"be {VERSION}", self.version)
        require(_is_count(self.block_size) and self.block_size >= 1, "block_size", "be at least 1", self.block_size)
        require(isinstance(self.target, str), "target", "be a string", self.target)
        require(len(self.entries) >= 1, "rules", "name at least one entry", "none")
        for entry in self.entries:
            n_sts, n_acceptance = len(entry.sts), len(entry.acceptance)
            require(n_acceptance == self.block_size, "acceptance", f"have {self.block_size} values", n_acceptance)
            is_like_first = bool(entry.sts) == self.has_sts
            require(is_like_first, "sts", "be there for all entries or for none", f"{n_sts} values")
            require(n_sts in (0, self.block_size), "sts", f"have {self.block_size} values", n_sts)
            n_offsets = n_sts if self.has_offsets else 0
            n_maps = n_sts * MAP_POINTS if self.has_maps else 0
            require(len(entry.offsets) == n_offsets, "offsets", f"have {n_offsets} values", len(entry.offsets))
            require(len(entry.maps) == n_maps, "maps", f"have {n_maps} values", len(entry.maps))
        keys = [(entry.rule, entry.temperature) for entry in self.entries]
        require(len(set(keys)) == len(keys), "rules", "differ in rule or temperature", keys)

    @property
    def has_sts(self) -> bool:
        """Whether there are temperatures: not so for a drafter without a confidence head."""
        return bool(self.entries[0].sts)

    @property
    def has_offsets(self) -> bool:
        """Whether offsets stand beside the temperatures: in all entries or in none."""
        return bool(self.entries[0].offsets)

    @property
    def has_maps(self) -> bool:
        """Whether there are survival maps: in all entries or in none."""
        return bool(self.entries[0].maps)

    def entry_for(self, rule: str, temperature: float) -> CalibrationEntry:
        """Return the entry that fits a request best.

        At temperature 0 all rules accept the same tokens, so an entry at 0 of any rule is taken first. Then those of
        the rule itself count, else of the rule nearest to it (exact: rejection, block; rejection: block, exact; block:
        rejection, exact); of these the one with the nearest temperature, the higher of two as near.

        Parameters
        ----------
        rule : {"exact", "rejection", "block"}
        temperature : float
            The request's sampling temperature.
        """
        require(rule in RULES, "rule", f"be one of {', '.join(RULES)}", rule)
        fallbacks = _FALLBACKS[rule]
        greedy = [entry for entry in self.entries if entry.temperature == 0 == temperature]
        if greedy:
            return min(greedy, key=lambda entry: fallbacks.index(entry.rule))
        present = {entry.rule for entry in self.entries}
        nearest_rule = next(name for name in fallbacks if name in present)
        candidates = [entry for entry in self.entries if entry.rule == nearest_rule]
        return min(candidates, key=lambda entry: (abs(entry.temperature - temperature), -entry.temperature))

    def to_json(self) -> str:
        """Return the side file's text."""
        return json.dumps({"version": self.version, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the side file's text.

        Raises
        ------
        ValueError
            Naming the key that is missing, unknown or wrong.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"calibration must be JSON: {error}") from None
        fields = _fields(data, ("version", "block_size", "target", "entries"), "calibration")
        require(isinstance(fields["entries"], list), "entries", "be a list", fields["entries"])
        keys = ("rule", "temperature", "sts", "acceptance", "n_blocks")
        entries = [_fields(item, keys, "entries", optional=("offsets", "maps")) for item in fields["entries"]]
        return cls(**fields | {"entries": tuple(CalibrationEntry(**_with_tuples(entry)) for entry in entries)})


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Raise ValueError with the usual words unless something holds."""
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value if isinstance(value, str) else repr(value)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_rate(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _fields(data: object, names: Sequence[str], where: str, optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return a JSON object that must have just these keys."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be a JSON object, got {data!r}")
    missing = [name for name in names if name not in data]
    unknown = [name for name in data if name not in (*names, *optional)]
    require(not missing, where, f"have the keys {', '.join(names)}", f"none of {', '.join(missing)}")
    require(not unknown, where, f"have the keys {', '.join(names)}", f"also {', '.join(map(str, unknown))}")
    return dict(data)


def _with_tuples(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
