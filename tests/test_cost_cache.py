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
     "inject": [(1, 0.2)], "verify_ms_per_row_cell": 0.0, "draft_ms_per_block_cell": 0.001},
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
    assert cache().load() == []
    cache().store([CURVES])
    assert cache().load() == [CURVES]
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


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"key": 1}', '{"measured": {}}', "\0\xff", "{" * 2000])
def test_damaged_files_are_no_costs(text: str) -> None:
    cache().path.parent.mkdir(parents=True)
    cache().path.write_text(text, encoding="latin-1")
    assert cache().load() == []


@pytest.mark.parametrize("verify", [None, [1], [["x", 1.0]], {"1": 2}])
def test_files_with_the_right_key_and_wrong_costs_are_no_costs(verify: Any) -> None:
    cache().store([CURVES])
    stored = json.loads(cache().path.read_text())
    stored["measured"][0]["verify"] = verify
    cache().path.write_text(json.dumps(stored))
    assert cache().load() == []


def test_files_made_for_something_else_are_no_costs() -> None:
    other = cache(n_threads=8)
    other.store([CURVES])
    other.path.rename(cache().path)
    assert cache().load() == []


def test_a_folder_that_cannot_be_written_is_survived(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "costs").write_text("a file where the folder should be")
    cache().store(CURVES)
    assert "cannot keep the measured costs" in caplog.text
    assert cache().load() == []


def test_folder_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DSPARK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder().is_absolute()
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/dspark-cpp")


def scaled(drafting: float, all_passes: float = 1.0, sizes: tuple[int, ...] = ()) -> _core.CostCurves:
    """The costs with some sizes of drafted passes, or all of them, at a multiple."""
    names = {"verify": drafting, "draft": drafting, "plain": 1.0}

    def factor(size: int, by: float) -> float:
        return all_passes * (by if size in sizes or not sizes else 1.0)

    changed = {name: [(n, ms * factor(n, by)) for n, ms in CURVES[name]] for name, by in names.items()}  # type: ignore[literal-required]
    return cast("_core.CostCurves", {**CURVES, **changed})


LOOK = cast(
    "_core.CostCurves",
    {**CURVES, "plain": [(1, 2.3)], "verify": [(2, 4.7)], "draft": [(1, 0.9)], "prefill": [], "inject": []},
)


class Measured:
    """An engine whose measurements and looks are given."""

    settings = SETTINGS

    def __init__(self, *measurements: _core.CostCurves, looks: tuple[_core.CostCurves, ...] = (LOOK,)) -> None:
        self.measurements, self.looks = list(measurements), list(looks)
        self.costs: _core.CostCurves | None = None

    def measure_costs(self, *, budget_ms: float = 3000.0, look: bool = False) -> _core.CostCurves:
        assert budget_ms <= 100 if look else budget_ms == 3000
        if look:
            return self.looks.pop(0)
        self.costs = self.measurements.pop(0)
        return self.costs

    def set_costs(self, curves: _core.CostCurves) -> None:
        self.costs = curves


def prepare(engine: Measured) -> None:
    """Every measurement and every look was asked for."""
    cost_cache.prepare_costs(model(), model(), cast("_core.Engine", engine), EngineConfig())
    assert engine.measurements == engine.looks == []


def stored() -> list[_core.CostCurves]:
    return cache(drafter=model()).load()


def test_stored_costs_are_used_where_a_look_finds_nothing_cheaper() -> None:
    cache(drafter=model()).store([CURVES])
    slow = cast("_core.CostCurves", {**LOOK, "plain": [(1, 6.9)], "verify": [(2, 47.0)]})
    engine = Measured(looks=(slow,))  # the engine learns by itself what is dearer today
    prepare(engine)
    assert engine.costs == CURVES
    assert stored() == [CURVES]


@pytest.mark.parametrize("bad", [scaled(10.0), scaled(1.0, 10.0), scaled(10.0, sizes=(2,)), scaled(1.4)])
def test_costs_of_a_bad_moment_do_not_stay_in_the_cache(bad: _core.CostCurves) -> None:
    cache(drafter=model()).store([bad])
    engine = Measured(CURVES, looks=(LOOK, LOOK))
    prepare(engine)
    assert engine.costs == CURVES
    assert stored() == [CURVES, bad]
    prepare(again := Measured())
    assert again.costs == CURVES


def test_what_a_second_look_contradicts_is_measured_again() -> None:
    engine = Measured(scaled(10.0), CURVES, looks=(LOOK, LOOK))
    prepare(engine)
    assert engine.costs == CURVES
    assert stored() == [CURVES, scaled(10.0)]


def test_a_look_is_all_that_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr(cost_cache, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    engine = Measured(scaled(10.0))
    prepare(engine)
    assert engine.costs is not None
    assert dict(engine.costs["verify"]) == {1: 4.7, 2: 4.7}  # one row takes no longer than two
    assert engine.costs["draft"] == LOOK["draft"]


def test_nothing_is_confirmed_where_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_cache, "_MOST_SECONDS", -1.0)
    engine = Measured(scaled(10.0), looks=())
    prepare(engine)
    assert engine.costs == scaled(10.0)


def test_a_dearer_measurement_has_to_be_seen_by_several_processes() -> None:
    dear = scaled(2.0)
    for n_seen in range(1, 4):
        cache().store([CURVES]) if n_seen == 1 else None
        cache().add(dear)
        assert (cost_cache.cheapest(cache().load()) == dear) == (n_seen == 3)


def test_a_cheaper_measurement_counts_at_once() -> None:
    cache().store([CURVES])
    cache().add(scaled(0.5, sizes=(2,)))
    costs = cost_cache.cheapest(cache().load())
    assert costs == scaled(0.5, sizes=(2,))


def test_measuring_on_request_forgets_what_was_stored() -> None:
    cache(drafter=model()).store([scaled(0.1)])
    engine = Measured(CURVES)
    cost_cache.prepare_costs(model(), model(), cast("_core.Engine", engine), EngineConfig(costs="measure"))
    assert engine.costs == CURVES
    assert stored() == [CURVES]


def store_often(n: int) -> None:
    for _ in range(n):
        cache().store([CURVES])


def test_two_processes_never_see_half_a_file() -> None:
    cache().store([CURVES])
    writers = [multiprocessing.get_context("fork").Process(target=store_often, args=(100,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert cache().load() == [CURVES]
    assert [writer.exitcode for writer in writers] == [0, 0]
