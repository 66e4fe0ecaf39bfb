"""What a target and its drafter take of memory, read off the headers of their files.

Owns: sizes of weights, heads and caches. Must not know: models in memory, terminals.
"""

from __future__ import annotations

from pathlib import Path

from dspark_cpp.config import EngineConfig
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.metadata import read_drafter
from dspark_cpp.convert.pair import read_target

__all__ = ["describe_memory"]

_MIB = 1 << 20
_KV_BYTES = 2  # f16
_INJECT_ROWS = 256  # rows of one injection pass, which the draft cache has room for beside its window
_MARKOV_TENSORS = ("markov_w1.weight", "markov_w2.weight", "markov_gate.weight", "markov_joint.weight")


def describe_memory(target: Path, draft: Path | None = None, config: EngineConfig | None = None) -> dict[str, str]:
    """Say what a pair takes of memory, without loading it.

    Parameters
    ----------
    target, draft
        GGUF files.
    config
        Context, requests and window that caches are sized for; the defaults when None.

    Returns
    -------
    dict
        Name to text, in the order to show. Caches are f16; layers with a sliding window count in full.

    Raises
    ------
    ModelLoadError
        If a file cannot be read or is not what it should be.
    """
    options = config or EngineConfig()
    rows = _describe_target(GGUFFile(target), options)
    return rows if draft is None else rows | _describe_drafter(GGUFFile(draft), options)


def _describe_target(file: GGUFFile, options: EngineConfig) -> dict[str, str]:
    info = read_target(file)
    trained = file.get(f"{info.architecture}.context_length")
    n_ctx = options.n_ctx or min(4096, trained if isinstance(trained, int) else 4096)
    per_token = _kv_bytes(file, info.architecture, info.n_layers)
    head = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    return {
        "target weights": _mib(_tensor_bytes(file, *file.tensors)),
        "target head": f"{_mib(_tensor_bytes(file, head))} ({info.vocab_size} tokens, {head.partition('.')[0]})",
        "target KV": f"{_mib(per_token * n_ctx * options.n_parallel)} ({per_token / 1024:.1f} KiB a token, "
        f"n_ctx {n_ctx}, n_parallel {options.n_parallel})",
    }


def _describe_drafter(file: GGUFFile, options: EngineConfig) -> dict[str, str]:
    config = read_drafter(file).config
    n_inputs = config.block_size + (not config.sample_from_anchor)
    window = min(options.draft_window, options.n_ctx or 4096)
    n_cells = options.n_parallel * (window + n_inputs + _INJECT_ROWS)
    per_token = 2 * config.n_layers * config.n_kv_heads * config.head_dim * _KV_BYTES
    row_bytes = 4 * len(config.target_layers) * config.hidden_size
    is_own = "output.weight" in file.tensors
    head = _mib(_tensor_bytes(file, "output.weight")) if is_own else "borrowed from the target"
    return {
        "drafter weights": _mib(_tensor_bytes(file, *file.tensors)),
        "draft head": f"{head} ({config.draft_vocab_size} of {config.vocab_size} tokens)",
        "Markov head": f"{_mib(_tensor_bytes(file, *_MARKOV_TENSORS))} (rank {config.markov_rank})",
        "draft KV": f"{_mib(per_token * n_cells)} ({per_token / 1024:.1f} KiB a token, window {window})",
        "draft features": f"{row_bytes / 1024:.1f} KiB a token while they wait, 128 MiB at most",
    }


def _tensor_bytes(file: GGUFFile, *names: str) -> int:
    return sum(file.tensors[name].n_bytes or 0 for name in names if name in file.tensors)


def _kv_bytes(file: GGUFFile, architecture: str, n_layers: int) -> int:
    """K and V of one token in all layers; an array gives each layer's heads."""

    def number(key: str, default: int) -> int:
        value = file.get(f"{architecture}.{key}")
        return value if isinstance(value, int) else default

    n_heads = number("attention.head_count", 1)
    heads = file.get_numbers(f"{architecture}.attention.head_count_kv")
    n_kv_heads = sum(heads) if heads else n_layers * number("attention.head_count_kv", n_heads)
    width = number("embedding_length", 0) // max(n_heads, 1)
    widths = number("attention.key_length", width) + number("attention.value_length", width)
    return int(n_kv_heads * widths * _KV_BYTES)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / _MIB:.1f} MiB"
