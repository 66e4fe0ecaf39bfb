"""Asks the running server: where it is (`OLLAMA_HOST`), one request, its answer or its error."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from dspark_cpp.errors import DSparkError

__all__ = ["ask", "server_url"]

_DEFAULT_PORT = 11434
_DEFAULT_PORTS = {"http": 80, "https": 443}
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
_TIMEOUT_SECONDS = 30.0


def server_url() -> str:
    """Return the server's address by `OLLAMA_HOST`, read as Ollama does: scheme, port and path may be left out.

    Raises
    ------
    ValueError
        If it cannot be read.
    """
    text = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http", text
    if scheme not in _DEFAULT_PORTS:
        raise ValueError(f"OLLAMA_HOST must begin with http:// or https://, got {text!r}")
    try:
        parts = urlsplit(f"//{rest}" if rest.count(":") < 2 or "[" in rest else f"//[{rest}]")
        port = parts.port or (_DEFAULT_PORTS[scheme] if separator else _DEFAULT_PORT)
    except ValueError:
        raise ValueError(f"OLLAMA_HOST must read [http://]host[:port], got {text!r}") from None
    host = _EVERYWHERE.get(parts.hostname or "", parts.hostname or "")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path.rstrip('/')}"


def ask(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Send one request and return the JSON of its answer.

    Raises
    ------
    DSparkError
        If no server answers, or it answers with an error.
    """
    url = server_url() + path
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DSPARK_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as reply:
            return json.loads(reply.read().splitlines()[-1])
    except urllib.error.HTTPError as error:
        raise DSparkError(_error_text(error)) from None
    except (OSError, ValueError, IndexError) as error:
        cause = getattr(error, "reason", error)
        raise DSparkError(f"cannot reach the server at {server_url()}: {cause} (is `dspark serve` running?)") from None


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"])
    except (ValueError, KeyError, TypeError):
        return f"the server answers with status {error.code}"
