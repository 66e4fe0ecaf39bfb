"""From a checkpoint to a drafter's GGUF file: check everything, write, verify, and only then replace `output`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from dspark_cpp.convert.checkpoint import Checkpoint, SafeTensor, TensorSource, open_checkpoint
from dspark_cpp.convert.draft_vocab import DraftVocab, SelectedRows, read_draft_vocab
from dspark_cpp.convert.drafter_config import DrafterConfig
from dspark_cpp.convert.gguf_file import GGUFFile, count_elements
from dspark_cpp.convert.gguf_writer import (
    GGUFTensor,
    Progress,
    TensorPlan,
    TensorReport,
    replace_on_success,
    row_chunks,
    verify_gguf,
    write_gguf,
)
from dspark_cpp.convert.metadata import encode_metadata
from dspark_cpp.convert.pair import DraftInfo, TargetInfo, check_pair, list_upstream_limits, read_target
from dspark_cpp.convert.tensors import OUT_TYPES, ExpectedTensor, OutType, choose_type, compare_shapes, list_expected
from dspark_cpp.errors import DSparkError, ModelLoadError, ModelMismatchError

# A borrowed matrix further from the checkpoint's than any usable quantization explains is another matrix.
_MAX_BORROW_DISTANCE = 0.5
_N_COMPARED_ROWS = 64


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What to convert, and how.

    Attributes
    ----------
    checkpoint
        Directory or Hugging Face repository id of the drafter.
    target
        GGUF file of the target model.
    output
        File to write.
    outtype
        One of `OUT_TYPES`.
    own_embeddings
        Write embedding and output head into the file instead of borrowing the target's.
    is_dry_run
        Check everything and plan, but write nothing.
    name
        Value of `general.name`; the checkpoint's directory name when empty.
    draft_vocab
        Tokens that the drafter proposes; 0: as the checkpoint has it. See `choose_draft_vocab`.
    corpus
        Text to choose them by, see `read_draft_vocab`.
    """

    checkpoint: str | Path
    target: Path
    output: Path
    outtype: str = "q8_0"
    own_embeddings: bool = False
    is_dry_run: bool = False
    name: str = ""
    draft_vocab: int = 0
    corpus: Path | None = None


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What was written (or would be): one entry per tensor, and remarks for the user."""

    output: Path
    tensors: list[TensorReport]
    n_bytes: int
    notes: list[str]


Fraction = Callable[[str, float], None]


def convert(options: ConvertOptions, progress: Fraction = lambda name, fraction: None) -> ConvertReport:
    """Convert a drafter checkpoint to GGUF.

    Parameters
    ----------
    options
        What to convert, and how.
    progress
        Called with the tensor in hand and the fraction done of the whole work (scan, write, compare).

    Returns
    -------
    ConvertReport
        Type, size and error of every tensor.

    Raises
    ------
    ModelLoadError
        If checkpoint or target cannot be used.
    ModelMismatchError
        If the two do not belong together.
    DSparkError
        If the file cannot be written.
    ValueError
        If an option is wrong.
    """
    out_type = _check_options(options)
    checkpoint = open_checkpoint(options.checkpoint)
    _check_tensors(checkpoint)
    target = read_target(GGUFFile(options.target))
    _check_match(target, checkpoint.config, options)
    vocab = _choose_vocab(checkpoint.config, options)
    config = checkpoint.config if vocab is None else replace(checkpoint.config, draft_vocab_size=vocab.ids.size)
    plans = _plan_tensors(_Drafter(checkpoint, config, vocab), target, options, out_type)
    meter = _Meter(plans, 1 if options.is_dry_run else 3, progress)
    plans = _settle_types(plans, out_type, meter)
    notes = _list_notes(checkpoint, target, options) + ([] if vocab is None else [vocab.describe()])
    if options.is_dry_run and out_type.quantizer:
        notes.append("llama.cpp chooses the type of each matrix in this mix: types and sizes are estimates")
    if options.is_dry_run:
        return ConvertReport(options.output, [_foresee(plan) for plan in plans], _sum_bytes(plans), notes)
    name = options.name or checkpoint.path.resolve().name
    values = encode_metadata(config, name, out_type.file_type, target)
    reports = _write_and_verify(options.output, _Contents(values, plans, out_type), meter)
    return ConvertReport(options.output, reports, options.output.stat().st_size, notes)


@dataclass(frozen=True, slots=True)
class _Drafter:
    """A checkpoint, and the config of the file it becomes: with `vocab`, one of a smaller draft vocabulary."""

    checkpoint: Checkpoint
    config: DrafterConfig
    vocab: DraftVocab | None


class _Meter:
    """Turns elements handled into the fraction of all passes over all tensors."""

    def __init__(self, plans: Sequence[TensorPlan], n_passes: int, report: Fraction) -> None:
        self._total = n_passes * sum(count_elements(plan.shape) for plan in plans)
        self._done = 0
        self._report = report

    def __call__(self, name: str, n_elements: int) -> None:
        self._done += n_elements
        self._report(name, self._done / self._total)


def _check_options(options: ConvertOptions) -> OutType:
    if options.outtype not in OUT_TYPES:
        raise ValueError(f"outtype must be one of {', '.join(OUT_TYPES)}, got {options.outtype}")
    if options.output.is_dir():
        raise ValueError(f"output must be a file, got the directory {options.output}")
    output, source = options.output.resolve(), Path(options.checkpoint).resolve()
    is_inside = output.parent == source and output.suffix in (".safetensors", ".json")
    if output in (options.target.resolve(), source) or is_inside:
        raise ValueError(f"output must not be the target or part of the checkpoint, got {options.output}")
    if options.draft_vocab < 0:
        raise ValueError(f"draft_vocab must be at least 0, got {options.draft_vocab}")
    if options.corpus is not None and not options.draft_vocab:
        raise ValueError("corpus must be given together with draft_vocab, got it alone")
    return OUT_TYPES[options.outtype]


def _choose_vocab(config: DrafterConfig, options: ConvertOptions) -> DraftVocab | None:
    if not options.draft_vocab:
        return None
    if config.has_reduced_vocab:
        raise ValueError(
            f"draft_vocab must be 0 for a checkpoint with a reduced vocabulary of its own, got {options.draft_vocab}"
        )
    if options.draft_vocab >= config.vocab_size:
        raise ValueError(
            f"draft_vocab must be below the vocabulary size {config.vocab_size}, got {options.draft_vocab}"
        )
    vocab = read_draft_vocab(options.target, options.draft_vocab, options.corpus)
    return vocab if vocab.ids.size < config.vocab_size else None


def _check_tensors(checkpoint: Checkpoint) -> None:
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    if problems := compare_shapes(checkpoint.config, shapes):
        raise ModelLoadError(f"cannot convert {checkpoint.path}: " + "; ".join(problems))


def _check_match(target: TargetInfo, config: DrafterConfig, options: ConvertOptions) -> None:
    draft = DraftInfo(config, options.own_embeddings, options.own_embeddings or config.has_reduced_vocab)
    if reasons := check_pair(target, draft):
        raise ModelMismatchError(f"cannot pair {options.checkpoint} with {options.target}: " + "; ".join(reasons))


def _plan_tensors(
    drafter: _Drafter, target: TargetInfo, options: ConvertOptions, out_type: OutType
) -> list[TensorPlan]:
    plans = []
    for tensor in list_expected(drafter.config):
        if tensor.is_optional and not options.own_embeddings:
            continue
        if tensor.role == "map":
            plans.append(_plan_map(tensor, drafter))
            continue
        source, note = _find_rows(tensor, drafter, target)
        plans.append(TensorPlan(tensor.gguf, tensor.shape, tensor.role, source, out_type.type, note))
    return plans


def _plan_map(tensor: ExpectedTensor, drafter: _Drafter) -> TensorPlan:
    ids = _read_map(drafter.checkpoint) if drafter.vocab is None else drafter.vocab.ids
    source = SafeTensor((ids.size,), "I64", ids)
    return TensorPlan(tensor.gguf, tensor.shape, tensor.role, source, GGMLQuantizationType.I64, integers=ids)


def _find_rows(tensor: ExpectedTensor, drafter: _Drafter, target: TargetInfo) -> tuple[TensorSource, str]:
    """Return a tensor's rows: of what has a row per drafted token, those of the chosen tokens."""
    if drafter.vocab is None or tensor.gguf not in ("output.weight", "markov_w2.weight"):
        return _find_source(tensor, drafter.checkpoint, target)
    whole = replace(tensor, shape=(drafter.config.vocab_size, *tensor.shape[1:]))
    source, note = _find_source(whole, drafter.checkpoint, target)
    return SelectedRows(source, drafter.vocab.ids), note


