"""Files of random weights: types as llama.cpp's own mixes, values with the spread asked for, and they run."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from dspark_cpp import _core
from dspark_cpp.bench.random_blocks import RANDOM_TYPES, random_rows
from dspark_cpp.bench.random_pair import QUANTS, SHAPES, Shape, write_random_drafter, write_random_target

TINY = Shape(hidden_size=256, intermediate_size=512, n_layers=9, n_heads=4, n_kv_heads=2, is_tied=True, vocab_size=1024)
UNTIED = Shape(256, 512, 9, 4, 2, is_tied=False, vocab_size=1024)


def make_pair(folder: Path, shape: Shape, quant: str, draft_vocab: int = 0) -> tuple[Path, Path]:
    target, drafter = folder / "target.gguf", folder / "drafter.gguf"
    write_random_target(target, shape, quant)
    write_random_drafter(drafter, target, quant, draft_vocab=draft_vocab, seed=1)
    return target, drafter


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", sorted(RANDOM_TYPES, key=lambda kind: kind.name), ids=lambda kind: kind.name)
def test_random_rows_have_mean_and_spread(kind: gguf.GGMLQuantizationType) -> None:
    rows = random_rows(np.random.default_rng(5), kind, (200, 1024), 0.05)
    values = gguf.quants.dequantize(rows, kind)
    assert values.shape == (200, 1024)
    # Four bits have no middle: q4_0's 16 values are centred half a step below zero, 1/9 of the spread.
    assert abs(values.mean()) < (0.12 if kind.name == "Q4_0" else 0.03) * 0.05
    # f16 takes the nearest power of two; the others are exact but for 200000 samples and an f16 scale.
    assert values.std() == pytest.approx(0.05, rel=0.5 if kind.name == "F16" else 0.02)
    assert len({row.tobytes() for row in rows}) == 200


@pytest.mark.parametrize("shape", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("quant", QUANTS)
def test_types_are_those_of_llama_cpp(quant: str, shape: Shape, tmp_path: Path) -> None:
    target, drafter = make_pair(tmp_path, shape, quant)
    full, full_drafter = tmp_path / "full.gguf", tmp_path / "full-drafter.gguf"
    write_random_target(full, shape, "f16")
    write_random_drafter(full_drafter, full, "f16")
    for made, source in ((target, full), (drafter, full_drafter)):
        quantized = tmp_path / "quantized.gguf"
        heads = [name for name in types_of(source) if name.startswith("markov_")]
        _core.quantize_model(str(source), str(quantized), quant, heads)
        assert types_of(made) == types_of(quantized)


@pytest.mark.parametrize("draft_vocab", [0, 300])
def test_pair_loads_and_answers(draft_vocab: int, tmp_path: Path) -> None:
    target_path, drafter_path = make_pair(tmp_path, TINY, "q4_k_m", draft_vocab)
    target = _core.Model.load_target(str(target_path))
    drafter = _core.Model.load_drafter(str(drafter_path), target)
    assert "random weights, for timing" in target.metadata["general.name"]
    assert target.n_vocab == 1024
    assert drafter.drafter_info.target_layers == list(TINY.target_layers)
    assert drafter.drafter_info.n_vocab_draft == (draft_vocab or 1024)
    engine = _core.Engine(target, drafter, n_ctx=128, n_threads=1)
    prompt = target.tokenize("def add(a, b):")
    assert len(prompt) == 14  # one token per byte
    engine.submit(prompt, _core.RequestOptions(max_tokens=8, temperature=0.0, ignore_eos=True, n_logprobs=0))
    events = []
    while engine.has_work:
        events += engine.step()
    engine.close()
    assert sum(len(event.tokens) for event in events) == 8
    assert all(math.isfinite(logprob.logprob) for event in events for logprob in event.logprobs)


def test_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        write_random_target(path, TINY, "q8_0", seed)
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second
    assert first != third


def test_taps_are_those_of_the_published_checkpoints() -> None:
    assert SHAPES["4B"].target_layers == (2, 10, 18, 26, 34)  # Hugging Face's 1, 9, 17, 25, 33
    assert Shape(5120, 17408, 40, 40, 8, False).target_layers == (2, 11, 20, 29, 38)


@pytest.mark.parametrize(("quant", "draft_vocab"), [("q3_x", 0), ("q8_0", 1025), ("q8_0", -1)])
def test_bad_options_are_named(quant: str, draft_vocab: int, tmp_path: Path) -> None:
    target = tmp_path / "target.gguf"
    write_random_target(target, TINY, "q8_0")
    with pytest.raises(ValueError, match=r"(quant|draft_vocab) must be"):
        write_random_drafter(tmp_path / "drafter.gguf", target, quant, draft_vocab=draft_vocab)
