"""Whether a target and a drafter belong together, and every reason why not.

Used by the converter before it writes and by `dspark inspect` afterwards. What llama.cpp would answer with an abort is
answered here with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dspark_cpp.convert.drafter_config import DrafterConfig
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.errors import ModelLoadError

DRAFTER_ARCHITECTURE = "dflash"

# Architectures whose graph sets t_layer_inp for every layer, read in src/models/*.cpp of llama.cpp commit 0c1e57098.
TAPPABLE_ARCHITECTURES = frozenset(
    {
        "bailingmoe3",
        "deepseek4",
        "gemma4",
        "gpt-oss",
        "hunyuan-dense",
        "hunyuan_vl",
        "lfm2",
        "lfm2moe",
        "llama",
        "llama-embed",
        "mimo2",
        "minimax-01",
        "minimax-m2",
        "muse-glimmer",
        "nanbeige",
        "nemotron_h",
        "nemotron_h_moe",
        "qwen3",
        "qwen35",
        "qwen35moe",
        "qwen3moe",
        "qwen3next",
        "qwen4exp",
    }
)

# Those of them that also offer the output of the last layer (t_layer_inp[n_layer]).
LAST_LAYER_ARCHITECTURES = frozenset({"deepseek4", "mimo2", "nemotron_h", "nemotron_h_moe"})

# Converters disagree about a few reserved tokens; more than this many different ones is another vocabulary.
_MAX_DIFFERENT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What a drafter must know of its target; of a split model only the first part is read."""

    architecture: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    tokenizer: str | None
    is_split: bool
    is_tied: bool
    has_embedding: bool
    uses_mrope: bool
    file: GGUFFile


@dataclass(frozen=True, slots=True)
class DraftInfo:
    """What a target must know of its drafter; `file` is None while the drafter is still a checkpoint."""

    config: DrafterConfig
    has_own_embedding: bool = False
    has_own_output: bool = False
    tokenizer: str | None = None
    file: GGUFFile | None = None


def read_target(file: GGUFFile) -> TargetInfo:
    """Read the target side of a pair from a GGUF header.

    Raises
    ------
    ModelLoadError
        If the file lacks what every model file has.
    """
    is_split = (optional_integer(file, "split.count") or 1) > 1
    if is_split and optional_integer(file, "split.no"):
        raise ModelLoadError(f"cannot read {file.path}: it is a later part of a split model, name the first part")
    architecture = str(file.get("general.architecture"))
    n_layers = require_integer(file, f"{architecture}.block_count")
    n_layers -= optional_integer(file, f"{architecture}.nextn_predict_layers") or 0
    hidden_size = require_integer(file, f"{architecture}.embedding_length")
    return TargetInfo(
        architecture=architecture,
        n_layers=n_layers,
        hidden_size=hidden_size,
        vocab_size=count_tokens(file) or optional_integer(file, f"{architecture}.vocab_size") or 0,
        tokenizer=name_tokenizer(file),
        is_split=is_split,
        is_tied="output.weight" not in file.tensors and not is_split,
        has_embedding="token_embd.weight" in file.tensors or is_split,
        uses_mrope=any(file.get_numbers(f"{architecture}.rope.dimension_sections") or ()),
        file=file,
    )


def require_integer(file: GGUFFile, key: str) -> int:
    """Return a positive integer key of a file, or say that it is missing."""
    value = optional_integer(file, key)
    if value is None or value < 1:
        raise ModelLoadError(f"cannot read {file.path}: {key} must be a positive integer, got {file.get(key)!r}")
    return value


def optional_integer(file: GGUFFile, key: str) -> int | None:
    """Return an integer key of a file, None when it is missing or no integer."""
    value: Any = file.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def count_tokens(file: GGUFFile) -> int:
    """Return the number of tokens in a file's tokenizer, 0 when it has none."""
    tokens = file.values.get("tokenizer.ggml.tokens")
    return tokens.count if tokens is not None and tokens.is_array else 0


