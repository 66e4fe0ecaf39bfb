"""The prompts of a calibration: built-in ones or the user's, read, tokenized, and split into two halves.

Owns: file forms and their errors. Must not know: the engine, what is measured.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dspark_cpp import _core
from dspark_cpp.chat import render_chat, without_second_bos

__all__ = ["Prompt", "read_prompts", "split_prompts"]

_BUILT_IN = Path(__file__).parent / "calibration_prompts.json"
_TEXT_TOKENS = 64  # of a running text: its beginning is the prompt, the model writes on

Prompt = list[int]


def split_prompts(domains: Sequence[Sequence[Prompt]], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Split the different prompts at random into two halves: for the fit, and held out.

    Parameters
    ----------
    domains : sequence of sequence of list of int
        Prompts by domain. Each domain is halved by itself, so that both halves ask for the same mixture.
    seed : int
        Of the split.

    Raises
    ------
    ValueError
        Fewer than 2 different prompts.
    """
    rng = random.Random(seed)
    halves: tuple[list[Prompt], list[Prompt]] = ([], [])
    seen: set[tuple[int, ...]] = set()
    for domain in domains:
        fresh = [prompt for prompt in dict.fromkeys(map(tuple, domain)) if prompt not in seen]
        seen.update(fresh)
        rng.shuffle(fresh)
        for prompt in fresh:
            min(halves, key=len).append(list(prompt))
    if not halves[1]:
        raise ValueError(f"prompts must hold at least 2 different ones, got {len(seen)}")
    for half in halves:
        rng.shuffle(half)  # a run that ends early has seen all domains
    return halves


def read_prompts(model: _core.Model, path: Path | None) -> list[list[Prompt]]:
    """Read prompts and tokenize them.

    Parameters
    ----------
    model : Model
        The target.
    path : Path, optional
        JSON lines, each with "prompt" (a question), "messages" (a conversation) or "text" (a running text, of which the
        model continues the beginning); a JSON object of lists of questions by domain; or plain text, in which every
        paragraph is a running text. None: the prompts that come with the package.

    Returns
    -------
    list of list of list of int
        Token ids by domain; files other than a JSON object are one domain.

    Raises
    ------
    ValueError
        Naming file and line that cannot be used.
    """
    path = path or _BUILT_IN
    text = _read_text(path)
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        domains = [[_prompt_of_line(model, line, f"{path}, line {number}") for number, line in lines]]
    elif path.suffix == ".json":
        questions = _questions(text, path)
        domains = [[_ask(model, [_user(question)]) for question in domain] for domain in questions]
    else:
        domains = [[_beginning(model, part.strip()) for part in text.split("\n\n") if part.strip()]]
    if not any(domains):
        raise ValueError(f"data must hold prompts, got none in {path}")
    if not all(chain.from_iterable(domains)):
        raise ValueError(f"prompts must hold text, got an empty one in {path}")
    return domains


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}"
        ) from None


def _questions(text: str, path: Path) -> list[list[str]]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} must hold a JSON object of lists of questions: {error}") from None
    is_good = isinstance(data, dict) and all(
        isinstance(questions, list) and all(isinstance(question, str) and question.strip() for question in questions)
        for questions in data.values()
    )
    if not is_good:
        raise ValueError(f"{path} must hold a JSON object of lists of questions, got {text.strip()[:60]}")
    return list(data.values())


def _prompt_of_line(model: _core.Model, line: str, place: str) -> Prompt:
    try:
        match json.loads(line):
            case {"messages": [_, *_] as messages} if all(map(_is_message, messages)):
                return _ask(model, messages)
            case {"prompt": str(question)} if question.strip():
                return _ask(model, [_user(question)])
            case {"text": str(text)} if text.strip():
                return _beginning(model, text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    shown = line.strip()[:80]
    raise ValueError(f'{place} must be an object with a "prompt", "text" or "messages" that hold text, got {shown}')


def _is_message(message: object) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _user(question: str) -> dict[str, str]:
    return {"role": "user", "content": question}


def _ask(model: _core.Model, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """Render a conversation; a model without a chat template continues the last message's text."""
    if model.chat_template is None:
        return model.tokenize(str(messages[-1]["content"]))
    return without_second_bos(model, model.tokenize(render_chat(model, messages)))


def _beginning(model: _core.Model, text: str) -> Prompt:
    tokens = model.tokenize(text)
    return tokens[: max(min(_TEXT_TOKENS, len(tokens) // 2), 1)]
