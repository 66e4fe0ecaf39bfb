"""Reading a JSON body: its text, its depth, and its fields with their types. Pure.

Every reader names the field: `<name> must <rule>, got <value>`. JSON's null counts as absent, as clients send it so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.settings import Limits

__all__ = ["Fields", "check_schema", "parse_body", "read_tool"]

_MAX_SHOWN = 80


def parse_body(body: bytes, limits: Limits) -> Fields:
    """Return the object of a body.

    Raises
    ------
    BadRequestError
        If it is empty, no JSON, no object, nested too deeply, or holds half of a surrogate pair.
    """
    if not body.strip():
        raise BadRequestError("missing request body")
    try:
        found = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise BadRequestError(f"request body must be nested at most {limits.json_depth} deep") from None
    except ValueError as error:
        raise BadRequestError(f"request body must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRequestError(f"request body must be a JSON object, got {type(found).__name__}")
    if _measure(found, limits.json_depth)[0] > limits.json_depth:
        raise BadRequestError(f"request body must be nested at most {limits.json_depth} deep")
    if b"\\u" in body:
        _check_surrogates(found)
    return Fields(found)


def check_schema(name: str, schema: Mapping[str, Any], limits: Limits) -> None:
    """Demand that a JSON schema is of a size that can be made a grammar of."""
    depth, n_values = _measure(schema, limits.schema_depth)
    if depth > limits.schema_depth:
        raise BadRequestError(f"{name} must be nested at most {limits.schema_depth} deep", param=name)
    if n_values > limits.schema_nodes:
        raise BadRequestError(f"{name} must hold at most {limits.schema_nodes} values, got {n_values}", param=name)


def read_tool(tool: Fields, limits: Limits) -> dict[str, Any]:
    """Return a function that a model may call, in the form both dialects share.

    Raises
    ------
    BadRequestError
        If it has no name, or its parameters are no schema of a usable size.
    """
    function = tool.object("function")
    if function is None or not function.text("name"):
        tool.refuse("function", "be an object with a name")
    parameters = function.object("parameters")
    schema = dict(parameters.values) if parameters else {"type": "object", "properties": {}}
    check_schema("tools", schema, limits)
    description = function.text("description")
    return {
        "type": "function",
        "function": {"name": function.text("name"), "description": description, "parameters": schema},
    }


class Fields:
    """An object's fields, each read with its type; remembers which were asked for.

    Parameters
    ----------
    values
        The object.
    prefix
        Goes before names in messages.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.any(name) is not None

    @property
    def unread(self) -> list[str]:
        """Names of fields that nobody asked for: they have had no effect."""
        return [name for name in self.values if name not in self._asked]

    def any(self, name: str) -> Any:
        """Return a value of any type, None if it is absent."""
        self._asked.add(name)
        return self.values.get(name)

    def text(self, name: str, default: str = "", *, limit: int | None = None) -> str:
        """Return a string."""
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.refuse(name, "be a string")
        if limit is not None and len(value) > limit:
            self.refuse(name, f"have at most {limit} characters")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self.any(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.refuse(name, "be true or false")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return a number."""
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            self.refuse(name, "be a number")
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int | None:
        """Return an integer; 3.0 is one too, as some clients know no other numbers."""
        value = self.any(name)
        if value is None:
            return default
        if isinstance(value, float) and _is_finite(value) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, "be an integer")
        if abs(value) >= 2**63:
            self.refuse(name, "fit into 64 bits")
        return int(value)

    def integer_within(self, name: str, low: int, high: int) -> int | None:
        """Return an integer of a range, None if it is absent."""
        value = self.integer(name)
        if value is not None and not low <= value <= high:
            self.refuse(name, f"be between {low} and {high}")
        return value

    def object(self, name: str) -> Fields | None:
        """Return an object."""
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "be an object")
        return Fields(value, f"{self._prefix}{name}.")

    def objects(self, name: str, limit: int) -> list[Fields]:
        """Return a list of objects."""
        items = self.items(name, limit)
        for item in items:
            if not isinstance(item, dict):
                self.refuse(name, "hold objects")
        return [Fields(item, f"{self._prefix}{name}[{i}].") for i, item in enumerate(items)]

    def items(self, name: str, limit: int) -> list[Any]:
        """Return a list."""
        value = self.any(name)
        if value is None:
            return []
        if not isinstance(value, list):
            self.refuse(name, "be a list")
        if len(value) > limit:
            raise self._bad(name, f"hold at most {limit} values, got {len(value)}")
        return value

    def texts(self, name: str, limit: int) -> list[str]:
        """Return a list of strings; one string counts as a list of one."""
        value = self.any(name)
        if isinstance(value, str):
            return [value]
        items = self.items(name, limit)
        if not all(isinstance(item, str) for item in items):
            self.refuse(name, "hold strings")
        return items

    def refuse(self, name: str, rule: str) -> NoReturn:
        """Raise what is wrong with a field."""
        raise self._bad(name, f"{rule}, got {_shown(self.values.get(name))}")

    def _bad(self, name: str, rest: str) -> BadRequestError:
        return BadRequestError(f"{self._prefix}{name} must {rest}", param=f"{self._prefix}{name}")


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _measure(root: Any, enough: int) -> tuple[int, int]:
    """Return depth and number of values, without recursion; the depth is not followed beyond `enough` + 1."""
    level: Sequence[Any] = [root]
    depth = n_values = 0
    while level and depth <= enough:
        depth += 1
        n_values += len(level)
        level = [child for value in level for child in _children(value)]
    return depth, n_values


def _children(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else ()


def _check_surrogates(found: Any) -> None:
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadRequestError("request body must be valid Unicode, got half of a surrogate pair") from None
