"""Random weights straight in their stored form: no float is quantized, so gigabytes take seconds.

Owns: the block layouts of the types it can fill. The quants are uniform and the scales constant, so that a tensor has
the mean 0 and the standard deviation asked for; nothing else about the values matters to a clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

__all__ = ["RANDOM_TYPES", "random_rows"]

_Blocks = NDArray[np.uint8]  # (n_blocks, bytes of a block)

# Standard deviation of an integer that takes each of n neighbouring values equally often: sqrt((n^2 - 1) / 12).
_STD_4_BIT = math.sqrt((16**2 - 1) / 12)
_STD_6_BIT = math.sqrt((64**2 - 1) / 12)
_STD_8_BIT = math.sqrt((256**2 - 1) / 12)
# Of a number whose sign and mantissa are random and whose exponent is 0: E[x^2] over [1, 2) is 7/3.
_STD_MANTISSA = math.sqrt(7 / 3)


def _set_half(blocks: _Blocks, at: int, value: float) -> None:
    blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)


def _fill_q8_0(blocks: _Blocks, std: float) -> None:
    _set_half(blocks, 0, std / _STD_8_BIT)


def _fill_q4_0(blocks: _Blocks, std: float) -> None:
    _set_half(blocks, 0, std / _STD_4_BIT)


def _fill_q4_k(blocks: _Blocks, std: float) -> None:
    """All 8 scales and minima of a block are 32: its 12 bytes hold their 6 bits split in 4 and 2."""
    scale = std / _STD_4_BIT / 32
    _set_half(blocks, 0, scale)
    _set_half(blocks, 2, scale * 7.5)  # the mean of the quants
    blocks[:, 4:12] = 0b10_100000
    blocks[:, 12:16] = 0


def _fill_q6_k(blocks: _Blocks, std: float) -> None:
    blocks[:, 192:208] = 64
    _set_half(blocks, 208, std / _STD_6_BIT / 64)


def _fill_f16(blocks: _Blocks, std: float) -> None:
    """Keep the random sign and mantissa; the exponent comes within a factor of 1.5 of `std`."""
    exponent = 15 + round(math.log2(std / _STD_MANTISSA))
    halves = blocks.view("<u2")
    halves &= 0x83FF
    halves |= exponent << 10


_FILL: dict[GGMLQuantizationType, Callable[[_Blocks, float], None]] = {
    GGMLQuantizationType.Q8_0: _fill_q8_0,
    GGMLQuantizationType.Q4_0: _fill_q4_0,
    GGMLQuantizationType.Q4_K: _fill_q4_k,
    GGMLQuantizationType.Q6_K: _fill_q6_k,
    GGMLQuantizationType.F16: _fill_f16,
}
RANDOM_TYPES = frozenset(_FILL)


def random_rows(
    random: np.random.Generator, kind: GGMLQuantizationType, shape: tuple[int, int], std: float
) -> NDArray[np.uint8]:
    """Draw rows of weights in their stored form.

    Parameters
    ----------
    random
        Where the bits come from.
    kind
        One of `RANDOM_TYPES`.
    shape
        Rows and their length, a whole number of blocks.
    std
        Standard deviation of the values; for F16 the nearest that an exponent alone can give.

    Returns
    -------
    ndarray of uint8, shape (n_rows, bytes of a row)
    """
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks = shape[0] * shape[1] // per_block
    blocks = np.frombuffer(bytearray(random.bytes(n_blocks * block_bytes)), dtype=np.uint8)
    blocks = blocks.reshape(n_blocks, block_bytes)
    _FILL[kind](blocks, std)
    return blocks.reshape(shape[0], -1)
