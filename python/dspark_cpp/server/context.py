"""What the routes of a server share."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dspark_cpp.results import TokenLogprob
from dspark_cpp.server.catalog import Catalog
from dspark_cpp.server.engine_pool import EnginePool
from dspark_cpp.server.exchange import Deadline, read_body, record
from dspark_cpp.server.fields import Fields, parse_body
from dspark_cpp.server.generation import Generation
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.metrics import Metrics
from dspark_cpp.server.settings import ServerConfig

__all__ = ["Endpoint", "ServerContext", "token_bytes"]

Endpoint = Callable[["ServerContext", Request], Awaitable[Response]]

_log = logging.getLogger(__name__)
_MOST_WARNINGS = 8
_LONGEST_NAME = 40


@dataclass(slots=True)
class ServerContext:
    """A server's parts."""

    config: ServerConfig
    catalog: Catalog
    pool: EnginePool = field(init=False)
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        self.pool = EnginePool(self.catalog, self.config)
        self.metrics = Metrics(lambda: self.pool.models, lambda: self.pool.n_waiting)

    async def read(self, request: Request) -> Fields:
        """Return a request's JSON object."""
        limits = self.config.limits
        fields = parse_body(await read_body(request, limits.body_bytes, limits.body_seconds), limits)
        request.state.fields = fields
        return fields

    def route(self, path: str, endpoint: Endpoint, method: str, ignored: Collection[str] = ()) -> Route:
        """Return a route whose request's fields are used, refused, or named in the log.

        Parameters
        ----------
        path, endpoint, method
            As Starlette takes them.
        ignored
            Fields that are meant for others and not worth a line.
        """

        async def handle(request: Request) -> Response:
            response = await endpoint(self, request)
            fields: Fields | None = getattr(request.state, "fields", None)
            unread = [name for name in fields.unread if name not in ignored] if fields else []
            for name in unread[:_MOST_WARNINGS]:
                _log.warning("field %r has no effect on %s", name[:_LONGEST_NAME], path)
            return response

        return Route(path, handle, methods=[method])

    def deadline(self) -> Deadline:
        """Return when a request that comes now must be over."""
        return Deadline(self.config.request_timeout)

    def finish(self, request: Request, generation: Generation) -> None:
        """Count a finished generation and note it for the log."""
        assert generation.last is not None
        name, stats = generation.model.entry.name, generation.last.stats
        self.metrics.count_answer(name, stats, generation.n_generated, generation.prompt_ns, generation.decode_ns)
        record(request.scope).update(
            model=name,
            prompt_tokens=stats.n_prompt,
            tokens=generation.n_generated,
            first_token_seconds=round(generation.prompt_ns / 1e9, 4),
            tokens_per_second=round(max(generation.n_generated - 1, 0) * 1e9 / generation.decode_ns, 1),
            finish=generation.last.finish_reason,
            rounds=stats.n_rounds,
            drafted=stats.n_drafted,
            scheduled=stats.n_scheduled,
            accepted=stats.n_accepted,
            accepted_length=round(stats.accepted_length, 3),
        )


def token_bytes(model: LoadedModel, entries: Sequence[TokenLogprob]) -> dict[int, bytes]:
    """Return the bytes of all tokens that log-probabilities name."""
    ids = {token for entry in entries for token in (entry.token_id, *(token for token, _ in entry.top))}
    return {token: model.llm.model.token_to_piece(token, True) for token in ids}
