"""Measured costs on disk: the key holds all they depend on, and no file can hurt."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from dspark_cpp import _core, cost_cache
from dspark_cpp.config import EngineConfig
from dspark_cpp.cost_cache import CostCache, cache_folder

CURVES = cast(
    "_core.CostCurves",
    {"verify": [(1, 2.4), (2, 4.65)], "plain": [(1, 2.3)], "prefill": [(1, 2.0)], "draft": [(1, 0.9)],
     "inject": [(1, 0.2)], "verify_ms_per_row_cell": 0.0, "draft_ms_per_block_cell": 0.001,
     "rebuild_ms": 0.1},
)  # fmt: skip
MODEL = {
    "architecture": "qwen3",
    "description": "0.6B Q4_K",
    "size_bytes": 1,
    "n_params": 2,
    "n_layer": 3,
    "n_vocab": 4,
    "uses_kernels": False,
}
SETTINGS = {"n_ctx": 4096, "n_threads": 2, "kv_type": "f16"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path))
    return tmp_path


def model(**changes: Any) -> Any:
    return SimpleNamespace(**{**MODEL, **changes})


def cache(target: Any = None, drafter: Any = None, **settings: Any) -> CostCache:
    return CostCache(target or model(), drafter, {**SETTINGS, **settings})


def test_costs_come_back() -> None:
    assert cache().load() is None
    cache().store(CURVES)
    assert cache().load() == CURVES
    assert [path.name for path in cache().path.parent.iterdir()] == [cache().path.name]


def test_every_ingredient_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [cache().path, cache(drafter=model()).path]
    paths += [
        cache(model(**{name: "x" if isinstance(value, str) else True if value is False else 99})).path
        for name, value in MODEL.items()
    ]
    paths += [cache(**{name: "x"}).path for name in SETTINGS]
    build = _core.build_info()
    device = SimpleNamespace(name="CUDA0", description="H200", memory_total_bytes=1)
    fields = {
        "version": "0", "llama_cpp_commit": "0", "system_info": "AVX = 0", "devices": [*build.devices, device]
    }  # fmt: skip
    for name, value in fields.items():
        others = {field: getattr(build, field) for field in fields}
        with monkeypatch.context() as patch:
            patch.setattr(cost_cache._core, "build_info", lambda info={**others, name: value}: SimpleNamespace(**info))
            paths.append(cache().path)
    assert len(set(paths)) == len(paths)
    assert cache().path == paths[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1}', '{"costs": {}}', "\0\xff", "{" * 2000])
def test_damaged_files_are_no_costs(text: str) -> None:
    cache().path.parent.mkdir(parents=True)
    cache().path.write_text(text, encoding="latin-1")
    assert cache().load() is None


@pytest.mark.parametrize("verify", [None, [1], [["x", 1.0]], {"1": 2}])
def test_files_with_the_right_key_and_wrong_costs_are_no_costs(verify: Any) -> None:
    cache().store(CURVES)
    stored = json.loads(cache().path.read_text())
    stored["costs"]["verify"] = verify
    cache().path.write_text(json.dumps(stored))
    assert cache().load() is None


def test_files_made_for_something_else_are_no_costs() -> None:
    other = cache(n_threads=8)
    other.store(CURVES)
    other.path.rename(cache().path)
    assert cache().load() is None


def test_a_folder_that_cannot_be_written_is_survived(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "costs").write_text("a file where the folder should be")
    cache().store(CURVES)
    assert "cannot keep the measured costs" in caplog.text
    assert cache().load() is None


def test_folder_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DSPARK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/dspark-cpp")


def scaled(drafting: float, all_passes: float = 1.0) -> _core.CostCurves:
    names = {"verify": drafting, "draft": drafting, "plain": 1.0}
    changed = {name: [(n, ms * by * all_passes) for n, ms in CURVES[name]] for name, by in names.items()}  # type: ignore[literal-required]
    return cast("_core.CostCurves", {**CURVES, **changed})


class Measured:
    """An engine whose measurements are given."""

    settings = SETTINGS

    def __init__(self, *measurements: _core.CostCurves) -> None:
        self.measurements = list(measurements)
        self.costs: _core.CostCurves | None = None

    def measure_costs(self, *, budget_ms: float = 3000.0) -> _core.CostCurves:
        assert budget_ms > 0
        self.costs = self.measurements.pop(0)
        return self.costs

    def set_costs(self, curves: _core.CostCurves) -> None:
        self.costs = curves


def prepare(engine: Measured) -> None:
    cost_cache.prepare_costs(model(), model(), cast("_core.Engine", engine), EngineConfig())


def stored() -> _core.CostCurves | None:
    return cache(drafter=model()).load()


def test_stored_costs_are_used_where_a_look_confirms_them() -> None:
    cache(drafter=model()).store(CURVES)
    engine = Measured(scaled(1.3, all_passes=3.0))  # a slower machine today: the engine learns that by itself
    prepare(engine)
    assert engine.measurements == []
    assert engine.costs == stored() == CURVES


def test_costs_of_a_bad_moment_do_not_stay_in_the_cache() -> None:
    cache(drafter=model()).store(scaled(10.0))
    engine = Measured(CURVES, CURVES, scaled(1.1))
    prepare(engine)
    assert engine.measurements == []
    assert engine.costs == stored() == CURVES


def test_what_a_second_look_contradicts_is_measured_again() -> None:
    engine = Measured(scaled(10.0), CURVES, CURVES, CURVES)
    prepare(engine)
    assert engine.measurements == []
    assert engine.costs == stored() == CURVES


def test_nothing_is_measured_again_where_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "_MOST_SECONDS", 0.0)
    engine = Measured(scaled(10.0))
    prepare(engine)
    assert engine.costs == stored() == scaled(10.0)


def test_no_look_is_taken_where_passes_are_long() -> None:
    slow = scaled(1.0, all_passes=10.0)
    cache(drafter=model()).store(slow)
    engine = Measured()
    prepare(engine)
    assert engine.costs == slow


def store_often(n: int) -> None:
    for _ in range(n):
        cache().store(CURVES)


def test_two_processes_never_see_half_a_file() -> None:
    cache().store(CURVES)
    writers = [multiprocessing.get_context("fork").Process(target=store_often, args=(100,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert cache().load() == CURVES
    assert [writer.exitcode for writer in writers] == [0, 0]