def name_tokenizer(file: GGUFFile) -> str | None:
    """Return model and pre-tokenizer of a file (`gpt2/qwen2`), None when it has no tokenizer."""
    model = file.get("tokenizer.ggml.model")
    return None if model is None else f"{model}/{file.get('tokenizer.ggml.pre') or 'default'}"


def check_pair(target: TargetInfo, draft: DraftInfo) -> list[str]:
    """Return every reason why the two do not fit together, none when they do.

    Parameters
    ----------
    target, draft
        Both sides, from `read_target` and from a checkpoint or `read_drafter`.

    Returns
    -------
    list of str
        Sentences, one per reason.
    """
    config = draft.config
    reasons = _check_target(target, draft)
    if config.hidden_size != target.hidden_size:
        reasons.append(f"hidden size must be the target's {target.hidden_size}, got {config.hidden_size}")
    if config.vocab_size != target.vocab_size:
        reasons.append(f"vocabulary size must be the target's {target.vocab_size}, got {config.vocab_size}")
    if config.n_target_layers not in (None, target.n_layers):
        reasons.append(f"number of target layers must be {config.n_target_layers}, got {target.n_layers}")
    if config.mask_token_id >= target.vocab_size:
        reasons.append(f"mask token must be below the vocabulary size {target.vocab_size}, got {config.mask_token_id}")
    return reasons + _check_layers(target, config) + _check_tokenizers(target, draft)


def _check_target(target: TargetInfo, draft: DraftInfo) -> list[str]:
    reasons = []
    if target.architecture == DRAFTER_ARCHITECTURE:
        reasons.append("target must be a language model, got a drafter")
    elif target.architecture not in TAPPABLE_ARCHITECTURES:
        names = ", ".join(sorted(TAPPABLE_ARCHITECTURES))
        reasons.append(
            f"architecture of the target must be one that can be tapped ({names}), got {target.architecture}"
        )
    if target.tokenizer is None:
        reasons.append("target must carry a tokenizer, got none")
    if not target.has_embedding and not (draft.has_own_embedding and draft.has_own_output):
        reasons.append("target must carry token_embd for the drafter to borrow, got none")
    return reasons


def _check_layers(target: TargetInfo, config: DrafterConfig) -> list[str]:
    last = target.n_layers - (target.architecture not in LAST_LAYER_ARCHITECTURES)
    bad = [layer - 1 for layer in config.target_layers if layer > last]
    if not bad:
        return []
    return [
        f"layer ids must be at most {last - 1} (of {target.n_layers} layers; llama.cpp taps the input of the layer "
        f"after), got {', '.join(map(str, bad))}"
    ]


def _check_tokenizers(target: TargetInfo, draft: DraftInfo) -> list[str]:
    if draft.file is None or target.tokenizer is None or draft.tokenizer is None:
        return []
    if target.tokenizer != draft.tokenizer:
        return [f"tokenizer must be the target's {target.tokenizer}, got {draft.tokenizer}"]
    n_different = _count_different_tokens(target.file, draft.file)
    if n_different > _MAX_DIFFERENT_TOKENS:
        return [f"tokens must be the target's, got {n_different} different ones"]
    return []


def _count_different_tokens(left: GGUFFile, right: GGUFFile) -> int:
    key = "tokenizer.ggml.tokens"
    if count_tokens(left) != count_tokens(right) or left.encoded(key) == right.encoded(key):
        return 0
    pairs = zip(left.get_strings(key) or (), right.get_strings(key) or (), strict=False)
    return sum(a != b for a, b in pairs)


def list_upstream_limits(config: DrafterConfig) -> list[str]:
    """Return what llama.cpp's own loader refuses in such a drafter (dspark-cpp loads it all the same)."""
    limits = []
    if config.markov_head_type != "vanilla":
        limits.append(f"it knows no {config.markov_head_type} head")
    if config.has_confidence_head and not config.confidence_with_markov:
        limits.append("its confidence head needs the Markov feature")
    return limits
