"""Embeddings of the bundled target: pooling over several passes, limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dspark_cpp import LLM, _core
from dspark_cpp.errors import ContextFullError
from reference.qwen3_numpy import Qwen3

TEXTS = ["a", "What is 12 + 7?", "The cat sat on the mat. " * 30]


def test_values_are_those_of_the_reference(llm: LLM, f32_target: Path):
    """The mean of all states after the final norm, computed in numpy from the same file."""
    embedder, reference = _core.Embedder(llm.model, n_threads=1), Qwen3(f32_target)
    for text in TEXTS:
        tokens = llm.tokenize(text)
        expected = reference.final_states(tokens).mean(axis=0)
        found = np.array(embedder.embed(tokens))
        # f32 weights, an f16 cache and attention: relative errors of 1e-3 are to be expected, a wrong pooling gives 1.
        assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected), text
        for other in (reference.final_states(tokens)[-1], reference.final_states(tokens)[0]):
            assert len(tokens) == 1 or np.linalg.norm(found - other) > 0.05 * np.linalg.norm(expected)


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
