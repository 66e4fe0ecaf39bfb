"""Embeddings of texts. Event loop only; the passes run in a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_cpp.errors import ContextFullError
from dspark_cpp.server.engine_pool import EnginePool
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.problems import BadRequestError

__all__ = ["EmbedOptions", "Embeddings", "embed_texts", "normalised"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """How texts are embedded.

    Attributes
    ----------
    dimensions
        Numbers of a vector that are kept; None: all.
    truncates
        Cut a text that is too long instead of refusing it.
    keep_alive
        Seconds the model stays loaded; None: as configured.
    n_ctx
        Most tokens of a text; 0: as many as the model takes.
    """

    dimensions: int | None = None
    truncates: bool = False
    keep_alive: float | None = None
    n_ctx: int = 0


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One vector per text as the model gives it, the tokens they took, and the time of loading."""

    vectors: list[list[float]]
    n_tokens: int
    load_ns: int


async def embed_texts(
    pool: EnginePool, name: str, texts: Sequence[str | Sequence[int]], options: EmbedOptions
) -> Embeddings:
    """Embed texts, or token ids.

    Raises
    ------
    BadRequestError
        If `dimensions` is not one the model has.
    ContextFullError
        If a text is too long and must not be cut.
    """
    begin = time.perf_counter_ns()
    async with pool.use(name, options.keep_alive) as model:
        load_ns = time.perf_counter_ns() - begin
        n_embd = model.llm.model.n_embd
        if options.dimensions is not None and not 1 <= options.dimensions <= n_embd:
            rule = f"dimensions must be between 1 and {n_embd}, got {options.dimensions}"
            raise BadRequestError(rule, param="dimensions")
        vectors, n_tokens = [], 0
        for text in texts:
            tokens = _tokens_of(model, text, options)
            n_tokens += len(tokens)
            state = await model.embed(tokens) if tokens else [0.0] * n_embd
            vectors.append(state[: options.dimensions])
        return Embeddings(vectors, n_tokens, load_ns)


def normalised(vector: Sequence[float]) -> list[float]:
    """Return a vector of length 1 in the same direction; zeros stay."""
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length > 0 else list(vector)


def _tokens_of(model: LoadedModel, text: str | Sequence[int], options: EmbedOptions) -> list[int]:
    tokens = list(text) if not isinstance(text, str) else model.llm.tokenize(text) if text else []
    limit = min(options.n_ctx or model.n_ctx_embedding, model.n_ctx_embedding)
    if len(tokens) > limit and not options.truncates:
        raise ContextFullError(f"a text to embed must have at most {limit} tokens, got {len(tokens)}")
    return tokens[:limit]
