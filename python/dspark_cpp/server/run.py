"""Running the application: uvicorn, its signals, clients that never send a whole header."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dspark_cpp.server.app import make_app
from dspark_cpp.server.logs import set_up_logging
from dspark_cpp.server.settings import ServerConfig

__all__ = ["serve"]

_log = logging.getLogger(__name__)
_KEEP_ALIVE_SECONDS = 75
_BACKLOG = 1024
_SAME_SIGNAL_SECONDS = 0.2  # a terminal and a supervisor may both pass on one Ctrl-C


def serve(config: ServerConfig) -> None:
    """Serve until a signal: the first one lets requests end (`drain_timeout`), the second one stops at once.

    Raises
    ------
    OSError, ModelLoadError, ValueError
        If a model of the command line cannot be used, or the address is taken.
    """
    set_up_logging(config.log_format)
    server = _Server(uvicorn_config(config))
    server.run()
    if server.was_forced:
        os._exit(130)  # threads may be in the middle of a pass that nobody waits for
    if not server.started:
        raise OSError(f"cannot listen on {config.host} port {config.port}")


def uvicorn_config(config: ServerConfig) -> uvicorn.Config:
    """Return uvicorn's form of the options."""
    return uvicorn.Config(
        make_app(config),
        host=config.host,
        port=config.port,
        http=_protocol(config.limits.header_seconds),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(int(config.drain_timeout), 1),
        h11_max_incomplete_event_size=64 * 1024,
        backlog=_BACKLOG,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )


class _Server(uvicorn.Server):
    """Stops at once at any second signal; uvicorn itself minds only a second Ctrl-C."""

    was_forced = False
    _first_signal = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or stop."""
        if self.should_exit:
            is_second = time.monotonic() - self._first_signal > _SAME_SIGNAL_SECONDS
            self.was_forced = self.force_exit = self.force_exit or is_second
        else:
            self._first_signal = time.monotonic()
            _log.info("signal %d: no new requests, %s s for those that run", sig, self.config.timeout_graceful_shutdown)
        self.should_exit = True

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Say where it listens."""
        await super().startup(sockets)
        if self.started:
            scheme = "https" if self.config.is_ssl else "http"
            port = self.servers[0].sockets[0].getsockname()[1]
            _log.info("listening on %s://%s:%d", scheme, self.config.host, port)


def _protocol(header_seconds: float) -> type[H11Protocol]:
    class PatientProtocol(H11Protocol):
        """Hangs up on a client whose request header does not come; uvicorn would wait for ever."""

        _waits: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_header()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._waits is None:
                self._expect_header()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def _expect_header(self) -> None:
            self._waits = self.loop.call_later(header_seconds, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._waits is not None:
                self._waits.cancel()
                self._waits = None

    return PatientProtocol
