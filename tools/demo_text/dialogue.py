"""A question with its answer: the unit all generators of the demo text produce."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One user turn and the assistant's answer."""

    question: str
    answer: str