def _find_source(tensor: ExpectedTensor, checkpoint: Checkpoint, target: TargetInfo) -> tuple[TensorSource, str]:
    """Return where a tensor comes from; embedding and head may have to come from the target."""
    own = checkpoint.tensors
    if tensor.source in own:
        return own[tensor.source], ""
    if tensor.role == "output" and checkpoint.config.is_tied and "embed_tokens.weight" in own:
        return own["embed_tokens.weight"], "tied to the embedding"
    names = ["token_embd.weight"] if tensor.role == "embedding" else ["output.weight", "token_embd.weight"]
    name = next((name for name in names if name in target.file.tensors), None)
    if name is None or target.file.tensors[name].shape != tensor.shape:
        raise ModelLoadError(
            f"cannot take {tensor.gguf} from {target.file.path}: it must hold {names[-1]} of shape {list(tensor.shape)}"
        )
    return GGUFTensor(target.file, name), f"from the target's {name}"


def _read_map(checkpoint: Checkpoint) -> NDArray[np.int64]:
    """Return the drafter's tokens as target ids; checkpoints store them as distances from their own index."""
    config, tensor = checkpoint.config, checkpoint.tensors["d2t"]
    if tensor.dtype not in ("I64", "I32"):
        raise ModelLoadError(f"cannot convert {checkpoint.path}: d2t must hold integers, got {tensor.dtype}")
    ids = tensor.integers() + np.arange(config.draft_vocab_size, dtype=np.int64)
    if ids.min() < 0 or ids.max() >= config.vocab_size or np.unique(ids).size != ids.size:
        raise ModelLoadError(
            f"cannot convert {checkpoint.path}: d2t must name different tokens below {config.vocab_size}"
        )
    return ids


