"""store: pulling from a hub, over real HTTP, with everything that goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import REVISION, Hub, serve_hub
from waiting import wait_until

pytest.importorskip("huggingface_hub")

from dspark_cpp.errors import ModelLoadError, PullError
from dspark_cpp.store import ModelName, Store, hub_endpoint
from dspark_cpp.store.hub import HubFile, HubSource, choose_drafter, choose_target


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "models")


@pytest.fixture
def hub(tmp_path: Path, demo_target: Path, demo_drafter: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the bundled pair in `me/tiny`."""
    repo = tmp_path / "hub" / "me" / "tiny"
    repo.mkdir(parents=True)
    shutil.copy(demo_target, repo / "tiny-Q8_0.gguf")
    shutil.copy(demo_drafter, repo / "tiny-dspark-Q8_0.gguf")
    (repo / "README.md").write_text("hello")
    with serve_hub(tmp_path / "hub") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr("dspark_cpp.store.hub._RETRY_SECONDS", 0.01)
        yield hub


def test_pull_fetches_target_and_the_drafter_beside_it(store: Store, hub: Hub, demo_drafter: Path) -> None:
    records = list(store.pull("hf.co/me/tiny:Q8_0"))
    statuses = list(dict.fromkeys(record["status"].split()[0] for record in records))
    assert statuses == ["pulling", "verifying", "writing", "success"]
    assert records[0] == {"status": "pulling manifest"}
    assert records[-1] == {"status": "success"}
    bars = [record for record in records if "digest" in record]
    assert {(record["digest"], record["total"]) for record in bars} == {
        (file.digest, file.size) for file in store.get("me/tiny:q8_0").files
    }
    assert all(0 <= record["completed"] <= record["total"] for record in bars)
    found = store.get("hf.co/me/tiny:Q8_0")
    store.check(found)
    assert found.draft_path is not None
    assert found.draft_path.read_bytes() == demo_drafter.read_bytes()
    assert found.draft is not None
    assert found.draft.origin == f"me/tiny/tiny-dspark-Q8_0.gguf@{REVISION}"


def test_pull_again_fetches_nothing(store: Store, hub: Hub) -> None:
    list(store.pull("me/tiny"))
    n_bytes = hub.n_bytes_sent
    assert list(store.pull("me/tiny"))[-1] == {"status": "success"}
    assert hub.n_bytes_sent == n_bytes


def test_pull_takes_the_drafter_of_another_repository(store: Store, hub: Hub, tmp_path: Path) -> None:
    other = tmp_path / "hub" / "you" / "heads"
    other.mkdir(parents=True)
    (tmp_path / "hub" / "me" / "tiny" / "tiny-dspark-Q8_0.gguf").rename(other / "model.gguf")
    list(store.pull("me/tiny"))
    assert store.get("me/tiny").draft is None
    list(store.pull("me/tiny", draft="you/heads:model.gguf"))
    assert store.get("me/tiny").draft is not None


def test_pull_leaves_a_drafter_out_that_does_not_fit(store: Store, hub: Hub, tmp_path: Path, demo_target: Path) -> None:
    shutil.copy(demo_target, tmp_path / "hub" / "me" / "tiny" / "tiny-dspark-Q8_0.gguf")
    statuses = [record["status"] for record in store.pull("me/tiny")]
    assert any(status.startswith("leaving out tiny-dspark-Q8_0.gguf: ") for status in statuses)
    assert store.get("me/tiny").draft is None
    with pytest.raises(ModelLoadError, match="must be a drafter"):
        list(store.pull("me/tiny", draft="me/tiny:tiny-dspark-Q8_0.gguf"))


def test_pull_goes_on_after_lost_connections(store: Store, hub: Hub) -> None:
    hub.faults.drop_after_bytes = 2_500_000
    list(store.pull("me/tiny"))
    store.check(store.get("me/tiny"))
    assert len([start for start in hub.ranges if start != "bytes=0-"]) >= 2
    assert hub.n_bytes_sent < 2 * 11_065_056


def test_pull_from_a_hub_without_ranges_starts_over(store: Store, hub: Hub) -> None:
    hub.faults.drop_after_bytes = 2_500_000
    hub.faults.ignores_range = True
    with pytest.raises(PullError, match=r"cannot download tiny-Q8_0.gguf of me/tiny"):
        list(store.pull("me/tiny"))
    hub.faults.drop_after_bytes = None
    list(store.pull("me/tiny"))
    store.check(store.get("me/tiny"))


def test_pull_that_is_stopped_goes_on_later(store: Store, hub: Hub) -> None:
    hub.faults.seconds_per_chunk = 0.01
    records = store.pull("me/tiny")
    for record in records:
        if record.get("completed", 0) > 2_000_000:
            break
    records.close()
    assert store.list() == ()
    hub.faults.seconds_per_chunk = 0
    hub.ranges.clear()
    list(store.pull("me/tiny"))
    assert int(str(hub.ranges[0]).removeprefix("bytes=").removesuffix("-")) >= 2_000_000
    store.check(store.get("me/tiny"))


