"""store: names that cannot leave it, blobs that are what they say, and a whole store after every crash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import rewrite
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.errors import (
    BlobError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    StoreError,
)
from dspark_cpp.store import Manifest, ModelName, Store, checked_digest, model_files
from dspark_cpp.store import blobs as blobs_module

TESTS = Path(__file__).parent
EVIL_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "../../etc/passwd",
    "..%2fx",
    "a/../b",
    "a/..",
    "/etc/passwd",
    "a//b",
    "a/",
    "a:..",
    "a:../b",
    "a:b/c",
    "a\\b",
    "a\0b",
    "a b",
    ".hidden",
    "_/a",
    "a:b:c",
    "a:",
    "ä",
    "a\n",
    "a" * 97,
    "a:" + "b" * 129,
    "evil.example/a/b",
    "http://evil.example/a",
    "a/b/c/d",
]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def keep(store: Store, path: Path) -> str:
    """Put a file into the store as a client would; returns its digest."""
    data = path.read_bytes()
    store.blobs.put(digest_of(data), [data])
    return digest_of(data)


def blob_names(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "blobs").iterdir())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def pair(store: Store, demo_target: Path, demo_drafter: Path) -> Manifest:
    """The bundled pair as blobs of the model `pair`."""
    return store.create(
        "pair",
        files={"target.gguf": keep(store, demo_target)},
        draft_files={"drafter.gguf": keep(store, demo_drafter)},
        system="Be brief.",
        parameters={"temperature": 0, "stop": "x"},
    )


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_name_that_could_leave_the_store_is_refused(store: Store, name: str, demo_target: Path) -> None:
    before = sorted(store.root.parent.rglob("*"))
    for use in (
        lambda: store.get(name),
        lambda: store.create(name, target=demo_target),
        lambda: store.copy(name, "x"),
        lambda: store.delete(name),
        lambda: next(store.pull(name)),
    ):
        with pytest.raises(ValueError, match="must"):
            use()
    assert sorted(store.root.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "text", ["", "sha256:", "sha256:" + "g" * 64, "sha256:../" + "a" * 61, "md5:" + "a" * 64, "a" * 64]
)
def test_digest_that_is_none_is_refused(store: Store, text: str) -> None:
    for use in (checked_digest, store.blobs.path, store.blobs.has, lambda digest: store.blobs.put(digest, [])):
        with pytest.raises(ValueError, match="digest must be"):
            use(text)


def test_name_is_shown_as_written_and_found_in_any_case(store: Store, demo_target: Path) -> None:
    assert str(ModelName.parse("Mine")) == "Mine:latest"
    assert str(ModelName.parse("hf.co/Owner/Repo:Q4_K_M")) == "hf.co/Owner/Repo:Q4_K_M"
    store.create("hf.co/Owner/Repo:Q4_K_M", target=demo_target)
    assert store.get("owner/repo:q4_k_m").name == "hf.co/Owner/Repo:Q4_K_M"
    assert store.get("huggingface.co/OWNER/repo:Q4_K_M").name == "hf.co/Owner/Repo:Q4_K_M"
    with pytest.raises(ModelNotFoundError, match="model 'owner/repo' not found"):
        store.get("owner/repo")


def test_create_ties_target_drafter_and_options_together(store: Store, pair: Manifest) -> None:
    found = Store(store.root).get("pair")
    assert found == pair
    assert found.target_path.read_bytes()[:4] == b"GGUF"
    assert found.draft_path is not None
    assert (found.system, dict(found.parameters)) == ("Be brief.", {"temperature": 0.0, "stop": ["x"]})
    assert found.details.to_dict() == {
        "parent_model": "",
        "format": "gguf",
        "family": "qwen3",
        "families": ["qwen3"],
        "parameter_size": "8.40M",
        "quantization_level": "Q8_0",
    }
    assert found.size == sum(path.stat().st_size for path in (found.target_path, found.draft_path))
    store.check(found)


def test_create_from_a_model_keeps_what_is_not_given(store: Store, pair: Manifest) -> None:
    made = store.create("Child", from_="pair", system="Be long.", parameters={"top_k": 5})
    assert made.blobs == pair.blobs
    assert (made.system, made.parameters) == ("Be long.", {"temperature": 0.0, "stop": ["x"], "top_k": 5})
    assert made.details.parent_model == "pair:latest"
    assert made.digest != pair.digest


def test_create_in_place_copies_nothing(store: Store, demo_target: Path, demo_drafter: Path) -> None:
    made = store.create("here", target=demo_target, draft=demo_drafter)
    assert (made.target_path, made.draft_path) == (demo_target.resolve(), demo_drafter.resolve())
    assert not (store.root / "blobs").exists()
    store.delete("here")
    assert demo_target.exists()


@pytest.mark.parametrize("damage", ["touch", "grow", "header", "remove"])
def test_check_tells_that_a_file_in_place_was_changed(
    store: Store, tmp_path: Path, demo_target: Path, damage: str
) -> None:
    path = tmp_path / "t.gguf"
    shutil.copy(demo_target, path)
    made = store.create("here", target=path)
    mtime_ns = path.stat().st_mtime_ns
    if damage == "touch":
        os.utime(path, ns=(0, mtime_ns + 1))
    elif damage == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    elif damage == "header":
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(0, mtime_ns))
    else:
        path.unlink()
    with pytest.raises(BlobError, match=rf"{path}.*create the model again"):
        store.check(made)


@pytest.mark.parametrize("cut", [0, 20, 5000, 1_000_000])
def test_check_tells_that_a_blob_is_truncated(store: Store, pair: Manifest, cut: int) -> None:
    os.truncate(pair.target_path, cut)
    with pytest.raises(BlobError, match=rf"must have 9007072 bytes, got {cut}: it is damaged; remove the model"):
        store.check(pair)
    with pytest.raises(BlobError, match="damaged"):
        store.create("child", from_="pair")


def test_check_tells_that_a_blob_is_corrupted(store: Store, pair: Manifest) -> None:
    data = bytearray(pair.target_path.read_bytes())
    data[5000] ^= 0xFF
    pair.target_path.write_bytes(data)
    with pytest.raises(BlobError, match=r"header of .* is damaged"):
        store.check(pair)


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (3, "not a GGUF file"),
        (5000, "more than the file can hold"),
        (60_000, "ends early or is damaged"),
        (1_000_000, "damaged or incomplete"),
    ],
)
def test_create_refuses_a_truncated_model(
    store: Store, tmp_path: Path, demo_target: Path, cut: int, message: str
) -> None:
    (tmp_path / "cut").write_bytes(demo_target.read_bytes()[:cut])
    digest = keep(store, tmp_path / "cut")
    with pytest.raises(ModelLoadError, match=rf"blob {digest}: .*{message}"):
        store.create("cut", files={"cut.gguf": digest})
    assert store.list() == ()


def test_create_refuses_what_is_no_pair(store: Store, demo_target: Path, demo_drafter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="must be a target, got a drafter"):
        store.create("x", target=demo_drafter)
    with pytest.raises(ModelLoadError, match="must be a drafter, got a target"):
        store.create("x", target=demo_target, draft=demo_target)
    other = rewrite(demo_target, tmp_path / "other.gguf", {"qwen3.block_count": 2})
    with pytest.raises((ModelMismatchError, ModelLoadError)):
        store.create("x", target=other, draft=demo_drafter)
    with pytest.raises(BlobError, match="is not in the store: send it first"):
        store.create("x", files={"t.gguf": digest_of(b"nothing")})
    assert store.list() == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of from, target and files"),
        ({"files": {}}, "files must be one GGUF file"),
        ({"files": {"a.gguf": "sha256:" + "0" * 64, "b.gguf": "sha256:" + "0" * 64}}, "files must be one GGUF file"),
        ({"from_": "pair", "parameters": {"nonsense": 1}}, "parameter must be one of .*, got 'nonsense'"),
        ({"from_": "pair", "parameters": {"top_k": "x"}}, "parameter top_k must be an integer, got 'x'"),
        ({"from_": "pair", "messages": [{"role": "robot", "content": ""}]}, "message must have a role of"),
        ({"from_": "pair", "draft": "x", "draft_files": {}}, "only one of draft and draft_files"),
    ],
)
def test_create_refuses_bad_arguments(store: Store, pair: Manifest, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.create("bad", **arguments)


def test_put_refuses_bytes_of_another_digest(store: Store) -> None:
    with pytest.raises(BlobError, match=r"digest of the bytes must be sha256:.*, got sha256:.* \(5 bytes\)"):
        store.blobs.put(digest_of(b"right"), [b"wr", b"ong"])
    assert not store.blobs.has(digest_of(b"right"))
    assert list((store.root / "incoming").iterdir()) == []


def test_put_that_breaks_off_leaves_nothing(store: Store) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"ri"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.blobs.put(digest_of(b"right"), chunks())
    assert list((store.root / "incoming").iterdir()) == []


def test_delete_removes_only_blobs_that_nobody_else_needs(store: Store, pair: Manifest) -> None:
    store.create("plain", files={"t.gguf": pair.target[0].digest or ""})
    copied = store.copy("pair", "Copy:of")
    assert copied.digest == pair.digest
    store.delete("pair")
    assert len(blob_names(store)) == 2
    store.delete("copy:OF")
    assert blob_names(store) == [pair.target[0].digest.replace(":", "-")]  # type: ignore[union-attr]
    store.delete("plain")
    assert blob_names(store) == []
    assert list((store.root / "manifests").iterdir()) == []
    with pytest.raises(ModelNotFoundError):
        store.delete("plain")


def test_replacing_a_model_frees_its_old_blobs(store: Store, pair: Manifest, demo_target: Path) -> None:
    store.create("pair", target=demo_target)
    assert blob_names(store) == []


def test_collect_frees_what_nobody_names_once_it_is_old(store: Store, pair: Manifest) -> None:
    data = b"an upload that was never named"
    store.blobs.put(digest_of(data), [data])
    (store.root / "incoming" / "left-by-a-crash").write_bytes(b"12345")
    assert store.collect() == 5
    assert len(blob_names(store)) == 3
    assert store.collect(min_age_s=-1.0) == len(data)
    store.check(pair)


def test_collect_leaves_uploads_in_progress_alone(store: Store) -> None:
    with store.blobs.writer(digest_of(b"12")) as writer:
        writer.write(b"1")
        assert store.collect(min_age_s=-1.0) == 0
        writer.write(b"2")
    assert store.blobs.has(digest_of(b"12"))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 1, "name": "../x", "target": []}']
)
def test_damaged_manifest_spoils_nothing_else(
    store: Store, pair: Manifest, demo_target: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.create("broken", target=demo_target)
    path = store.root / "manifests" / "_" / "broken" / "latest"
    path.write_text(text)
    assert [model.name for model in store.list()] == ["pair:latest"]
    assert "model '_/broken/latest' is damaged" in caplog.text
    with pytest.raises(StoreError, match="model 'broken' is damaged"):
        store.get("broken")
    assert store.collect(min_age_s=-1.0) == 0  # what it needs is unknown, so nothing goes
    store.delete("broken")
    store.check(store.get("pair"))


def test_manifest_from_elsewhere_cannot_point_out_of_the_blobs(store: Store, pair: Manifest) -> None:
    path = store.root / "manifests" / "_" / "pair" / "latest"
    found = json.loads(path.read_text())
    found["target"][0]["digest"] = "sha256:../../../../etc/passwd"
    path.write_text(json.dumps(found))
    with pytest.raises(StoreError, match="digest must be sha256"):
        store.get("pair")


def test_list_is_newest_first(store: Store, pair: Manifest) -> None:
    for i, name in enumerate(("a", "c", "b")):
        store.copy("pair", name)
        os.utime(store.root / "manifests" / "_" / name / "latest", (0, i))
    assert [model.name for model in store.list()] == ["pair:latest", "b:latest", "c:latest", "a:latest"]


def test_concurrent_changes_leave_every_name_whole(store: Store, demo_target: Path, demo_drafter: Path) -> None:
    target, draft = demo_target.read_bytes(), demo_drafter.read_bytes()

    def work(worker: int) -> None:
        mine = Store(store.root)
        for i in range(6):
            name = f"shared{(worker + i) % 3}"
            for data in (target, draft):
                mine.blobs.put(digest_of(data), [data])
            try:
                mine.create(
                    name, files={"t": digest_of(target)}, draft_files={"d": digest_of(draft)}, system=str(worker)
                )
                mine.delete(f"shared{i % 3}")
                mine.collect()
            except (ModelNotFoundError, BlobError):
                pass  # another worker deleted the name, or the last name of the blobs between put and create

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    for manifest in store.list():
        store.check(manifest)
    store.collect(min_age_s=-1.0)
    needed = {digest.replace(":", "-") for manifest in store.list() for digest in manifest.blobs}
    assert set(blob_names(store)) == needed


def test_blob_that_goes_while_it_is_read_is_named(
    store: Store, demo_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = digest_of(demo_target.read_bytes())
    store.blobs.put(digest, [demo_target.read_bytes()])

    def read_and_lose(path: Path) -> GGUFFile:
        file = GGUFFile(path)
        path.unlink()
        return file

    monkeypatch.setattr(model_files, "GGUFFile", read_and_lose)
    with pytest.raises(BlobError, match=f"{digest} is not in the store"):
        store.create("new", files={"t": digest})
    assert not store.list()


def test_list_goes_on_when_a_model_goes_meanwhile(
    store: Store, pair: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.copy("pair", "other")
    scandir = os.scandir

    def delete_and_scan(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "other":  # its name has been read, its contents have not
            monkeypatch.setattr(os, "scandir", scandir)
            store.delete("other")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", delete_and_scan)
    assert "pair:latest" in [model.name for model in store.list()]


def test_collect_goes_on_when_a_download_ends_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = digest_of(b"12")
    listed = blobs_module._files

    def list_and_end(folder: Path) -> list[Path]:
        paths = listed(folder)
        for path in paths if folder.name == "partial" else []:
            path.rename(store.blobs.path(digest))
        return paths

    with store.blobs.partial(digest) as file:
        file.write(b"12")
    (store.root / "blobs").mkdir()
    monkeypatch.setattr(blobs_module, "_files", list_and_end)
    assert store.collect() == 0
    assert store.blobs.has(digest)


def test_kill_at_every_file_operation_leaves_the_store_whole(
    tmp_path: Path, demo_target: Path, demo_drafter: Path
) -> None:
    command = [sys.executable, TESTS / "crash_store.py", tmp_path / "models", demo_target, demo_drafter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50  # opens, renames, locks: fewer would mean that they are no longer seen
