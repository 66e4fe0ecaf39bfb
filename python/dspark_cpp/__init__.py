"""DSpark speculative decoding for quantized GGUF models, in process.

>>> from dspark_cpp import LLM, SamplingParams
>>> with LLM("target.gguf", "drafter.gguf") as llm:  # doctest: +SKIP
...     [completion] = llm.generate("Once upon a time", SamplingParams(max_tokens=64))

Names load on first use, so that the converter and `dspark --help` need no compiled extension.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_cpp._core import BuildInfo, __version__, build_info
    from dspark_cpp.config import EngineConfig, SamplingParams
    from dspark_cpp.errors import (
        ContextFullError,
        DecodeError,
        DSparkError,
        EngineClosedError,
        ModelLoadError,
        ModelMismatchError,
        QueueFullError,
    )
    from dspark_cpp.llm import LLM
    from dspark_cpp.results import Chunk, Completion, RequestStats, TokenLogprob

__all__ = [
    "LLM",
    "BuildInfo",
    "Chunk",
    "Completion",
    "ContextFullError",
    "DSparkError",
    "DecodeError",
    "EngineClosedError",
    "EngineConfig",
    "ModelLoadError",
    "ModelMismatchError",
    "QueueFullError",
    "RequestStats",
    "SamplingParams",
    "TokenLogprob",
    "__version__",
    "build_info",
]

_HOMES = {
    "LLM": "llm",
    "BuildInfo": "_core",
    "Chunk": "chat",
    "Completion": "chat",
    "EngineConfig": "config",
    "RequestStats": "chat",
    "SamplingParams": "config",
    "TokenLogprob": "chat",
    "__version__": "_core",
    "build_info": "_core",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
