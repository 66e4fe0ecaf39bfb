"""From options to what the extension takes: models, an engine, a request's options."""

from __future__ import annotations

import os
from typing import Any

from dspark_cpp import _core
from dspark_cpp.calibration_files import find_calibration
from dspark_cpp.config import EngineConfig, SamplingParams, default_candidates

__all__ = ["load_models", "make_engine", "request_options"]


def load_models(
    model: str | os.PathLike[str] | _core.Model,
    draft: str | os.PathLike[str] | _core.Model | None,
    config: EngineConfig,
) -> tuple[_core.Model, _core.Model | None]:
    """Return the models, loaded unless they are already."""
    options: dict[str, Any] = {
        "n_gpu_layers": config.n_gpu_layers,
        "use_mmap": config.use_mmap,
        "check_tensors": config.check_tensors,
        "use_kernels": config.cpu_kernels == "auto",
    }
    target = model if isinstance(model, _core.Model) else _core.Model.load_target(os.fspath(model), **options)
    if draft is None or isinstance(draft, _core.Model):
        return target, draft
    return target, _core.Model.load_drafter(os.fspath(draft), target, **options)


def make_engine(
    target: _core.Model,
    drafter: _core.Model | None,
    config: EngineConfig,
    synthetic_acceptance: _core.SyntheticAcceptance | None = None,
) -> _core.Engine:
    """Return an engine with these options."""
    return _core.Engine(
        target,
        drafter,
        n_ctx=config.n_ctx,
        n_parallel=config.n_parallel,
        n_batch=config.n_batch,
        n_threads=config.n_threads,
        n_threads_batch=config.n_threads_batch,
        kv_type=config.kv_type,
        head=config.head,
        n_candidates=_n_candidates(drafter, config),
        policy=str(config.policy),
        objective=config.objective,
        calibration=_calibration(target, drafter, config),
        draft_window=config.draft_window,
        max_queue=config.max_queue,
        prefill_chunk=config.prefill_chunk,
        prefix_reuse=config.prefix_reuse,
        flash_attention=config.flash_attention,
        synthetic_acceptance=synthetic_acceptance,
    )


def request_options(params: SamplingParams, seed: int, grammar: _core.Grammar | None = None) -> _core.RequestOptions:
    """Return a request's options in the engine's form."""
    return _core.RequestOptions(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        penalty_window=params.penalty_window,
        logit_bias=dict(params.logit_bias or {}),
        seed=seed,
        ignore_eos=params.ignore_eos,
        context_shift=params.context_shift,
        n_keep=params.n_keep,
        n_logprobs=-1 if params.logprobs is None else params.logprobs,
        verification=params.rule if grammar is None else params.verification,  # a grammar goes with "exact" alone
        policy=None if params.policy is None else str(params.policy),
        draft_limit=params.draft_limit,
        grammar=grammar,
    )


def _n_candidates(drafter: _core.Model | None, config: EngineConfig) -> int:
    if config.n_candidates is not None:
        return config.n_candidates
    return default_candidates(config.head, "none" if drafter is None else drafter.drafter_info.head_type)


_Floats = tuple[float, ...]


def _calibration(
    target: _core.Model, drafter: _core.Model | None, config: EngineConfig
) -> list[tuple[str, float, _Floats, _Floats, _Floats, _Floats]]:
    if drafter is None:
        return []
    block_size = drafter.drafter_info.block_size
    found = find_calibration(drafter.path, block_size, target=target.path, calibration=config.calibration)
    entries = found.entries if found else ()
    return [(e.rule, e.temperature, e.sts, e.acceptance, e.offsets, e.maps) for e in entries]
