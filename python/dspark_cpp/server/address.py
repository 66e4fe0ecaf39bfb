"""`OLLAMA_HOST`, read as Ollama does: by the server for where it listens, by the commands for where it is. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

__all__ = ["Address", "parse_address"]

_PORTS = {"": 11434, "http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is; parts that were left out have Ollama's defaults."""

    scheme: str
    host: str
    port: int
    path: str


def parse_address(text: str) -> Address:
    """Read `[http[s]://][host][:port][/path]`.

    Raises
    ------
    ValueError
        If it cannot be read.
    """
    text = text.strip().strip("\"'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "", text
    if scheme not in _PORTS:
        raise ValueError(f"OLLAMA_HOST must begin with http:// or https://, got {text!r}")
    try:
        parts = urlsplit(f"//{rest}" if rest.count(":") < 2 or "[" in rest else f"//[{rest}]")
        port = _PORTS[scheme] if parts.port is None else parts.port
    except ValueError:
        raise ValueError(f"OLLAMA_HOST must read [http://]host[:port], got {text!r}") from None
    return Address(scheme or "http", parts.hostname or "127.0.0.1", port, parts.path.rstrip("/"))
