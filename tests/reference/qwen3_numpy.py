"""A Qwen3 target in numpy, straight from its GGUF file: the oracle for whatever its hidden states become.

Written from the model's definition (RMSNorm, rotary halves, grouped queries with normed heads, SwiGLU), in 64-bit
floats, one text at a time, no cache. Slow and short.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Qwen3:
    """The target of one file.

    Parameters
    ----------
    path
        GGUF file of architecture `qwen3`, any tensor types.
    """

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self._w = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }

        def value(key: str) -> float:
            return float(reader.fields[f"qwen3.{key}"].contents())

        self._n_layers = int(value("block_count"))
        self._n_heads, self._n_kv = int(value("attention.head_count")), int(value("attention.head_count_kv"))
        self._eps = value("attention.layer_norm_rms_epsilon")
        self._theta = value("rope.freq_base")

    def final_states(self, tokens: list[int]) -> Array:
        """Return the states after the final norm, (n_tokens, n_embd)."""
        x = self._w["token_embd.weight"][tokens]
        for i in range(self._n_layers):
            x = x + self._attention(f"blk.{i}.", self._norm(x, f"blk.{i}.attn_norm.weight"))
            x = x + self._feed_forward(f"blk.{i}.", self._norm(x, f"blk.{i}.ffn_norm.weight"))
        return self._norm(x, "output_norm.weight")

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self._eps) * self._w[name]

    def _heads(self, x: Array, prefix: str, name: str, n: int) -> Array:
        return (x @ self._w[f"{prefix}attn_{name}.weight"].T).reshape(len(x), n, -1)

    def _attention(self, prefix: str, x: Array) -> Array:
        q = self._rotate(self._norm(self._heads(x, prefix, "q", self._n_heads), f"{prefix}attn_q_norm.weight"))
        k = self._rotate(self._norm(self._heads(x, prefix, "k", self._n_kv), f"{prefix}attn_k_norm.weight"))
        v = self._heads(x, prefix, "v", self._n_kv)
        group = self._n_heads // self._n_kv
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu(np.ones((len(x), len(x)), dtype=bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(axis=-1, keepdims=True), v)
        return mixed.reshape(len(x), -1) @ self._w[f"{prefix}attn_output.weight"].T

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self._theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def _feed_forward(self, prefix: str, x: Array) -> Array:
        gate = x @ self._w[f"{prefix}ffn_gate.weight"].T
        return (gate / (1 + np.exp(-gate)) * (x @ self._w[f"{prefix}ffn_up.weight"].T)) @ self._w[
            f"{prefix}ffn_down.weight"
        ].T
