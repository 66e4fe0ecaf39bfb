"""Which tokens a drafter with a reduced vocabulary proposes.

On a CPU the output head over a large vocabulary costs a drafter more than its layers; most of its rows are never
drafted. A token outside the reduced vocabulary is merely never proposed: acceptance falls, the text stays the target's.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_cpp.convert.checkpoint import TensorSource
from dspark_cpp.errors import DSparkError, ModelLoadError

# Rows of a head in blocks: the interleaved layouts of ggml's CPU kernels take multiples of 16 at most.
_ROW_MULTIPLE = 64
_MAX_SPAN = 1 << 14  # source rows read at a time

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DraftVocab:
    """The tokens to propose, ascending, and the share of the corpus they cover (None without a corpus)."""

    ids: NDArray[np.int64]
    coverage: float | None

    def describe(self) -> str:
        """Say in one line how the tokens were chosen."""
        if self.coverage is None:
            return (
                f"draft vocabulary: the {self.ids.size} lowest token ids (the earliest merges) and the tokens that "
                "end a text; --corpus chooses better"
            )
        return f"draft vocabulary: {self.ids.size} tokens, {self.coverage:.2%} of the corpus"


def choose_draft_vocab(n_tokens: int, counts: Counts, end_tokens: list[int], has_corpus: bool = True) -> DraftVocab:
    """Choose the most frequent tokens.

    Parameters
    ----------
    n_tokens
        Tokens to choose, rounded up to a multiple of 64 (the row blocks of ggml's kernels); at most the vocabulary.
    counts
        How often each token stands in the corpus, shape (n_vocab,). Equal counts, zero above all, rank by id: in a BPE
        vocabulary low ids are the earliest merges.
    end_tokens
        Tokens that end a text: always among the chosen, in place of the rarest.
    has_corpus
        False: `counts` say nothing, and no coverage is stated.

    Returns
    -------
    DraftVocab
        Different ids, ascending.
    """
    size = min(-(-n_tokens // _ROW_MULTIPLE) * _ROW_MULTIPLE, counts.size)
    ranked = np.argsort(-counts, kind="stable")
    ends = np.unique(np.asarray(end_tokens, dtype=np.int64))
    others = ranked[~np.isin(ranked, ends)]
    ids = np.sort(np.concatenate([ends, others[: max(size - ends.size, 0)]]).astype(np.int64))
    coverage = float(counts[ids].sum() / max(int(counts.sum()), 1)) if has_corpus else None
    return DraftVocab(ids, coverage)


def read_draft_vocab(target: Path, n_tokens: int, corpus: Path | None) -> DraftVocab:
    """Choose a draft vocabulary with the target's own tokenizer.

    Parameters
    ----------
    target
        GGUF file of the target.
    n_tokens
        Tokens to choose.
    corpus
        UTF-8 text like what the target writes; with the suffix `.jsonl`, one object with a `text` per line. None: the
        tokens of the lowest ids.

    Raises
    ------
    ModelLoadError
        If target or corpus cannot be read.
    DSparkError
        If the compiled module, which holds the tokenizer, is not there.
    ValueError
        If the corpus is empty.
    """
    model = _load_target(target)
    counts = np.zeros(model.n_vocab, dtype=np.int64)
    for text in () if corpus is None else _read_corpus(corpus):
        tokens = model.tokenize(text, add_special=False, parse_special=True)
        counts += np.bincount(tokens, minlength=model.n_vocab)
    if corpus is not None and not counts.any():
        raise ValueError(f"corpus must hold text, got none in {corpus}")
    ends = [token for token in range(model.n_vocab) if model.is_end_of_generation(token)]
    return choose_draft_vocab(n_tokens, counts, ends, corpus is not None)


def _load_target(path: Path) -> Any:
    try:
        core = importlib.import_module("dspark_cpp._core")
    except ImportError as error:
        raise DSparkError(
            f"cannot choose a draft vocabulary: the compiled module of dspark_cpp is missing ({error})"
        ) from error
    return core.Model.load_target(str(path))


def _read_corpus(path: Path) -> Iterator[str]:
    """Yield the corpus in pieces: its lines, which keeps a large file out of memory."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _text_of(line, path, number) if path.suffix == ".jsonl" else line
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"line {number} of {path} must be an object with a text, got {line.strip()[:60]!r}")
    return text


@dataclass(frozen=True, slots=True)
class SelectedRows:
    """Some rows of another tensor, in ascending order, as a source of rows."""

    source: TensorSource
    ids: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return (self.ids.size, *self.source.shape[1:])

    @property
    def dtype(self) -> str:
        """Element type of the source."""
        return self.source.dtype

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows `start` to `stop` as float32 (n, width)."""
        wanted = self.ids[start:stop]
        return np.concatenate(
            [self._read(wanted[wanted // _MAX_SPAN == part]) for part in np.unique(wanted // _MAX_SPAN)]
        )

    def _read(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        first = int(ids[0])
        return self.source.rows(first, int(ids[-1]) + 1)[ids - first]
