"""`dspark calibrate`: runs a pair with whole blocks verified, fits on one half of the prompts, measures on the other.

Owns: which prompts are run how, the blocks they yield. Must not know: where prompts come from (calibration_prompts),
how figures are computed (calibration_fit), shown (calibration_report) or stored (calibration_files). Main thread only:
it steps the engine itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_cpp import _core
from dspark_cpp.calibration import CalibrationEntry
from dspark_cpp.calibration_fit import (
    PositionFigures,
    conditional_acceptance,
    fit_beyond_sts,
    fit_sts,
    measure_positions,
)
from dspark_cpp.calibration_prompts import Prompt
from dspark_cpp.config import CalibrateConfig
from dspark_cpp.errors import DSparkError

__all__ = ["Blocks", "CaseResult", "calibrate_pair", "collect_blocks"]

Progress = Callable[[int], None]


@dataclass(slots=True)
class Blocks:
    """Drafted blocks of one case: a row each.

    `logits` (n_blocks, gamma), or (n_blocks, 0) without a confidence head; `accepted` and `verified` (n_blocks,).
    """

    logits: NDArray[np.float32]
    accepted: NDArray[np.int64]
    verified: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What came of one rule at one temperature.

    `before`, `sts` and `after` hold figures per position on the held-out blocks: of the confidences as they are, with
    temperatures alone, and with what `entry` holds. All are empty for a drafter without a confidence head.
    """

    entry: CalibrationEntry
    held_out: Blocks
    n_held_out_prompts: int
    before: list[PositionFigures] = field(default_factory=list)
    sts: list[PositionFigures] = field(default_factory=list)
    after: list[PositionFigures] = field(default_factory=list)


def calibrate_pair(
    engine: _core.Engine,
    block_size: int,
    halves: tuple[Sequence[Prompt], Sequence[Prompt]],
    config: CalibrateConfig,
    progress: Progress,
) -> Iterator[CaseResult]:
    """Measure and fit every rule and temperature of `config`.

    Parameters
    ----------
    engine : Engine
        Over the pair, verifying the full block each round.
    block_size : int
        Positions of the drafter's block.
    halves : pair of sequences of list of int
        Prompts to fit on, and prompts held out, as token ids.
    config : CalibrateConfig
        What to measure.
    progress : callable
        Called with the number of tokens just generated.

    Yields
    ------
    CaseResult
        Temperature by temperature, rule by rule.

    Raises
    ------
    DSparkError
        A request failed, or the prompts yielded no block.
    """
    for temperature in config.temperatures:
        for rule in config.rules if temperature > 0 else ("exact",):
            options: dict[str, Any] = {"temperature": temperature, "verification": rule}
            fit, held_out = (
                collect_blocks(engine, block_size, half, config, options, progress, stream)
                for stream, half in enumerate(halves)
            )
            acceptance = _as_stored(conditional_acceptance(fit.accepted, block_size, fit.verified))
            entry = CalibrationEntry(rule, temperature, (), acceptance, len(fit.accepted))
            yield _fit_confidence(CaseResult(entry, held_out, len(halves[1])), fit)


def collect_blocks(
    engine: _core.Engine,
    block_size: int,
    prompts: Sequence[Prompt],
    config: CalibrateConfig,
    options: Mapping[str, Any],
    progress: Progress,
    stream: int,
) -> Blocks:
    """Answer prompts until half of `config.n_tokens` are generated, and return the blocks that were drafted.

    At temperature 0 every prompt is answered once, else again and again with new seeds; all answers that were begun
    are finished, so that long ones are not left out.
    """
    rows: list[_core.RoundRecord] = []
    n_left, n_running = config.n_tokens // 2, 0
    waiting = deque(enumerate(prompts))
    while n_running or (waiting and n_left > 0):
        while waiting and n_left > 0 and n_running < 2 * _n_parallel(engine):
            number, prompt = waiting.popleft()
            engine.submit(prompt, _request(config, options, seed=(config.seed << 32) + 2 * number + stream))
            n_running += 1
            if options["temperature"] > 0:
                waiting.append((number + len(prompts), prompt))
        for event in engine.step():
            rows += event.rounds
            n_left -= len(event.tokens)
            progress(len(event.tokens))
            n_running -= event.finish_reason is not None
            if event.error:
                raise DSparkError(f"cannot calibrate: {event.error}")
    return _as_blocks(rows, block_size)


def _n_parallel(engine: _core.Engine) -> int:
    return max(engine.n_running, 8)


def _request(config: CalibrateConfig, options: Mapping[str, Any], seed: int) -> _core.RequestOptions:
    return _core.RequestOptions(max_tokens=config.max_tokens, seed=seed, trace=True, **options)


def _as_blocks(rows: Sequence[_core.RoundRecord], block_size: int) -> Blocks:
    drafted = [row for row in rows if row.prefix_len > 0]
    if not drafted:
        raise DSparkError("cannot calibrate: the prompts yielded no drafted block")
    width = block_size if drafted[0].confidence_logits else 0
    return Blocks(
        np.array([row.confidence_logits for row in drafted], np.float32).reshape(len(drafted), width),
        np.array([row.n_accepted for row in drafted], np.int64),
        np.array([row.prefix_len for row in drafted], np.int64),
    )


def _fit_confidence(case: CaseResult, fit: Blocks) -> CaseResult:
    """Add temperatures and offsets, and the figures; nothing for a drafter without a confidence head."""
    if not fit.logits.shape[1]:
        return case
    sts = fit_sts(fit.logits, fit.accepted, fit.verified)
    temperatures, offsets, maps = map(_as_stored, fit_beyond_sts(fit.logits, fit.accepted, sts, fit.verified))
    entry = replace(case.entry, sts=temperatures, offsets=offsets, maps=maps)
    held_out = case.held_out
    parameters: list[tuple[ArrayLike, ArrayLike, ArrayLike | None]] = [(np.ones_like(sts), 0.0, None), (sts, 0.0, None)]
    parameters.append((temperatures, offsets, maps))
    before, scaled, after = (
        measure_positions(held_out.logits, held_out.accepted, *each, held_out.verified) for each in parameters
    )
    return replace(case, entry=entry, before=before, sts=scaled, after=after)


def _as_stored(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Round to what is stored in either form: four digits, of which a 32-bit float loses none."""
    return tuple(float(f"{value:.4g}") for value in values)
