"""Drafter files of other layouts: numbers, not just loading.

The oracle is the golden block of the PyTorch reference, or a product in numpy where the layout changes what the
reference would see.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import copy_field
from dspark_cpp import _core
from dspark_cpp.convert import ConvertOptions, convert
from dspark_cpp.convert.pair import LAST_LAYER_ARCHITECTURES, TAPPABLE_ARCHITECTURES
from pairs import DATA, convert_heads
from test_goldens import load_case, relative_error

Tensors = dict[str, np.ndarray]
TOLERANCE = 1e-3  # f32 sums in another order, as in test_goldens


def rewrite(
    source: Path, destination: Path, change: Callable[[Tensors], None], keys: dict[str, Any] | None = None
) -> Path:
    """Write an f32 file again with changed tensors and keys."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(destination, arch=reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in (keys or {}):
            copy_field(gguf, writer, field)
    for key, value in (keys or {}).items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(key, value)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(tensors)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.I64 if name == "d2t" else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return destination


def probe(target: Path, drafter: Path, tokens: np.ndarray, head: str = "full") -> dict[str, Any]:
    model = _core.Model.load_target(str(target))
    result: dict[str, Any] = _core._testing.draft_probe(
        model, _core.Model.load_drafter(str(drafter), model), tokens.tolist(), head=head
    )
    return result


@pytest.fixture(scope="module")
def vanilla(f32_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_heads(f32_target, tmp_path_factory.mktemp("files"))["vanilla"]


def read_tensors(path: Path) -> Tensors:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_own_embeddings_draft_the_same(f32_target: Path, tmp_path: Path) -> None:
    golden = load_case("vanilla", 0)
    own = tmp_path / "own.gguf"
    convert(ConvertOptions(DATA / "vanilla", f32_target, own, outtype="f32", own_embeddings=True))
    result = probe(f32_target, own, golden["tokens"])
    # The checkpoint's embedding is bf16, the target's comes from Q8_0: both round the same weights to 3 digits.
    assert relative_error(result["base_logits"][:, golden["columns"]], golden["base_logits"]) < 0.05
    info = _core.Model.load_drafter(str(own), _core.Model.load_target(str(f32_target))).drafter_info
    assert info.owns_embedding
    assert info.owns_output


@pytest.mark.parametrize("head", ["full", "candidates", "graph"])
def test_reduced_vocabulary_map_reaches_everywhere(head: str, f32_target: Path, vanilla: Path, tmp_path: Path) -> None:
    """A shuffled map over the whole vocabulary must change nothing: U, W2 rows, candidates, drafted tokens."""
    golden = load_case("vanilla", 0)
    order = np.random.default_rng(3).permutation(2048).astype(np.int64)
    embedding = read_tensors(f32_target)["token_embd.weight"]

    def shuffle(tensors: Tensors) -> None:
        tensors["output.weight"] = embedding[order]
        tensors["markov_w2.weight"] = tensors["markov_w2.weight"][order]
        tensors["d2t"] = order

    result = probe(f32_target, rewrite(vanilla, tmp_path / "d2t.gguf", shuffle), golden["tokens"], head)
    assert relative_error(result["base_logits"], golden["base_logits"]) < TOLERANCE
    assert result["tokens"] == golden["greedy"].tolist()


def test_reduced_vocabulary_drafts_its_own_tokens_only(f32_target: Path, vanilla: Path, tmp_path: Path) -> None:
    golden = load_case("vanilla", 0)
    kept = np.arange(0, 2048, 5, dtype=np.int64)
    embedding = read_tensors(f32_target)["token_embd.weight"]

    def reduce(tensors: Tensors) -> None:
        tensors["output.weight"] = embedding[kept]
        tensors["markov_w2.weight"] = tensors["markov_w2.weight"][kept]
        tensors["d2t"] = kept

    result = probe(f32_target, rewrite(vanilla, tmp_path / "few.gguf", reduce), golden["tokens"])
    assert set(result["tokens"]) <= set(kept.tolist())
    assert relative_error(result["base_logits"][:, kept], golden["base_logits"][:, kept]) < TOLERANCE


def test_slot_of_the_anchor_is_skipped(f32_target: Path, vanilla: Path, tmp_path: Path) -> None:
    """6 slots without the anchor's see the same 7 inputs as 7 slots with it: slot k is their slot k + 1."""
    golden = load_case("vanilla", 0)
    keys = {"dflash.sample_from_anchor": False, "dflash.block_size": 6}
    result = probe(f32_target, rewrite(vanilla, tmp_path / "bonus.gguf", lambda _: None, keys), golden["tokens"])
    assert len(result["tokens"]) == 6
    assert relative_error(result["hidden"], golden["hidden"][1:]) < TOLERANCE
    assert relative_error(result["base_logits"], golden["base_logits"][1:]) < TOLERANCE


@pytest.mark.parametrize("lone_embedding", [False, True])
def test_untied_target_lends_its_head(lone_embedding: bool, f32_target: Path, vanilla: Path, tmp_path: Path) -> None:
    """U must come from the target's output head, not from an embedding, even if the drafter holds a lone embedding."""
    golden = load_case("vanilla", 0)
    noise = np.random.default_rng(4).standard_normal((2048, 256)).astype(np.float32)
    untied = rewrite(f32_target, tmp_path / "untied.gguf", lambda t: t.update({"output.weight": noise}))

    def add_embedding(tensors: Tensors) -> None:
        if lone_embedding:
            tensors["token_embd.weight"] = read_tensors(f32_target)["token_embd.weight"]

    drafter = rewrite(vanilla, tmp_path / "drafter.gguf", add_embedding)
    result = probe(untied, drafter, golden["tokens"])
    assert relative_error(result["hidden"], golden["hidden"]) < TOLERANCE  # the backbone sees embeddings only
    assert relative_error(result["base_logits"], result["hidden"] @ noise.T) < TOLERANCE


def test_both_sides_know_the_same_tappable_architectures() -> None:
    source = (Path(__file__).parents[1] / "csrc" / "llama_api_drafter_check.cpp").read_text()
    listed = source[source.index("> tappable = {") : source.index("> whole = {")]
    whole = source[source.index("> whole = {") : source.index("const std::string name")]
    assert set(re.findall(r'"([^"]+)"', listed)) == TAPPABLE_ARCHITECTURES
    assert set(re.findall(r'"([^"]+)"', whole)) == LAST_LAYER_ARCHITECTURES
