"""Quantized models through our kernels and through ggml's: the same perplexity, and greedy texts that part only where
two tokens are nearly even.

Both quantize the columns alike; they differ in the order of float sums in the products and, most of all, in the
attention, which ggml sums in f16. The text is the 100 prompts of the demo pair, which neither model has seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import _core
from pairs import gap, greedy, read_prompts, run

pytestmark = pytest.mark.skipif(not _core.kernel_types(), reason="no kernels for this processor: ggml's run")

TYPES = ("q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl")
WINDOW = 256  # tokens of one pass
RELATIVE_BOUND = 1e-3  # of the perplexities; measured over 2278 tokens: at most 4.0e-4
MARGIN_BOUND = 0.5  # of log-probabilities; where the texts parted the measured margins were at most 0.2


@pytest.fixture(scope="module", params=TYPES)
def path(request: pytest.FixtureRequest, demo_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "q8_0":
        return demo_target
    made = tmp_path_factory.mktemp("quantized") / f"{request.param}.gguf"
    _core.quantize_model(str(demo_target), str(made), request.param, [])
    return made


def losses(model: _core.Model, tokens: list[int]) -> np.ndarray:
    """Return -log p of every token after the first of each window."""
    probe = _core._testing.TargetProbe(model, n_cells=WINDOW)
    parts = []
    for begin in range(0, len(tokens) - 1, WINDOW):
        rows = tokens[begin : begin + WINDOW + 1]
        probe.remove(0)
        logits = probe.decode([(token, i, 0) for i, token in enumerate(rows[:-1])]).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        normal = np.log(np.exp(logits).sum(1))
        parts.append(normal - logits[np.arange(len(rows) - 1), rows[1:]])
    return np.concatenate(parts)


def compare_perplexities(path: Path, n_tokens: int) -> float:
    ours, ggml = (_core.Model.load_target(str(path), use_kernels=use) for use in (True, False))
    text = [token for prompt in read_prompts(100) for token in ours.tokenize(prompt)][:n_tokens]
    assert len(text) == n_tokens
    mean, expected = losses(ours, text).mean(), losses(ggml, text).mean()
    return abs(float(np.exp(mean - expected)) - 1)


def test_perplexities_agree(path: Path) -> None:
    assert compare_perplexities(path, 512) < 2 * RELATIVE_BOUND  # few tokens: twice the room


@pytest.mark.slow
def test_perplexities_agree_over_a_long_text(path: Path) -> None:
    assert compare_perplexities(path, 2048) < RELATIVE_BOUND


def test_greedy_texts_part_only_where_two_tokens_are_nearly_even(path: Path) -> None:
    ours, ggml = (_core.Model.load_target(str(path), use_kernels=use) for use in (True, False))
    prompts = [ours.tokenize(text) for text in read_prompts(6)]
    options = greedy(32, n_logprobs=2, ignore_eos=True)
    first, second = (
        run(_core.Engine(model, n_ctx=512, n_threads=1, n_parallel=6), prompts, lambda i: options, False)
        for model in (ours, ggml)
    )
    n_compared = 0
    for a, b in zip(first, second, strict=True):
        parted = next((i for i, pair in enumerate(zip(a.tokens, b.tokens, strict=True)) if pair[0] != pair[1]), None)
        n_compared += len(a.tokens) if parted is None else parted
        assert parted is None or gap(a.logprobs[parted].top) < MARGIN_BOUND
    assert n_compared >= 6 * 32 // 2
