"""`dspark calibrate`: runs a pair with whole blocks verified, fits on one half of the prompts, measures on the other.

Owns: which prompts are run how, the blocks they yield, the split. Must not know: how figures are computed
(calibration_fit), shown (calibration_report) or stored (calibration_files). Main thread only: it steps
the engine itself.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_cpp import _core
from dspark_cpp.calibration import CalibrationEntry
from dspark_cpp.calibration_fit import PositionFigures, conditional_acceptance, fit_sts, measure_positions
from dspark_cpp.chat import render_chat, without_second_bos
from dspark_cpp.config import CalibrateConfig
from dspark_cpp.errors import DSparkError

__all__ = ["Blocks", "CaseResult", "calibrate_pair", "collect_blocks", "read_prompts", "split_prompts"]

_BUILT_IN = Path(__file__).parent / "calibration_prompts.json"
_TEXT_TOKENS = 64  # of a running text: its beginning is the prompt, the model writes on

Progress = Callable[[int], None]
Prompt = list[int]


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

    `before` and `after` hold figures per position on the held-out blocks, with temperatures 1 and with the fitted
    ones; both are empty for a drafter without a confidence head.
    """

    entry: CalibrationEntry
    held_out: Blocks
    n_held_out_prompts: int
    before: list[PositionFigures] = field(default_factory=list)
    after: list[PositionFigures] = field(default_factory=list)


def calibrate_pair(
    engine: _core.Engine, block_size: int, prompts: Sequence[Prompt], config: CalibrateConfig, progress: Progress
) -> Iterator[CaseResult]:
    """Measure and fit every rule and temperature of `config`.

    Parameters
    ----------
    engine : Engine
        Over the pair, verifying the full block each round.
    block_size : int
        Positions of the drafter's block.
    prompts : sequence of list of int
        Token ids; at least 2 different ones.
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
    ValueError
        Too few prompts.
    DSparkError
        A request failed, or the prompts yielded no block.
    """
    halves = split_prompts(prompts, config.seed)
    for temperature in config.temperatures:
        for rule in config.rules if temperature > 0 else ("exact",):
            options: dict[str, Any] = {"temperature": temperature, "verification": rule}
            fit, held_out = (
                collect_blocks(engine, block_size, half, config, options, progress, stream)
                for stream, half in enumerate(halves)
            )
            yield _fit_case(rule, temperature, fit, held_out, len(halves[1]))


def split_prompts(prompts: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split the different ones of `prompts` at random into two halves: for the fit, and held out."""
    different = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    if len(different) < 2:
        raise ValueError(f"prompts must hold at least 2 different ones, got {len(different)}")
    random.Random(seed).shuffle(different)
    n_fit = (len(different) + 1) // 2
    return different[:n_fit], different[n_fit:]


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


def _fit_case(rule: str, temperature: float, fit: Blocks, held_out: Blocks, n_prompts: int) -> CaseResult:
    gamma = fit.logits.shape[1] or int(fit.verified.max())
    acceptance = _as_stored(conditional_acceptance(fit.accepted, gamma, fit.verified))
    if not fit.logits.shape[1]:
        entry = CalibrationEntry(rule, temperature, (), acceptance, len(fit.accepted))
        return CaseResult(entry, held_out, n_prompts)
    sts = _as_stored(fit_sts(fit.logits, fit.accepted, fit.verified))
    entry = CalibrationEntry(rule, temperature, sts, acceptance, len(fit.accepted))
    before, after = (
        measure_positions(held_out.logits, held_out.accepted, temperatures, held_out.verified)
        for temperatures in (np.ones(gamma), np.array(sts))
    )
    return CaseResult(entry, held_out, n_prompts, before, after)


def _as_stored(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Round to what is stored in either form: four digits, of which a 32-bit float loses none."""
    return tuple(float(f"{value:.4g}") for value in values)


# ---- prompts ----


def read_prompts(model: _core.Model, path: Path | None) -> list[Prompt]:
    """Read prompts and tokenize them.

    Parameters
    ----------
    model : Model
        The target.
    path : Path, optional
        JSON lines, each with "prompt" (a question), "messages" (a conversation) or "text" (a running text, of which the
        model continues the beginning); a JSON object of lists of questions by domain; or plain text, in which every
        paragraph is a running text. None: the prompts that come with the package.

    Raises
    ------
    ValueError
        Naming the line that cannot be used.
    OSError
        If the file cannot be read.
    """
    path = path or _BUILT_IN
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [_prompt_of_line(model, line, f"{path}, line {number}") for number, line in lines]
    if path.suffix == ".json":
        return [_ask(model, [_user(question)]) for questions in _domains(text, path) for question in questions]
    return [_beginning(model, part.strip()) for part in text.split("\n\n") if part.strip()]


def _domains(text: str, path: Path) -> list[list[str]]:
    try:
        data = json.loads(text)
        domains = [list(questions) for questions in data.values()]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} must hold a JSON object of lists of questions: {error}") from None
    if not all(isinstance(question, str) for questions in domains for question in questions):
        raise ValueError(f"{path} must hold a JSON object of lists of questions, got something that is no string")
    return domains


def _prompt_of_line(model: _core.Model, line: str, place: str) -> Prompt:
    try:
        match json.loads(line):
            case {"messages": [*messages]}:
                return _ask(model, messages)
            case {"prompt": str(question)}:
                return _ask(model, [_user(question)])
            case {"text": str(text)}:
                return _beginning(model, text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    raise ValueError(f'{place} must have "prompt", "messages" or "text", got {line[:80]}')


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _ask(model: _core.Model, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Render a conversation; a model without a chat template continues the last message's text."""
    if model.chat_template is None:
        return model.tokenize(str(messages[-1].get("content", "")))
    return without_second_bos(model, model.tokenize(render_chat(model, messages)))


def _beginning(model: _core.Model, text: str) -> Prompt:
    tokens = model.tokenize(text)
    return tokens[: max(min(_TEXT_TOKENS, len(tokens) // 2), 1)]
