"""Embeddings of texts, normalised to length 1. Event loop only; the passes run in a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_cpp.errors import ContextFullError
from dspark_cpp.server.engine_pool import EnginePool
from dspark_cpp.server.loaded_model import LoadedModel
from dspark_cpp.server.problems import BadRequestError

__all__ = ["Embeddings", "embed_texts"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of length 1, one per text, the tokens they took, and the time of loading."""

    vectors: list[list[float]]
    n_tokens: int
    load_ns: int


async def embed_texts(
    pool: EnginePool,
    name: str,
    texts: Sequence[str | Sequence[int]],
    *,
    dimensions: int | None = None,
    truncates: bool = False,
    keep_alive: float | None = None,
) -> Embeddings:
    """Embed texts, or token ids.

    Raises
    ------
    BadRequestError
        If `dimensions` is not one the model has, or a text is too long and must not be cut.
    """
    begin = time.perf_counter_ns()
    async with pool.use(name, keep_alive) as model:
        load_ns = time.perf_counter_ns() - begin
        n_embd = model.llm.model.n_embd
        if dimensions is not None and not 1 <= dimensions <= n_embd:
            raise BadRequestError(f"dimensions must be between 1 and {n_embd}, got {dimensions}", param="dimensions")
        vectors, n_tokens = [], 0
        for text in texts:
            tokens = _tokens_of(model, text, truncates)
            n_tokens += len(tokens)
            state = await model.embed(tokens) if tokens else [0.0] * n_embd
            vectors.append(_normalised(state[:dimensions]))
        return Embeddings(vectors, n_tokens, load_ns)


def _tokens_of(model: LoadedModel, text: str | Sequence[int], truncates: bool) -> list[int]:
    tokens = list(text) if not isinstance(text, str) else model.llm.tokenize(text) if text else []
    limit = model.n_ctx_embedding
    if len(tokens) > limit and not truncates:
        raise ContextFullError(f"a text to embed must have at most {limit} tokens, got {len(tokens)}")
    return tokens[:limit]


def _normalised(state: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in state))
    return [value / length for value in state] if length > 0 else list(state)
