"""`dspark info TARGET --draft D`: figures from headers, against the files' own tensors and a loaded engine."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from dspark_cpp import _core
from dspark_cpp.cli import app
from dspark_cpp.config import EngineConfig
from dspark_cpp.errors import ModelLoadError
from dspark_cpp.info import describe_memory
from typer.testing import CliRunner


def test_sizes_are_those_of_the_tensors(demo_target: Path, demo_drafter: Path) -> None:
    rows = describe_memory(demo_target, demo_drafter, EngineConfig(n_ctx=512, n_parallel=2))
    for name, path in (("target weights", demo_target), ("drafter weights", demo_drafter)):
        n_bytes = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
        assert rows[name] == f"{n_bytes / 2**20:.1f} MiB"
    assert rows["draft head"] == "borrowed from the target (2048 of 2048 tokens)"
    # 2 layers, 2 heads of 64, K and V in f16; 512 + 7 + 256 cells for each of two requests.
    assert rows["draft KV"].startswith(f"{2 * 2 * 2 * 64 * 2 * 2 * (512 + 7 + 256) / 2**20:.1f} MiB (1.0 KiB a token")


def test_caches_are_part_of_what_an_engine_holds(demo_target: Path, demo_drafter: Path) -> None:
    rows = describe_memory(demo_target, demo_drafter, EngineConfig(n_ctx=1024))
    target = _core.Model.load_target(str(demo_target))
    drafter = _core.Model.load_drafter(str(demo_drafter), target)
    held = _core.Engine(target, drafter, n_ctx=1024, n_threads=1).memory_bytes
    for name, key in (("target KV", "target_context"), ("draft KV", "draft_context")):
        assert 0 < float(rows[name].split()[0]) * 2**20 < held[key]


def test_command_line(demo_target: Path, demo_drafter: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(demo_target), "--draft", str(demo_drafter)])
    assert result.exit_code == 0, result.output
    assert "draft KV" in result.output
    assert "llama.cpp" in CliRunner().invoke(app, ["info"]).output
    assert CliRunner().invoke(app, ["info", "--draft", str(demo_drafter)]).exit_code == 2


def test_target_in_the_place_of_a_drafter_is_refused(demo_target: Path) -> None:
    with pytest.raises(ModelLoadError, match="its architecture must be dflash"):
        describe_memory(demo_target, demo_target)