def test_pull_killed_midway_leaves_the_store_whole_and_goes_on(store: Store, hub: Hub, demo_target: Path) -> None:
    hub.faults.seconds_per_chunk = 0.02
    code = f"from dspark_cpp.store import Store\nlist(Store({str(store.root)!r}).pull('me/tiny'))"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "HF_ENDPOINT": hub.url})
    partials = store.root / "partial"
    partial = partials / digest_of(demo_target.read_bytes()).replace(":", "-")
    wait_until(lambda: hub.n_bytes_sent > 3 << 20)
    hub.faults.seconds_per_chunk = 1.0  # the rest would take minutes
    wait_until(lambda: partial.stat().st_size > 1 << 20 or process.poll() is not None)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert store.list() == ()
    assert store.collect(min_age_s=-1.0) == 0  # what was fetched is kept for the next pull
    hub.faults.seconds_per_chunk = 0
    hub.ranges.clear()
    list(store.pull("me/tiny"))
    assert hub.ranges[0] != "bytes=0-"
    store.check(store.get("me/tiny"))
    assert list(partials.iterdir()) == []


def test_pull_refuses_bytes_that_the_hub_did_not_promise(store: Store, hub: Hub) -> None:
    hub.faults.wrong_bytes = True
    with pytest.raises(PullError, match=r"tiny-Q8_0.gguf of me/tiny must have the digest sha256:"):
        list(store.pull("me/tiny"))
    assert store.list() == ()
    assert not (store.root / "blobs").exists()
    hub.faults.wrong_bytes = False
    list(store.pull("me/tiny"))
    store.check(store.get("me/tiny"))


def test_pull_replaces_a_spoiled_beginning(store: Store, hub: Hub, demo_target: Path) -> None:
    partial = store.root / "partial" / digest_of(demo_target.read_bytes()).replace(":", "-")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"\0" * 1_000_000)  # what a power cut may leave
    list(store.pull("me/tiny"))
    store.check(store.get("me/tiny"))


def test_two_pulls_at_once_fetch_each_file_once(store: Store, hub: Hub) -> None:
    hub.faults.seconds_per_chunk = 0.002
    threads = [threading.Thread(target=lambda: list(Store(store.root).pull("me/tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hub.n_bytes_sent == sum(path.stat().st_size for path in (hub.folder / "me" / "tiny").glob("*.gguf"))
    store.check(store.get("me/tiny"))


def test_pull_tells_what_is_wrong(store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PullError, match="has no repository no/body"):
        list(store.pull("no/body"))
    with pytest.raises(PullError, match=r"no file of the repository fits 'q3'; it has tiny-Q8_0.gguf"):
        list(store.pull("me/tiny:q3"))
    with pytest.raises(ValueError, match="must be a repository of the hub"):
        list(store.pull("llama3"))
    hub.faults.status = 403
    with pytest.raises(PullError, match="answers with status 403"):
        list(store.pull("me/tiny"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PullError, match=r"cannot list me/tiny at http://127.0.0.1:9"):
        list(store.pull("me/tiny"))
    assert store.list() == ()


def test_only_the_configured_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example/")
    assert hub_endpoint() == "https://hub.example"
    assert ModelName.parse("hub.example/a/b").repo == "a/b"
    for text in ("evil.example/a/b", "hub.example.evil/a/b", "localhost/a/b", "a@hub.example/a/b"):
        with pytest.raises(ValueError, match=r"host of a model must be the hub|must read"):
            HubSource.parse(text)


REPOSITORY = [
    "Model-Q4_K_M.gguf",
    "Model-Q4_K_S.gguf",
    "Model-UD-Q4_K_M_L.gguf",
    "Model-F16-00001-of-00002.gguf",
    "Model-F16-00002-of-00002.gguf",
    "mmproj-Model-F16.gguf",
    "Model-DSpark-Q8_0.gguf",
    "drafts/other.gguf",
]


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        (None, ["Model-Q4_K_M.gguf"]),
        ("q4_k_s", ["Model-Q4_K_S.gguf"]),
        ("Q4_K_M", ["Model-Q4_K_M.gguf"]),
        ("f16", ["Model-F16-00001-of-00002.gguf", "Model-F16-00002-of-00002.gguf"]),
        ("other.gguf", ["drafts/other.gguf"]),
        ("drafts/other.gguf", ["drafts/other.gguf"]),
        ("Model-DSpark-Q8_0.gguf", ["Model-DSpark-Q8_0.gguf"]),
    ],
)
def test_tag_chooses_the_file(selector: str | None, chosen: list[str]) -> None:
    files = [HubFile("a/b", "main", name, 1, digest_of(name.encode())) for name in REPOSITORY]
    assert [file.name for file in choose_target(files, selector)] == chosen
    assert choose_drafter(files, None).name == "Model-DSpark-Q8_0.gguf"
