"""Embeddings of the bundled target: pooling over several passes, limits."""

from __future__ import annotations

import numpy as np
import pytest
from dspark_cpp import LLM, _core
from dspark_cpp.errors import ContextFullError


def test_long_text_is_pooled_over_its_passes(llm: LLM):
    """A text of several passes: the mean over all rows is the mean of what its beginnings add, row by row."""
    embedder = _core.Embedder(llm.model, n_threads=1)
    tokens = llm.tokenize("The cat sat on the mat. " * 30)[:150]
    assert embedder.pooling == "mean"
    means = {n: np.array(embedder.embed(tokens[:n])) for n in (1, 64, 65, 129, 150)}
    row_64 = 65 * means[65] - 64 * means[64]  # the first row of the second pass
    alone = np.array(embedder.embed(tokens[64:65]))
    assert np.linalg.norm(row_64 - alone) > 0.1  # it saw what stands before it
    again = np.array(embedder.embed(tokens))
    np.testing.assert_array_equal(again, means[150])  # nothing of an earlier text is left


def test_limits_are_told(llm: LLM):
    embedder = _core.Embedder(llm.model, n_ctx=32, n_threads=1)
    with pytest.raises(ContextFullError, match="must fit into 32 tokens, got 33"):
        embedder.embed([1] * 33)
    with pytest.raises(ValueError, match="at least 1 token"):
        embedder.embed([])
    with pytest.raises(ValueError, match=r"tokens must be in \[0, "):
        embedder.embed([-1])