def _settle_types(plans: Sequence[TensorPlan], out_type: OutType, progress: Progress) -> list[TensorPlan]:
    """Scan the values of every source once: refuse what is not finite, then choose types by range and row length."""
    peaks = {plan.name: _find_peak(plan, progress) for plan in plans}
    if bad := [name for name, peak in peaks.items() if not np.isfinite(peak)]:
        raise ModelLoadError(f"cannot convert tensors with NaN or infinite values: {', '.join(bad)}")
    settled = []
    for plan in plans:
        kind, note = choose_type(plan.role, plan.shape[-1], peaks[plan.name], out_type.type)
        notes = "; ".join(text for text in (plan.note, note) if text)
        settled.append(replace(plan, type=kind, note=notes))
    return settled


def _find_peak(plan: TensorPlan, progress: Progress) -> float:
    peak = 0.0
    for start, stop in row_chunks(plan.shape):
        rows = plan.source.rows(start, stop)
        peak = float(np.maximum(peak, np.abs(rows).max()))  # keeps a NaN, unlike max()
        progress(plan.name, rows.size)
    return peak


def _foresee(plan: TensorPlan) -> TensorReport:
    return TensorReport(plan.name, plan.type.name, plan.shape, plan.n_bytes, 0.0, 0.0, plan.note)


