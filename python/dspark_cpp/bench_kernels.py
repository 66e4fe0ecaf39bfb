"""Speed of the CPU's matrix products: our kernels against ggml's plain path and its repacked weights, in one run.

Owns: what is measured and how it is printed. Must not know: models, engines. The matrices are streamed from memory as
in a model: all copies together are larger than any cache. Every timed round runs all three paths one after the other,
so that a disturbance of the machine meets all of them; medians over rounds are shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_cpp import _core

__all__ = ["KernelTiming", "run_kernel_bench"]

_TYPES = ("q8_0", "q4_0", "iq4_nl", "q4_K", "q5_K", "q6_K", "f16", "bf16")
_PATHS = ("kernels", "plain", "repacked")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTiming:
    """Median milliseconds of all matrices of one weight type at one number of columns.

    Parameters
    ----------
    type_name : str
        Weight type as GGUF tools print it.
    n_rows : int
        Columns of X: rows of a verification batch.
    milliseconds : mapping of str to float
        By path: "kernels", "plain" and, where ggml has it, "repacked".
    ratio : float
        ggml's path of the lowest median over our kernels, median over rounds: above 1, ours are faster.
    """

    type_name: str
    n_rows: int
    milliseconds: dict[str, float]
    ratio: float


def run_kernel_bench(
    types: Sequence[str] | None = None,
    n_rows: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16),
    shape: tuple[int, int, int] = (3072, 1024, 48),
    n_repeats: int = 7,
    n_threads: int = 0,
    isa: str = "",
    min_seconds: float = 0.5,
) -> list[KernelTiming]:
    """Time every type at every number of rows and print a table as it goes.

    Parameters
    ----------
    types : sequence of str, optional
        Weight types; None is all that our kernels multiply here.
    n_rows : sequence of int
        Rows of a batch, each at least 1.
    shape : (n_outputs, n_values, n_matrices)
        Of the streamed weights.
    n_repeats : int
        Timed rounds, at least 1.
    n_threads : int
        0: half as many as the process may use hyper-threads, as llama.cpp counts them.
    isa : str
        Instruction set of our kernels, for this call; empty: the one in use.
    min_seconds : float
        More rounds are timed until this has passed, for each type and number of rows: memory that others use too is
        faster or slower for tenths of a second.

    Returns
    -------
    list of KernelTiming
        In the order printed.
    """
    before = _core.kernel_instruction_set()
    if isa:
        _core.set_kernel_instruction_set(isa)
    try:
        timings = _time_types(types, n_rows, shape, (n_repeats, min_seconds), n_threads)
        _print_ratios(timings)
    finally:
        if isa:
            _core.set_kernel_instruction_set(before)
    return timings


def _time_types(
    types: Sequence[str] | None,
    n_rows: Sequence[int],
    shape: tuple[int, int, int],
    repeats: tuple[int, float],
    n_threads: int,
) -> list[KernelTiming]:
    timings = []
    for type_name in types or [name for name in _TYPES if name in _core.kernel_types()]:
        bench, rng = _make_bench(type_name, shape, n_threads)
        paths = [path for path in _PATHS if path != "repacked" or bench.can_repack]
        print(f"{type_name}: {', '.join(paths)} in ms ({_core.kernel_instruction_set()}), x ggml's best")
        for n in n_rows:
            timing = _time(bench, type_name, paths, rng.standard_normal((n, shape[1]), np.float32), *repeats)
            print(f"  {n:>3}  " + "  ".join(f"{timing.milliseconds[path]:8.2f}" for path in paths), end="")
            print(f"  {timing.ratio:6.2f}x", flush=True)
            timings.append(timing)
    return timings


def _print_ratios(timings: Sequence[KernelTiming]) -> None:
    ratios = {(one.type_name, one.n_rows): one.ratio for one in timings}
    names = list(dict.fromkeys(one.type_name for one in timings))
    print(f"ggml's best path over our kernels ({_core.kernel_instruction_set()}), rows down, types across")
    print("      " + "".join(f"{name:>8}" for name in names))
    for n in dict.fromkeys(one.n_rows for one in timings):
        print(f"  {n:>3} " + "".join(f"{ratios[name, n]:7.2f}x" for name in names))


def _make_bench(
    type_name: str, shape: tuple[int, int, int], n_threads: int
) -> tuple[_core.MatrixBench, np.random.Generator]:
    n_outputs, n_values, n_matrices = shape
    rng = np.random.default_rng(1)
    rows = _core.quantize_rows(type_name, rng.standard_normal((64, n_values), np.float32))
    rows = np.tile(rows, (-(-n_outputs // 64), 1))[:n_outputs]  # speed does not depend on the values
    threads = n_threads or _core.n_math_threads()
    return _core.MatrixBench(type_name, rows, n_values=n_values, n_matrices=n_matrices, n_threads=threads), rng


def _time(
    bench: _core.MatrixBench, type_name: str, paths: Sequence[str], x: np.ndarray, n_repeats: int, min_seconds: float
) -> KernelTiming:
    for path in paths:
        bench.multiply(path, x)
    rounds: list[dict[str, float]] = []
    end = time.perf_counter() + min_seconds
    while len(rounds) < n_repeats or time.perf_counter() < end:
        first = len(rounds) % len(paths)  # none is always the one behind a slow path
        rounds.append({path: 1e3 * bench.multiply(path, x)[1] for path in (*paths[first:], *paths[:first])})
    medians = {path: statistics.median(one[path] for one in rounds) for path in paths}
    best = min((path for path in paths if path != "kernels"), key=lambda path: medians[path])
    ratio = statistics.median(one[best] / one["kernels"] for one in rounds)
    return KernelTiming(type_name=type_name, n_rows=len(x), milliseconds=medians, ratio=ratio)
