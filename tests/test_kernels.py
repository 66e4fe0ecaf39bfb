"""Our matrix products against float64 products of the dequantized weights, beside ggml's on the same inputs."""

from __future__ import annotations

import numpy as np
import pytest
from dspark_cpp import _core
from dspark_cpp.bench_kernels import run_kernel_bench
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

TYPES = _core.kernel_types()
QUANTIZED = [name for name in TYPES if name not in ("f16", "bf16")]
ROWS = range(1, 17)
# Offsets of the f16 scales in a block: random bytes there would be infinities and NaN.
SCALE_OFFSETS = {"q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,)}

pytestmark = pytest.mark.skipif(not TYPES, reason="no kernels for this processor: ggml's run")


@pytest.fixture(params=_core.kernel_instruction_sets(), autouse=True)
def isa(request):
    """Every test runs once with each instruction set that this processor has."""
    before = _core.kernel_instruction_set()
    _core.set_kernel_instruction_set(request.param)
    yield request.param
    _core.set_kernel_instruction_set(before)


def block_of(type_name: str) -> tuple[int, int]:
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]


def crafted_rows(rng, type_name: str, n_outputs: int, n_values: int, scale: float | None, fill: int | None = None):
    """Blocks of random (or one) bytes with f16 scales of the given size, signs random; None: any finite half."""
    if type_name in ("f16", "bf16"):
        return crafted_floats(rng, type_name, n_outputs, n_values, scale, fill)
    n_weights, n_bytes = block_of(type_name)
    blocks = rng.integers(0, 256, (n_outputs, n_values // n_weights, n_bytes), np.uint8)
    if fill is not None:
        blocks[...] = fill
    for offset in SCALE_OFFSETS.get(type_name, (0,)):
        shape = blocks.shape[:2]
        if scale is None:
            halves = rng.uniform(-1, 1, shape).astype(np.float16)
        else:
            halves = (scale * rng.choice([-1.0, 1.0], shape)).astype(np.float16)
        blocks[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    return blocks.reshape(n_outputs, -1)


def crafted_floats(rng, type_name: str, n_outputs: int, n_values: int, scale: float | None, fill: int | None):
    """Numbers of the given size, every finite f16 or bf16 below 2 for None; zeros for a fill of 0."""
    values = rng.uniform(-1, 1, (n_outputs, n_values)).astype(np.float32)
    if scale is not None:
        values = np.sign(values) * np.float32(scale)
    if fill == 0:
        values[...] = 0
    return _core.quantize_rows(type_name, values)


def exact_product(type_name: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    weights = dequantize(rows, GGMLQuantizationType[type_name.upper()])
    return x.astype(np.float64) @ weights.astype(np.float64).T


def multiply(type_name: str, rows: np.ndarray, x: np.ndarray, *, path: str = "kernels", n_threads: int = 1):
    bench = _core.MatrixBench(type_name, rows, n_values=x.shape[1], n_threads=n_threads)
    return bench.multiply(path, x)[0]


def assert_no_worse_than_ggml(type_name: str, rows: np.ndarray, x: np.ndarray) -> None:
    exact = exact_product(type_name, rows, x)
    ours = np.abs(multiply(type_name, rows, x) - exact)
    theirs = np.abs(multiply(type_name, rows, x, path="plain") - exact)
    # Both round the columns alike, which is nearly all of the error; what is left is the order of float additions:
    # a few units in the last place of the sum of magnitudes.
    magnitude = np.abs(x).sum(1, dtype=np.float64)[:, None]
    largest = np.abs(dequantize(rows, GGMLQuantizationType[type_name.upper()])).max(1).astype(np.float64)[None]
    assert np.all(ours <= theirs + 1e-6 * magnitude * largest)


@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("type_name", TYPES)
def test_error_is_no_larger_than_that_of_ggml(type_name, n_rows):
    rng = np.random.default_rng(n_rows)
    rows = _core.quantize_rows(type_name, rng.standard_normal((67, 768), np.float32))  # 67: not whole strips
    assert_no_worse_than_ggml(type_name, rows, rng.standard_normal((n_rows, 768), np.float32))


@pytest.mark.parametrize("case", ["random", "denormal", "largest", "zeros", "ones", "outlier"])
@pytest.mark.parametrize("type_name", TYPES)
def test_odd_blocks_and_columns(type_name, case):
    rng = np.random.default_rng(7)
    scale = {"random": None, "denormal": 6e-8, "largest": 60.0, "zeros": 1.0, "ones": 1.0, "outlier": 0.1}[case]
    fill = {"zeros": 0, "ones": 255}.get(case)
    rows = crafted_rows(rng, type_name, 40, 512, scale, fill)
    x = rng.standard_normal((9, 512), np.float32)
    if case in ("largest", "ones", "zeros"):
        x = np.where(x < 0, -1.0, 1.0).astype(np.float32)  # every product at the end of its range
        x[0] = 1.0
        x[1] = -1.0
    if case == "outlier":
        x[:, 3] = 1e4
        x[4] = 0.0
        x[5] = 1e-30
    assert_no_worse_than_ggml(type_name, rows, x)


@pytest.mark.parametrize("type_name", TYPES)
def test_column_is_the_same_to_the_bit_alone_and_in_any_batch(type_name):
    rng = np.random.default_rng(3)
    rows = _core.quantize_rows(type_name, rng.standard_normal((53, 1024), np.float32))
    x = rng.standard_normal((150, 1024), np.float32)  # 150: more than one pass of columns
    alone = np.concatenate([multiply(type_name, rows, x[i : i + 1]) for i in range(len(x))])
    for n_rows in (*ROWS, 23, *((128, 129, 150) if type_name != "bf16" else (32,))):  # wider bf16 is ggml's
        assert np.array_equal(multiply(type_name, rows, x[:n_rows]), alone[:n_rows]), n_rows


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_every_instruction_set_gives_the_same_bits(type_name):
    rng = np.random.default_rng(4)
    rows = crafted_rows(rng, type_name, 37, 1024, None)  # any weights: integer sums are exact in all of them
    x = rng.standard_normal((11, 1024), np.float32)
    ours = multiply(type_name, rows, x)
    for name in _core.kernel_instruction_sets():
        _core.set_kernel_instruction_set(name)
        assert np.array_equal(multiply(type_name, rows, x), ours), name


@pytest.mark.parametrize("type_name", TYPES)
def test_a_value_that_is_not_a_number_reaches_every_output(type_name):
    rng = np.random.default_rng(6)
    rows = _core.quantize_rows(type_name, rng.standard_normal((19, 512), np.float32))
    x = rng.standard_normal((3, 512), np.float32)
    x[1, 300] = np.nan
    y = multiply(type_name, rows, x)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_result_does_not_depend_on_the_number_of_threads(type_name):
    rng = np.random.default_rng(5)
    rows = _core.quantize_rows(type_name, rng.standard_normal((91, 512), np.float32))
    x = rng.standard_normal((5, 512), np.float32)
    expected = multiply(type_name, rows, x)
    for n_threads in range(2, 9):
        assert np.array_equal(multiply(type_name, rows, x, n_threads=n_threads), expected), n_threads


@pytest.mark.parametrize("type_name", TYPES)
def test_any_shape_and_any_block(type_name):
    rng = np.random.default_rng(11)
    n_weights, _ = block_of(type_name)
    for _ in range(60):
        n_values = n_weights * int(rng.integers(1, 2048 // n_weights // 2 + 2))
        rows = crafted_rows(rng, type_name, int(rng.integers(1, 40)), n_values, None)
        x = rng.standard_normal((int(rng.integers(1, 20)), n_values)).astype(np.float32)
        x *= np.exp(rng.uniform(-6, 6, (len(x), 1))).astype(np.float32)
        assert_no_worse_than_ggml(type_name, rows, x)


def test_more_threads_than_strips():
    rng = np.random.default_rng(13)
    rows = _core.quantize_rows("q8_0", rng.standard_normal((3, 32), np.float32))
    x = rng.standard_normal((2, 32), np.float32)
    assert np.array_equal(multiply("q8_0", rows, x, n_threads=8), multiply("q8_0", rows, x))


def test_bench_times_every_path(capsys, isa):
    best = _core.kernel_instruction_sets()[0]
    _core.set_kernel_instruction_set(best)
    timings = run_kernel_bench(
        ["q4_0", "q8_0"], n_rows=(1, 3), shape=(64, 256, 2), n_repeats=1, n_threads=1, isa=isa, min_seconds=0.01
    )
    assert _core.kernel_instruction_set() == best
    assert [(one.type_name, one.n_rows) for one in timings] == [("q4_0", 1), ("q4_0", 3), ("q8_0", 1), ("q8_0", 3)]
    assert all(min(one.milliseconds.values()) > 0 for one in timings)
    out = capsys.readouterr().out
    assert "q8_0: kernels, plain" in out
    assert f"({isa})" in out
    last_row = [f"{one.ratio:.2f}x" for one in timings if one.n_rows == 3]
    assert out.splitlines()[-1].split() == ["3", *last_row]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows, x: _core.MatrixBench("q9_9", rows, n_values=32), "type must be the name of a ggml type"),
        (lambda rows, x: _core.MatrixBench("q8_0", rows, n_values=33), "n_values must be a multiple of the block"),
        (lambda rows, x: _core.MatrixBench("q8_0", rows, n_values=64), "rows must have 272 bytes, got 136"),
        (lambda rows, x: _core.MatrixBench("q8_0", rows, n_values=32, n_threads=0), "n_threads must be in 1 .. 512"),
        (lambda rows, x: _core.MatrixBench("q8_0", rows, n_values=32).multiply("own", x), "path must be kernels"),
        (lambda rows, x: _core.set_kernel_instruction_set("mmx"), "instruction set must be one that .*, got mmx"),
        (
            lambda rows, x: _core.MatrixBench("q8_0", rows, n_values=32).multiply("plain", x[:, :31]),
            "x must hold columns of 32 values",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    rng = np.random.default_rng(17)
    rows = _core.quantize_rows("q8_0", rng.standard_normal((4, 32), np.float32))
    with pytest.raises(ValueError, match=message):
        call(rows, rng.standard_normal((1, 32), np.float32))