def _sum_bytes(plans: Sequence[TensorPlan]) -> int:
    return sum(plan.n_bytes for plan in plans)


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that goes into the file."""

    values: Mapping[str, bytes]
    plans: Sequence[TensorPlan]
    out_type: OutType


def _write_and_verify(output: Path, contents: _Contents, progress: Progress) -> list[TensorReport]:
    with replace_on_success(output) as temporary:
        if contents.out_type.quantizer:
            _write_with_core(temporary, contents, progress)
        else:
            write_gguf(temporary, contents.values, contents.plans, progress)
        return verify_gguf(temporary, contents.plans, progress)


def _write_with_core(temporary: Path, contents: _Contents, progress: Progress) -> None:
    """Let llama.cpp quantize: its K-quants search their scales, which numpy does not do."""
    core, out_type = _load_core(), contents.out_type
    keep = [plan.name for plan in contents.plans if plan.type != out_type.type]
    carriers = [plan if plan.name in keep else replace(plan, type=_carrier(plan)) for plan in contents.plans]
    intermediate = temporary.with_suffix(".full")
    try:
        write_gguf(intermediate, contents.values, carriers, progress)
        core.quantize_model(str(intermediate), str(temporary), out_type.quantizer, keep)
    except (RuntimeError, ValueError) as error:
        raise DSparkError(f"cannot quantize to {out_type.quantizer}: {error}") from error
    finally:
        intermediate.unlink(missing_ok=True)


def _load_core() -> Any:
    try:
        return importlib.import_module("dspark_cpp._core")
    except ImportError as error:
        raise DSparkError(
            f"cannot write K-quants: they need the compiled module of dspark_cpp ({error}); q8_0 and q4_0 do not"
        ) from error


def _carrier(plan: TensorPlan) -> GGMLQuantizationType:
    exact = {"BF16": GGMLQuantizationType.BF16, "F16": GGMLQuantizationType.F16}
    return exact.get(plan.source.dtype, GGMLQuantizationType.F32)


def _list_notes(checkpoint: Checkpoint, target: TargetInfo, options: ConvertOptions) -> list[str]:
    notes = [f"llama.cpp itself cannot load this file: {limit}" for limit in list_upstream_limits(checkpoint.config)]
    if not options.own_embeddings:
        notes += _check_borrowed(checkpoint, target)
    return notes


def _check_borrowed(checkpoint: Checkpoint, target: TargetInfo) -> list[str]:
    """Compare some rows of embedding and head with those that will be borrowed: training freezes them."""
    pairs = [("embed_tokens.weight", "token_embd.weight")]
    if not checkpoint.config.has_reduced_vocab:
        pairs.append(("lm_head.weight", "token_embd.weight" if target.is_tied else "output.weight"))
    notes = []
    for source, borrowed in pairs:
        if source in checkpoint.tensors and borrowed in target.file.tensors:
            distance = _measure_distance(checkpoint.tensors[source], GGUFTensor(target.file, borrowed))
            if not distance <= _MAX_BORROW_DISTANCE:
                notes.append(
                    f"{source} is not the target's {borrowed} (relative distance {distance:.2f}): "
                    "is this the right target? If so, use --own-embeddings"
                )
    return notes


def _measure_distance(own: TensorSource, borrowed: TensorSource) -> float:
    n_rows = min(own.shape[0], borrowed.shape[0])
    rows = np.unique(np.linspace(0, n_rows - 1, _N_COMPARED_ROWS).astype(int))
    left = np.concatenate([own.rows(row, row + 1) for row in rows])
    right = np.concatenate([borrowed.rows(row, row + 1) for row in rows])
    return float(np.linalg.norm(left - right) / max(float(np.linalg.norm(left)), 1e-30))
