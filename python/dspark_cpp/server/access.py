"""Who may ask: Host and Origin (DNS rebinding, other people's web pages), CORS, the API key. ASGI middleware.

A browser lets any page send requests to this machine. Host tells a page that reached us under a name of its own (DNS
rebinding), Origin the rest; clients that are no browsers send no Origin. The defaults are Ollama's.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_cpp.server.settings import ServerConfig

__all__ = ["Access"]

_LOCAL_ENDINGS = (".localhost", ".local", ".internal")
_LOCAL_ORIGINS = ("localhost", "127.0.0.1", "0.0.0.0", "::1")
_APP_SCHEMES = ("app", "file", "tauri", "vscode-webview", "vscode-file")
_OPEN_PATHS = ("/", "/health")  # without a key: they tell nothing
_METHODS = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
_MAX_AGE_SECONDS = 43200


class Access:
    """Refuses what must not come in and adds the CORS headers.

    Parameters
    ----------
    app
        What stands behind.
    config
        host, hosts, origins, api_key.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._origins = tuple(origin.rstrip("/") for origin in config.origins)
        self._hosts = tuple(host.lower() for host in config.hosts)
        self._own_names = {socket.gethostname().lower(), config.host.lower(), "localhost", ""}
        self._checks_host = _is_loopback(config.host) or bool(config.hosts)
        self._key = None if config.api_key is None else config.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        origin = headers.get("origin")
        if refusal is None and scope["method"] == "OPTIONS":
            refusal = Response(status_code=204, headers=_preflight(headers))
        if origin is None or (refusal is not None and refusal.status_code == 403):
            await (refusal or self._app)(scope, receive, send)
        else:
            await (refusal or self._app)(scope, receive, _with_origin(send, origin))

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        host = _host_name(headers.get("host", ""))
        if self._checks_host and not self._is_own_host(host):
            return _refuse(scope, 403, "host is not allowed")
        origin = headers.get("origin")
        if origin is not None and not self._is_allowed_origin(origin, headers.get("host", "")):
            return _refuse(scope, 403, "origin is not allowed")
        if self._needs_key(scope) and not self._has_key(headers):
            return _refuse(scope, 401, "a valid API key is required", {"WWW-Authenticate": "Bearer"})
        return None

    def _is_own_host(self, host: str) -> bool:
        if "*" in self._hosts or host in self._hosts or host in self._own_names or host.endswith(_LOCAL_ENDINGS):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return address.is_loopback or address.is_private or address.is_unspecified

    def _is_allowed_origin(self, origin: str, host: str) -> bool:
        if any(fnmatchcase(origin, pattern) for pattern in self._origins):
            return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        if parts.scheme in _APP_SCHEMES:
            return True
        if parts.scheme not in ("http", "https"):
            return False
        is_same = parts.netloc.lower() == host.lower() and self._is_own_host(_host_name(host))
        return name in _LOCAL_ORIGINS or is_same

    def _needs_key(self, scope: Scope) -> bool:
        is_open = scope["path"] in _OPEN_PATHS or scope["path"].startswith("/web/")
        return self._key is not None and not is_open and scope["method"] != "OPTIONS"

    def _has_key(self, headers: Headers) -> bool:
        assert self._key is not None
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("utf-8", "replace")
        return hmac.compare_digest(given, self._key) and kind.lower() == "bearer"


def _host_name(host: str) -> str:
    """Host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse(scope: Scope, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Both dialects' clients find `error`; OpenAI's want an object there."""
    if scope["method"] == "HEAD":
        return PlainTextResponse("", status, headers)
    if scope["path"].startswith("/v1/"):
        kind = "authentication_error" if status == 401 else "permission_error"
        code = "invalid_api_key" if status == 401 else None
        return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status, headers)
    return JSONResponse({"error": message}, status, headers)


def _preflight(headers: Headers) -> dict[str, str]:
    wanted = headers.get("access-control-request-headers", "Authorization, Content-Type")
    return {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": _plain(wanted),
        "Access-Control-Max-Age": str(_MAX_AGE_SECONDS),
    }


def _plain(names: str) -> str:
    kept: Sequence[str] = [name.strip() for name in names.split(",")]
    return ", ".join(name for name in kept[:64] if name.replace("-", "").isalnum())


def _with_origin(send: Send, origin: str) -> Send:
    async def send_with_origin(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return send_with_origin
