"""A model that is deleted between being found and being read is not found: no error of the server, nor of its files."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from dspark_cpp.errors import BlobError, ModelLoadError
from dspark_cpp.server.engine_pool import EnginePool
from dspark_cpp.server.fields import Fields
from dspark_cpp.server.ollama_routes import _show
from dspark_cpp.server.problems import Problem
from dspark_cpp.server.settings import ServerConfig


class Catalog:
    """Has one model, whose file is missing, until it was asked for `n_times`."""

    def __init__(self, folder: Path, n_times: float) -> None:
        self._entry = SimpleNamespace(name="m:latest", digest="m", size=1, parameters={}, target=folder / "gone.gguf")
        self._n_left = n_times

    def get(self, name: str) -> SimpleNamespace:
        self._n_left -= 1
        if self._n_left < 0:
            raise Problem(404, f"model '{name}' not found")
        return self._entry

    def check(self, entry: SimpleNamespace) -> None:
        raise BlobError(f"cannot read {entry.target}")


def load(catalog: Catalog) -> None:
    async def work() -> None:
        async with EnginePool(catalog, ServerConfig()).use("m"):
            pass

    asyncio.run(work())


def show(catalog: Catalog) -> None:
    async def read(_: object) -> Fields:
        return Fields({"model": "m"})

    asyncio.run(_show(SimpleNamespace(read=read, catalog=catalog), None))


@pytest.mark.parametrize("act", [load, show])
def test_deleted_meanwhile_is_not_found(tmp_path: Path, act) -> None:
    with pytest.raises(Problem, match="not found") as caught:
        act(Catalog(tmp_path, n_times=1))
    assert caught.value.status == 404


@pytest.mark.parametrize(("act", "error"), [(load, BlobError), (show, ModelLoadError)])
def test_damaged_is_told(tmp_path: Path, act, error: type[Exception]) -> None:
    with pytest.raises(error):
        act(Catalog(tmp_path, n_times=1e9))
