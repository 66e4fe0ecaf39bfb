"""Modelfiles: Ollama's recipe of a model, with `DRAFT` beside `FROM`.

Instructions are read without regard to case; a value may stand in double quotes or, over several lines, in triple ones.
Must not know: the store.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dspark_cpp.store.manifest import Manifest
from dspark_cpp.store.parameters import parse_parameter

__all__ = ["Modelfile", "parse_modelfile", "render_modelfile"]

_ROLES = ("system", "user", "assistant")
_LISTS = ("stop",)
_LINE = re.compile(r"\s*([A-Za-z]+)(?:[ \t]+(.*))?", re.DOTALL)
_QUOTES = '"""'


@dataclass(slots=True)
class Modelfile:
    """What a Modelfile says.

    Attributes
    ----------
    source
        After `FROM`: the name of a model or a path.
    draft
        After `DRAFT`: likewise, the drafter.
    system, template, license
        Texts, None when not given.
    parameters
        Options by Ollama's names, in their types.
    messages
        `{"role": ..., "content": ...}` in order.
    warnings
        What was read and is not used.
    """

    source: str
    draft: str | None = None
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile.

    Raises
    ------
    ValueError
        If a line cannot be understood, with its number, or `FROM` is missing.
    """
    found = Modelfile(source="")
    for number, instruction, value in _instructions(text):
        try:
            _apply(found, instruction, value)
        except ValueError as error:
            raise ValueError(f"Modelfile line {number}: {error}") from None
    if not found.source:
        raise ValueError("Modelfile must say FROM a model or a GGUF file")
    return found


def render_modelfile(manifest: Manifest) -> str:
    """Return the Modelfile that makes this model again."""
    lines = [f"FROM {manifest.target_path}"]
    if manifest.draft_path is not None:
        lines.append(f"DRAFT {manifest.draft_path}")
    for name in ("template", "system", "license"):
        if (text := getattr(manifest, name)) is not None:
            lines.append(f"{name.upper()} {_quoted(text)}")
    for name, value in manifest.parameters.items():
        lines += [f"PARAMETER {name} {_shown(item)}" for item in (value if isinstance(value, list) else [value])]
    lines += [f"MESSAGE {message['role']} {_quoted(message['content'])}" for message in manifest.messages]
    return "\n".join(lines) + "\n"


def _apply(found: Modelfile, instruction: str, value: str) -> None:
    if not value and instruction not in ("SYSTEM", "TEMPLATE", "LICENSE"):
        raise ValueError(f"{instruction} must have a value")
    match instruction:
        case "FROM":
            found.source = value
        case "DRAFT":
            found.draft = value
        case "SYSTEM":
            found.system = value
        case "LICENSE":
            found.license = value if found.license is None else f"{found.license}\n{value}"
        case "TEMPLATE":
            found.template = value
            found.warnings.append("TEMPLATE is kept but not used: the chat template of the GGUF file is")
        case "ADAPTER" | "REQUIRES":
            found.warnings.append(f"{instruction} is not supported and left out")
        case "PARAMETER":
            _add_parameter(found, value)
        case "MESSAGE":
            _add_message(found, value)
        case _:
            raise ValueError(
                f"instruction must be FROM, DRAFT, PARAMETER, SYSTEM, TEMPLATE, MESSAGE or LICENSE, got {instruction}"
            )


def _add_parameter(found: Modelfile, value: str) -> None:
    name, text = _split_word(value)
    parsed = parse_parameter(name.lower(), _unquoted(text))
    if name.lower() in _LISTS:
        found.parameters.setdefault(name.lower(), []).append(parsed)
    else:
        found.parameters[name.lower()] = parsed


def _add_message(found: Modelfile, value: str) -> None:
    role, text = _split_word(value)
    if role.lower() not in _ROLES:
        raise ValueError(f"role of a MESSAGE must be system, user or assistant, got {role!r}")
    found.messages.append({"role": role.lower(), "content": _unquoted(text)})


def _split_word(value: str) -> tuple[str, str]:
    word, _, rest = value.partition(" ")
    if not rest.strip():
        raise ValueError(f"{word} must be followed by a value")
    return word, rest.strip()


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, instruction in capitals and value of each instruction."""
    lines = iter(enumerate(text.lstrip("\ufeff").splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"Modelfile line {number}: must be an instruction and its value, got {line.strip()!r}")
        value = (match[2] or "").strip()
        if _opens_quotes(value):
            value = _read_to_quotes(number, value, lines)
        keeps_quotes = match[1].upper() in ("PARAMETER", "MESSAGE")
        yield number, match[1].upper(), value if keeps_quotes else _unquoted(value)


def _opens_quotes(value: str) -> bool:
    return value.count(_QUOTES) % 2 == 1


def _read_to_quotes(number: int, value: str, lines: Iterator[tuple[int, str]]) -> str:
    for _, line in lines:
        value += "\n" + line
        if _QUOTES in line:
            return value.rstrip()
    raise ValueError(f'Modelfile line {number}: """ must be closed')


def _unquoted(value: str) -> str:
    for quote in (_QUOTES, '"'):
        if len(value) >= 2 * len(quote) and value.startswith(quote) and value.endswith(quote):
            return value[len(quote) : -len(quote)]
    return value


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if "\n" in text or '"' in text or text != text.strip() else text


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
