"""Asks the running server: where it is (`OLLAMA_HOST`), one request, its answer or its error."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from dspark_cpp.errors import DSparkError
from dspark_cpp.server.address import parse_address

__all__ = ["ask", "server_url"]

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server may listen, and nobody can call
_TIMEOUT_SECONDS = 30.0


def server_url() -> str:
    """Return the server's address by `OLLAMA_HOST`.

    Raises
    ------
    ValueError
        If it cannot be read.
    """
    address = parse_address(os.environ.get("OLLAMA_HOST", ""))
    host = _EVERYWHERE.get(address.host, address.host)
    return f"{address.scheme}://{f'[{host}]' if ':' in host else host}:{address.port}{address.path}"


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
