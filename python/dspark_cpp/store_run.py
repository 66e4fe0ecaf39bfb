"""`dspark run NAME`: what a name on the command line stands for.

A file is itself; a name is looked up in the store, its options take the place of those that were not given, and a
hub's model that is not here yet is pulled first, as Ollama does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from dspark_cpp.errors import ModelNotFoundError
from dspark_cpp.store import Manifest, ModelName, Store
from dspark_cpp.store_progress import follow

__all__ = ["Resolved", "resolve"]

# Ollama's name of an option, and what it is called here.
_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repeat_last_n": "penalty_window",
    "seed": "seed",
    "stop": "stop",
}
_ENGINE = {"num_ctx": "n_ctx", "num_thread": "n_threads", "num_gpu": "n_gpu_layers", "draft_num_predict": "policy"}


@dataclass(frozen=True, slots=True)
class Resolved:
    """Files to load, and what a model of the store brings with it.

    Attributes
    ----------
    target, draft
        Paths.
    sampling, engine
        Options that were not given on the command line, by the names of SamplingParams and EngineConfig.
    max_tokens
        None: no limit of its own.
    opening
        Messages that every conversation begins with.
    """

    target: str
    draft: str | None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    opening: tuple[Mapping[str, str], ...] = ()


def resolve(model: str, draft: str | None, given: Collection[str]) -> Resolved:
    """Find out what `model` stands for.

    Parameters
    ----------
    model
        `demo`, a GGUF file, or a model of the store or the hub.
    draft
        A drafter in place of the model's own.
    given
        Options of the command line that the model's own must not replace.

    Raises
    ------
    ModelNotFoundError
        If it is none of them.
    BlobError
        If files of a model in the store are missing or damaged.
    """
    if model == "demo" or _is_file(model):
        return Resolved(model, draft)
    store = Store()
    manifest = _get_or_pull(store, model)
    store.check(manifest)
    return _unpack(manifest, draft, given)


def _is_file(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.lower().endswith(".gguf") or Path(model).exists()


def _get_or_pull(store: Store, name: str) -> Manifest:
    try:
        return store.get(name)
    except ModelNotFoundError:
        if ModelName.parse(name).repo is None:
            raise
    follow(store.pull(name))
    return store.get(name)


def _unpack(manifest: Manifest, draft: str | None, given: Collection[str]) -> Resolved:
    options = manifest.parameters
    unused = sorted(options.keys() - _SAMPLING.keys() - _ENGINE.keys() - {"num_predict"})
    if unused:
        typer.echo(f"warning: parameters of {manifest.name} that are not used: {', '.join(unused)}", err=True)
    n_predict = options.get("num_predict", -1)
    own_draft = None if manifest.draft_path is None else str(manifest.draft_path)
    system = [] if manifest.system is None else [{"role": "system", "content": manifest.system}]
    return Resolved(
        target=str(manifest.target_path),
        draft=own_draft if draft is None else draft,
        sampling={ours: options[name] for name, ours in _SAMPLING.items() if name in options and ours not in given},
        engine={ours: options[name] for name, ours in _ENGINE.items() if name in options and ours not in given},
        max_tokens=n_predict if n_predict > 0 else None,
        opening=(*system, *manifest.messages),
    )
