"""What can go wrong with a request, as one exception that both dialects know how to show."""

from __future__ import annotations

from dspark_cpp.errors import (
    BlobError,
    ContextFullError,
    DSparkError,
    EngineClosedError,
    ModelNotFoundError,
    PullError,
    QueueFullError,
)

__all__ = ["BadRequestError", "ClientGoneError", "Problem", "problem_of"]

_RETRY_AFTER_SECONDS = 1


class Problem(Exception):  # noqa: N818  (a refusal, not an error of the program)
    """A request that cannot be answered.

    Parameters
    ----------
    status
        HTTP status.
    message
        For the client.
    code
        OpenAI's `code`, if one fits.
    param
        The field at fault, if it is one.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with the status."""
        return {"Retry-After": str(_RETRY_AFTER_SECONDS)} if self.status == 503 else {}


class BadRequestError(Problem):
    """The client's mistake (400)."""

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(400, message, code=code, param=param)


class ClientGoneError(Problem):
    """The client left; 499 as nginx and Ollama log it. Nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "client closed request")


def problem_of(error: Exception) -> Problem:
    """Return what a client is told of an error of this package; anything else is a bare 500."""
    match error:
        case Problem():
            return error
        case QueueFullError() | EngineClosedError():
            return Problem(503, str(error), code="server_busy")
        case ModelNotFoundError():
            return Problem(404, str(error), code="model_not_found")
        case ContextFullError():
            return BadRequestError(str(error), code="context_length_exceeded")
        case BlobError() | PullError():
            return BadRequestError(str(error))
        case DSparkError():
            return Problem(500, str(error))
        case ValueError() | TypeError():
            return BadRequestError(str(error))
        case _:
            return Problem(500, "internal server error")
