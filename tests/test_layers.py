"""A file imports only what stands below it in the layout."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "dspark_cpp"
CSRC = ROOT / "csrc"

# From the top down; a module may import what stands to the right of it, and nothing else of the package.
LAYOUT = [
    "cli",
    "store_cli",
    "store_run",
    "store_show",
    "store_progress",
    "server_client",
    "server",
    "calibrate_cli",
    "calibration_report",
    "calibrate_run",
    "calibration_prompts",
    "calibration_fit",
    "calibration_scores",
    "demo_run",
    "info",
    "bench",
    "llm",
    "core_objects",
    "cost_cache",
    "engine_loop",
    "compute_thread",
    "chat",
    "results",
    "config",
    "option_checks",
    "bench_kernels",
    "store",
    "calibration_files",
    "calibration",
    "convert",
    "errors",
    "_core",
]

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

LLAMA_HEADER = re.compile(r'#include [<"](llama[.-][^">]*|gguf\.h|chat\.h|common\.h)[">]')
GGML_HEADER = re.compile(r'#include [<"]ggml[^">]*[">]')


def layer_of(path: Path) -> str:
    """First name below the package: a module, or the folder it lies in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    """Layers of the package that a file imports, at its top or inside a function."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} must import by full name, got a relative import in line {node.lineno}")
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name}" for name in names]
        layers |= {name.split(".")[1] for name in names if name.startswith("dspark_cpp.")}
    return layers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_imports_only_what_stands_below(path):
    layer = layer_of(path)
    assert layer in LAYOUT, f"{layer} has no place in the layout yet: give it one"
    allowed = {layer, *LAYOUT[LAYOUT.index(layer) + 1 :]}
    assert imported_layers(path) <= allowed


def test_package_imports_nothing_until_asked():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in at_import} <= {"__future__", "typing"}


def pure_sources() -> list[Path]:
    """Sources of dspark_math, the library that knows neither llama.cpp nor Python, with their headers."""
    listed = re.search(r"add_library\(dspark_math STATIC([^)]*)\)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert listed
    sources = [ROOT / name for name in listed[1].split()]
    return [path for source in sources for path in (source, source.with_suffix(".h")) if path.exists()]


def test_mathematics_knows_neither_llama_cpp_nor_python():
    for path in pure_sources():
        text = path.read_text("utf-8")
        assert not LLAMA_HEADER.search(text), path
        assert not GGML_HEADER.search(text), path
        assert "Python.h" not in text, path
        assert "pybind11" not in text, path


def test_only_bindings_include_pybind11():
    users = {path.parent.name for path in CSRC.rglob("*.[ch]*") if "#include <pybind11" in path.read_text("utf-8")}
    assert users == {"bindings"}


def test_only_files_named_for_it_include_llama_cpp():
    users = [path.name for path in CSRC.rglob("*.[ch]*") if LLAMA_HEADER.search(path.read_text("utf-8"))]
    assert users
    assert all(name.startswith("llama_") for name in users), users
