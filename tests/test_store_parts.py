"""store: models that come in several files."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import rewrite
from dspark_cpp.errors import BlobError
from dspark_cpp.store import Store
from dspark_cpp.store.parts import collect_links, in_order, linked_path
from test_store import keep


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


def test_split_target_is_found_as_a_whole(store: Store, tmp_path: Path, demo_target: Path) -> None:
    pytest.importorskip("dspark_cpp._core")
    from dspark_cpp import LLM, SamplingParams

    rewrite(demo_target, tmp_path / "big.gguf", {}, split_max_tensors=30)
    parts = sorted(tmp_path.glob("big-*.gguf"))
    assert len(parts) > 1
    in_place = store.create("in-place", target=parts[0])
    assert len(in_place.target) == len(parts)
    made = store.create("blobs", files={part.name: keep(store, part) for part in reversed(parts)})
    assert made.details.parameter_size == "8.40M"
    for part in parts:
        part.rename(part.with_name(f"gone-{part.name}"))
    store.check(made)
    with LLM(made.target_path, n_ctx=64, n_threads=1) as llm:
        [answer] = llm.generate(["The moon"], SamplingParams(max_tokens=2, temperature=0))
    assert answer.text
    with pytest.raises(BlobError, match="No such file"):
        store.check(in_place)
    store.delete("blobs")
    store.collect()
    assert list((store.root / "links").iterdir()) == []


def test_links_are_made_again_when_they_are_collected_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = [tmp_path / "blobs" / name for name in "ab"]
    symlink_to = Path.symlink_to

    def collect_and_link(link: Path, target: str) -> None:
        monkeypatch.setattr(Path, "symlink_to", symlink_to)
        collect_links(tmp_path / "links", [])
        link.symlink_to(target)

    monkeypatch.setattr(Path, "symlink_to", collect_and_link)
    first = linked_path(tmp_path / "links", blobs)
    assert [path.readlink().name for path in sorted(first.parent.iterdir())] == ["a", "b"]


def test_parts_must_be_complete() -> None:
    assert in_order(["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"])[0] == "m-00001-of-00002.gguf"
    for names in (["m-00001-of-00002.gguf"], ["m-00001-of-00002.gguf", "m-00003-of-00002.gguf"], []):
        with pytest.raises(ValueError, match="all parts of one split model"):
            in_order(names)
