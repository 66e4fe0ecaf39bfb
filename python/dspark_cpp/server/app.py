"""The application: routes of both dialects, the page, health and figures, how errors look, how it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dspark_cpp.server import openai_objects
from dspark_cpp.server.access import Access
from dspark_cpp.server.catalog import Catalog
from dspark_cpp.server.context import ServerContext
from dspark_cpp.server.logs import RequestLog
from dspark_cpp.server.ollama_routes import ollama_routes
from dspark_cpp.server.openai_routes import openai_routes
from dspark_cpp.server.problems import Problem, problem_of
from dspark_cpp.server.settings import ServerConfig
from dspark_cpp.store import Store

__all__ = ["make_app"]

_log = logging.getLogger(__name__)
_WEB = Path(__file__).parent / "web"
_GREETING = "Ollama is running"
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Vary": "Accept",
}


def make_app(config: ServerConfig) -> Starlette:
    """Return the application of one server.

    Parameters
    ----------
    config
        How it runs. Model files of the command line are looked at here.

    Raises
    ------
    OSError, ModelLoadError, ValueError
        If a model of the command line cannot be used.
    """
    store = None if config.store is None else Store(config.store)
    context = ServerContext(config, Catalog(config.models, store))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        keeper = asyncio.ensure_future(context.pool.run())
        try:
            yield
        finally:
            keeper.cancel()
            await context.pool.close()

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def figures(_: Request) -> Response:
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/", _root, methods=["GET", "HEAD"]),
        Route("/health", health),
        Route("/metrics", figures),
        *ollama_routes(context),
        *openai_routes(context),
        Mount("/web", _Web(directory=_WEB, check_dir=False)),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(RequestLog, metrics=context.metrics), Middleware(Access, config=config)],
        exception_handlers={HTTPException: _answer_http_error, Exception: _answer_error, Problem: _answer_error}
        | dict.fromkeys(_told_errors(), _answer_error),
    )
    app.state.context = context
    return app


def _told_errors() -> list[type[Exception]]:
    from dspark_cpp.errors import DSparkError

    return [DSparkError, ValueError, TypeError]


class _Web(StaticFiles):
    """The page's files, with its headers."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        """Return a file."""
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update({"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"})
        return response


async def _root(request: Request) -> Response:
    page = _WEB / "index.html"
    if request.method == "GET" and "text/html" in request.headers.get("accept", "") and page.is_file():
        return FileResponse(page, headers=_PAGE_HEADERS, media_type="text/html")
    return PlainTextResponse(_GREETING, headers={"Vary": "Accept"})


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/v1/"):
        return _openai_error(Problem(error.status_code, str(error.detail)))
    return PlainTextResponse(f"{error.status_code} {error.detail.lower()}", error.status_code, error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status == 500:
        _log.error("cannot answer a request", exc_info=error)
    if request.method == "HEAD":
        return PlainTextResponse("", problem.status, problem.headers)
    if request.url.path.startswith("/v1/"):
        return _openai_error(problem)
    return JSONResponse({"error": problem.message}, problem.status, problem.headers)


def _openai_error(problem: Problem) -> Response:
    return JSONResponse(openai_objects.error_body(problem), problem.status, problem.headers)
