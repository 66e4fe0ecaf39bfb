"""Bad input: whatever is wrong with a file, an option or a call is an error with a message; the process survives.

All cases run in one process, on files forged from the bundled pair. The last test checks that the engine still works,
and the cases that once ended the process run again in a child of their own, so that an abort is a failure, not an end.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("dspark_cpp._core")

from convert_files import build_header
from dspark_cpp import (
    ContextFullError,
    DSparkError,
    EngineClosedError,
    ModelLoadError,
    ModelMismatchError,
    QueueFullError,
    _core,
)
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.gguf_writer import encode_value

NAN, INF = float("nan"), float("inf")
F32, I32, I64, Q8_0 = 0, 26, 27, 8  # types of ggml
GREEDY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}

# ---- forging files ----


@dataclass(frozen=True)
class Forged:
    """What is changed in a sound file: keys and tensors (None removes one), then the bytes.

    A tensor is an array, or (dimensions, type) to lie about: ggml's order, the data stays.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    patch: Callable[[bytes], bytes] = bytes


@cache
def read_parts(file: Path) -> tuple[dict[str, bytes], dict[str, tuple[tuple[int, ...], int, bytes]]]:
    source = GGUFFile(file)
    values = {key: source.encoded(key) for key in source.values}
    infos = source.tensors.values()
    return values, {
        info.name: (info.shape[::-1], info.type_id, source.tensor_rows(info.name).tobytes()) for info in infos
    }


def forge(source: Path, destination: Path, forged: Forged) -> Path:
    """Write a file again with changes that no honest writer would make."""
    values, tensors = (dict(part) for part in read_parts(source))
    for key, value in forged.keys.items():
        values[key] = value if isinstance(value, bytes | None) else encode_value(value)
    for name, tensor in forged.tensors.items():
        if isinstance(tensor, np.ndarray):
            tensors[name] = (tensor.shape[::-1], I64 if tensor.dtype.kind == "i" else F32, tensor.tobytes())
        else:
            tensors[name] = tensor and (*tensor, tensors[name][2])
    destination.write_bytes(forged.patch(encode_file(values, tensors)))
    return destination


def encode_file(values: dict[str, bytes], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    values, tensors = ({name: item for name, item in part.items() if item is not None} for part in (values, tensors))
    infos = data = b""
    for name, (dims, type_id, raw) in tensors.items():
        infos += struct.pack("<Q", len(name)) + name.encode()
        infos += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_id, len(data))
        data += raw + bytes(-len(raw) % 32)
    head = build_header(values, infos, len(tensors))
    return head + bytes(-len(head) % 32) + data


def put(offset: int, value: bytes) -> Forged:
    """Overwrite bytes of the header: magic at 0, version at 4, number of tensors at 8, of keys at 16."""
    return Forged(patch=lambda data: data[:offset] + value + data[offset + len(value) :])


def cut(n_bytes: int | float) -> Forged:
    """Keep the first bytes only: a number of them, or a share."""
    return Forged(patch=lambda data: data[: n_bytes if isinstance(n_bytes, int) else int(n_bytes * len(data))])


def strings(*values: str) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(struct.pack("<Q", len(v)) + v.encode() for v in values)


def qwen3(**keys: Any) -> Forged:
    """Change keys of the target's architecture; `__` stands for a dot."""
    return Forged({"qwen3." + name.replace("__", "."): value for name, value in keys.items()})


def dflash(**keys: Any) -> Forged:
    """Change keys of the drafter's architecture."""
    return Forged({"dflash." + name.replace("__", "."): value for name, value in keys.items()})


def rename_keys(architecture: str) -> dict[str, Any]:
    """Make the target claim another architecture, with all of its keys under that name."""
    values, _ = read_parts(DEMO / "target.gguf")
    ours = {key.removeprefix("qwen3"): value for key, value in values.items() if key.startswith("qwen3.")}
    return {"general.architecture": architecture} | {architecture + key: value for key, value in ours.items()}


DEMO = Path(__file__).parents[1] / "python" / "dspark_cpp" / "demo"
HUGE = struct.pack("<Q", 1 << 60)
EMBEDDING = "token_embd.weight"
NORM = np.ones(256, np.float32)


def zeros(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.zeros(shape, np.float32)


# ---- targets ----

TARGETS: dict[str, tuple[Forged, str]] = {
    "empty file": (cut(0), "cannot load .*: failed to read magic|not a GGUF file"),
    "not GGUF": (Forged(patch=lambda data: b"just some text\n" * 100), "invalid magic characters"),
    "magic": (put(0, b"GGUX"), "invalid magic characters: 'GGUX'"),
    "version 0": (put(4, b"\0\0\0\0"), "bad GGUF version: 0"),
    "version 99": (put(4, b"\x63\0\0\0"), "cannot load .*version"),
    "byte order": (put(4, b"\0\0\0\x03"), "cannot load .*version"),
    "cut in the header": (cut(10), "cannot load .*"),
    "cut in the keys": (cut(3000), "cannot load .*"),
    "cut in the tensor list": (cut(0.006), "cannot load .*"),
    "cut in the tensor data": (cut(0.5), "truncated|not within the file|end of the file|data section"),
    "last byte missing": (cut(0.9999), "truncated|not within the file|end of the file|data section"),
    "2^60 keys": (put(16, HUGE), "cannot load .*"),
    "2^60 tensors": (put(8, HUGE), "cannot load .*"),
    "2^60 bytes in a key's name": (put(24, HUGE), "cannot load .*"),
    "string of 2^60 bytes": (Forged({"x": struct.pack("<I", 8) + HUGE}), "cannot load .*"),
    "array of 2^60 items": (Forged({"x": struct.pack("<II", 9, 4) + HUGE}), "cannot load .*"),
    "array of arrays": (Forged({"x": struct.pack("<IIQ", 9, 9, 1)}), "key 'x' has invalid GGUF type 9"),
    "key of unknown type": (Forged({"x": struct.pack("<II", 77, 0)}), "cannot load .*type"),
    "alignment 0": (Forged({"general.alignment": 0}), "alignment 0 is not a power of 2"),
    "alignment 3": (Forged({"general.alignment": 3}), "alignment 3 is not a power of 2"),
    "one file of three": (Forged({"split.count": struct.pack("<IH", 2, 3)}), "split.no"),
    "no architecture": (Forged({"general.architecture": None}), "general.architecture is missing"),
    "architecture is a number": (Forged({"general.architecture": 5}), "general.architecture is missing"),
    "unknown architecture": (Forged({"general.architecture": "foo"}), "unknown architecture 'foo'"),
    "encoder": (Forged(rename_keys("bert")), "cannot load .*bert"),
    "vision encoder": (Forged(rename_keys("clip")), "CLIP cannot be used as main model"),
    "another architecture's keys": (Forged({"general.architecture": "llama"}), "llama.block_count .* got nothing"),
    "block_count 0": (qwen3(block_count=0), "block_count must be an integer in 1 .. 512, got 0"),
    "block_count 100000": (qwen3(block_count=100000), "block_count must be .* got 100000"),
    "block_count is text": (qwen3(block_count="ten"), "block_count must be .* got a value of type str"),
    "block_count missing": (qwen3(block_count=None), "block_count must be .* got nothing"),
    "block_count too large": (qwen3(block_count=11), "blk.10.attn_norm.weight' not found"),
    "block_count too small": (qwen3(block_count=9), "wrong number of tensors"),
    "embedding_length 0": (qwen3(embedding_length=0), "embedding_length must be .* got 0"),
    "embedding_length 2^31": (qwen3(embedding_length=1 << 31), "embedding_length must be .* got 2147483648"),
    "embedding_length of another model": (qwen3(embedding_length=128), "token_embd.weight' has wrong shape"),
    "head_count 0": (qwen3(attention__head_count=0), "attention.head_count must be .* got 0"),
    "head_count 2^31": (qwen3(attention__head_count=1 << 31), "attention.head_count must be .* got 2147483648"),
    "head_count of wrong length": (qwen3(attention__head_count=[4, 4]), "wrong array length; expected 10, got 2"),
    "head_count_kv 0": (qwen3(attention__head_count_kv=0), "attn_k.weight' has wrong shape"),
    "head_count_kv 3": (qwen3(attention__head_count_kv=3), "attn_k.weight' has wrong shape"),
    "key_length 0": (qwen3(attention__key_length=0), "must be an integer|wrong shape"),
    "feed_forward_length 0": (qwen3(feed_forward_length=0), "ffn_gate.weight' has wrong shape"),
    "epsilon NaN": (qwen3(attention__layer_norm_rms_epsilon=NAN), "layer_norm_rms_epsilon must be in 0 .. 1, got nan"),
    "epsilon negative": (qwen3(attention__layer_norm_rms_epsilon=-1.0), "layer_norm_rms_epsilon must be .* got -1"),
    "epsilon missing": (qwen3(attention__layer_norm_rms_epsilon=None), "key not found in model: .*epsilon"),
    "rope dimension 0": (qwen3(rope__dimension_count=0), "cannot make a context for .*n_rot"),
    "rope dimension odd": (qwen3(rope__dimension_count=63), "cannot make a context for .*n_rot"),
    "rope dimension too large": (qwen3(rope__dimension_count=1024), "rope.dimension_count must be .* got 1024"),
    "rope scaling unknown": (qwen3(rope__scaling__type="foo"), "rope_scaling_type_train"),
    "10^6 experts": (qwen3(expert_count=10**6), "n_expert"),
    "experts used of none": (qwen3(expert_used_count=5), "n_expert"),
    "50 extra layers of 10": (qwen3(nextn_predict_layers=50), "n_layer_nextn"),
    "context_length missing": (qwen3(context_length=None), "key not found in model: qwen3.context_length"),
    "tokenizer unknown": (Forged({"tokenizer.ggml.model": "foo"}), "unknown tokenizer: 'foo'"),
    "tokens missing": (Forged({"tokenizer.ggml.tokens": None}), "cannot find tokenizer vocab"),
    "tokens are numbers": (Forged({"tokenizer.ggml.tokens": [1, 2]}), "invalid gguf type for tokenizer.ggml.tokens"),
    "two tokens": (Forged({"tokenizer.ggml.tokens": strings("a", "b")}), "token_embd.weight' has wrong shape"),
    "no vocabulary": (
        Forged({"tokenizer.ggml.model": "no_vocab", "tokenizer.ggml.tokens": None}),
        "the file holds no vocabulary",
    ),
    "token types too few": (Forged({"tokenizer.ggml.token_type": [1, 1]}), "Index out of array bounds for toktypes"),
    "merges are numbers": (Forged({"tokenizer.ggml.merges": [1]}), "invalid gguf type for tokenizer.ggml.merges"),
    "tensor missing": (Forged(tensors={"blk.0.attn_q.weight": None}), "blk.0.attn_q.weight' not found"),
    "tensor too many": (Forged(tensors={"foo.weight": zeros(4)}), "wrong number of tensors"),
    "no tensors": (Forged(tensors=dict.fromkeys(read_parts(DEMO / "target.gguf")[1])), "the file holds no tensors"),
    "tensor transposed": (Forged(tensors={EMBEDDING: ((2048, 256), Q8_0)}), "token_embd.weight' has wrong shape"),
    "2^62 columns": (Forged(tensors={EMBEDDING: ((1 << 62, 4), Q8_0)}), "may cause overflow"),
    "2^80 elements": (Forged(tensors={EMBEDDING: ((1 << 40, 1 << 40), Q8_0)}), "may cause overflow"),
    "negative columns": (Forged(tensors={EMBEDDING: (((1 << 64) - 256, 1), Q8_0)}), "invalid number of elements"),
    "no columns": (Forged(tensors={EMBEDDING: ((0, 4), Q8_0)}), "cannot load .*"),
    "five dimensions": (Forged(tensors={EMBEDDING: ((256, 8, 8, 8, 4), Q8_0)}), "invalid number of dimensions: 5"),
    "type 999": (Forged(tensors={EMBEDDING: ((256, 2048), 999)}), "invalid ggml type 999"),
    "type that is no more": (Forged(tensors={EMBEDDING: ((256, 2048), 4)}), "type 4 .*DEPRECATED"),
    "norm of integers": (
        Forged(tensors={"output_norm.weight": ((256,), I32)}),
        "output_norm.weight must be of a float type, got i32",
    ),
}


@pytest.fixture(scope="module")
def target(demo_target: Path) -> _core.Model:
    return _core.Model.load_target(str(demo_target))


@pytest.fixture(scope="module")
def drafter(demo_drafter: Path, target: _core.Model) -> _core.Model:
    return _core.Model.load_drafter(str(demo_drafter), target)


def generate(target: _core.Model, drafter: _core.Model | None = None, **options: Any) -> _core.Event:
    """Load, prefill and decode a few tokens; return the last event."""
    engine = _core.Engine(target, drafter, n_ctx=64, n_threads=1)
    engine.submit([1, 2, 3], _core.RequestOptions(**GREEDY | options))
    events = []
    while engine.has_work:
        events += engine.step()
    return events[-1]


@pytest.mark.parametrize("name", TARGETS)
def test_bad_target_is_refused(name: str, demo_target: Path, tmp_path: Path) -> None:
    forged, message = TARGETS[name]
    file = forge(demo_target, tmp_path / "bad.gguf", forged)
    with pytest.raises(ModelLoadError, match=message) as error:
        generate(_core.Model.load_target(str(file)))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("weight", ["blk.0.attn_norm.weight", "output_norm.weight"])
def test_nan_weights_are_found_when_asked_for(weight: str, demo_target: Path, tmp_path: Path) -> None:
    file = forge(demo_target, tmp_path / "nan.gguf", Forged(tensors={weight: np.full(256, NAN, np.float32)}))
    with pytest.raises(ModelLoadError, match="invalid data"):
        _core.Model.load_target(str(file), check_tensors=True)
    last = generate(_core.Model.load_target(str(file)))
    assert (last.finish_reason, last.tokens) == ("error", [])
    assert "logits must not hold NaN" in last.error


@pytest.mark.parametrize("rope", [{"rope__freq_base": NAN}, {"rope__freq_base": 0.0}, {"rope__freq_base": -1.0}])
def test_rope_that_yields_nan_ends_the_request(rope: dict[str, Any], demo_target: Path, tmp_path: Path) -> None:
    last = generate(_core.Model.load_target(str(forge(demo_target, tmp_path / "rope.gguf", qwen3(**rope)))))
    assert last.finish_reason == "error"
    assert "logits must not hold NaN" in last.error


@pytest.mark.parametrize("path", ["", "/", "/no/such/file", "/dev/null", "x" * 5000])
def test_bad_path_is_refused(path: str, target: _core.Model) -> None:
    for load in (_core.Model.load_target, lambda path: _core.Model.load_drafter(path, target)):
        with pytest.raises(ModelLoadError, match=f"cannot load {path}: no such file"):
            load(path)


# ---- drafters ----

MISMATCH: dict[str, tuple[Forged, str]] = {
    "block_size missing": (dflash(block_size=None), "dflash.block_size must be in 1 .. 256, got 0"),
    "block_size 0": (dflash(block_size=0), "dflash.block_size must be in 1 .. 256, got 0"),
    "block_size 2^31": (dflash(block_size=1 << 31), "dflash.block_size must be in 1 .. 256"),
    "block_size 257": (dflash(block_size=257), "dflash.block_size must be in 1 .. 256, got 257"),
    "block_size is text": (dflash(block_size="7"), "dflash.block_size must be"),
    "target_layers missing": (dflash(target_layers=None), "dflash.target_layers must name 1 to 64 layers, got 0"),
    "target_layers are text": (dflash(target_layers=strings("1", "2")), "dflash.target_layers must name"),
    "target_layers out of range": (dflash(target_layers=[1, 2, 11]), "must lie in 0 .. 9 for this target, got 11"),
    "target_layers negative": (dflash(target_layers=[-1, 2, 3]), "must lie in 0 .. 9 for this target, got -1"),
    "target_layers too few": (dflash(target_layers=[1, 2]), "tensor fc.weight must have shape"),
    "hidden size": (dflash(embedding_length=512), "hidden sizes must be equal: drafter 512, target 256"),
    "mask token missing": (Forged({"tokenizer.ggml.mask_token_id": None}), "mask_token_id must be in .*, got -1"),
    "mask token out of range": (Forged({"tokenizer.ggml.mask_token_id": 2048}), "mask_token_id must be .*, got 2048"),
    "mask token is text": (Forged({"tokenizer.ggml.mask_token_id": "m"}), "mask_token_id must be"),
    "vocabulary": (Forged({"tokenizer.ggml.tokens": strings("a", "b")}), "vocabularies must be equal: drafter 2, "),
    "gate missing": (dflash(markov_head_type="gated"), "tensor markov_gate.weight is missing"),
    "joint missing": (dflash(markov_head_type="rnn"), "tensor markov_joint.weight is missing"),
    "w1 missing": (Forged(tensors={"markov_w1.weight": None}), "tensor markov_w1.weight is missing"),
    "w2 missing": (Forged(tensors={"markov_w2.weight": None}), "tensor markov_w2.weight is missing"),
    "fc missing": (Forged(tensors={"fc.weight": None}), "tensor fc.weight is missing"),
    "fc shape": (Forged(tensors={"fc.weight": zeros(256, 512)}), r"must have shape \[768, 256\], got \[512, 256\]"),
    "w1 shape": (Forged(tensors={"markov_w1.weight": zeros(2047, 64)}), "tensor markov_w1.weight must have shape"),
    "w1 of three dimensions": (Forged(tensors={"markov_w1.weight": zeros(2, 1024, 64)}), "markov_w1.weight must have"),
    "w2 shape": (Forged(tensors={"markov_w2.weight": zeros(2048, 32)}), "tensor markov_w2.weight must have shape"),
    "w2 scale": (Forged(tensors={"markov_w2.scale": zeros(1)}), "scaled markov_w2 is not supported"),
    "confidence shape": (Forged(tensors={"conf_proj.weight": zeros(1, 319)}), "tensor conf_proj.weight must have"),
    "confidence bias shape": (Forged(tensors={"conf_proj.bias": zeros(3)}), "tensor conf_proj.bias must have shape"),
    "confidence without its feature": (dflash(confidence_with_markov=False), "tensor conf_proj.weight must have"),
    "embedding shape": (Forged(tensors={EMBEDDING: zeros(2048, 128)}), "tensor token_embd.weight must have shape"),
    "output shape": (Forged(tensors={"output.weight": zeros(100, 256)}), "tensor output.weight must have shape"),
    "d2t without output": (Forged(tensors={"d2t": np.arange(100)}), "a reduced draft vocabulary needs its own output"),
    "another method": (Forged(tensors={"selector_hidden.weight": zeros(4, 4)}), "selector drafters are not supported"),
    "another model's": (dflash(hyper_connection_count=4), "DeepSeek-V4 drafters are not supported"),
}


def reduced(d2t: Any) -> Forged:
    """A draft vocabulary of as many tokens as d2t has entries."""
    n = len(d2t)
    return Forged(tensors={"d2t": d2t, "output.weight": zeros(n, 256), "markov_w2.weight": zeros(n, 64)})


DRAFTERS: dict[str, tuple[Forged, str]] = {
    "head type unknown": (dflash(markov_head_type="foo"), "dflash.markov_head_type must be vanilla, gated or rnn, got"),
    "d2t twice the same": (reduced(np.zeros(100, np.int64)), "d2t must hold distinct ids below 2048, got 0"),
    "d2t out of range": (reduced(np.arange(100) + 2000), "d2t must hold distinct ids below 2048, got 2048"),
    "d2t negative": (reduced(np.arange(100) - 2), "d2t must hold distinct ids below 2048, got -2"),
    "d2t of floats": (reduced(zeros(100)), "d2t must be of type i64, got f32"),
    "w1 of integers": (Forged(tensors={"markov_w1.weight": np.zeros((2048, 64), np.int64)}), "i64 cannot be decoded"),
    "softcap NaN": (dflash(final_logit_softcapping=NAN), "logit_softcap must be finite and at least 0, got nan"),
    "block_count too large": (dflash(block_count=3), "blk.2.attn_norm.weight' not found"),
    "block_count too small": (dflash(block_count=1), "wrong number of tensors"),
    "head_count 0": (dflash(attention__head_count=0), "attention.head_count must be .* got 0"),
    "head_count_kv 0": (dflash(attention__head_count_kv=0), "attn_k.weight' has wrong shape"),
    "key_length 0": (dflash(attention__key_length=0), "must be an integer|wrong shape"),
    "epsilon NaN": (dflash(attention__layer_norm_rms_epsilon=NAN), "layer_norm_rms_epsilon must be"),
    "rope dimension too large": (dflash(rope__dimension_count=1024), "rope.dimension_count must be .* got 1024"),
    "window without pattern": (dflash(attention__sliding_window=4), "sliding_window_pattern"),
    "experts used of none": (dflash(expert_used_count=3), "n_expert"),
    "causal is text": (dflash(attention__causal="x"), "wrong type str but expected type bool"),
    "tokens missing": (Forged({"tokenizer.ggml.tokens": None}), "cannot find tokenizer vocab"),
    "tensor missing": (Forged(tensors={"blk.0.attn_q.weight": None}), "blk.0.attn_q.weight' not found"),
    "cut in the tensor data": (cut(0.5), "truncated|not within the file|end of the file|data section"),
    "2^60 tensors": (put(8, HUGE), "cannot load .*"),
}


@pytest.mark.parametrize(
    ("name", "error"), [(n, ModelMismatchError) for n in MISMATCH] + [(n, ModelLoadError) for n in DRAFTERS]
)
def test_bad_drafter_is_refused(
    name: str, error: type[DSparkError], target: _core.Model, demo_drafter: Path, tmp_path: Path
) -> None:
    forged, message = (MISMATCH if error is ModelMismatchError else DRAFTERS)[name]
    file = forge(demo_drafter, tmp_path / "bad.gguf", forged)
    with pytest.raises(error, match=message) as caught:
        generate(target, _core.Model.load_drafter(str(file), target))
    assert str(file) in str(caught.value)
    assert str(caught.value).count("cannot load") < 2


def test_every_reason_is_named_at_once(target: _core.Model, demo_drafter: Path, tmp_path: Path) -> None:
    forged = Forged({"dflash.block_size": 0, "tokenizer.ggml.mask_token_id": 9999}, {"fc.weight": zeros(256, 512)})
    file = forge(demo_drafter, tmp_path / "bad.gguf", forged)
    with pytest.raises(ModelMismatchError, match=r"block_size .*; .*mask_token_id .*; .*fc\.weight"):
        _core.Model.load_drafter(str(file), target)


def test_roles_cannot_be_swapped(
    target: _core.Model, drafter: _core.Model, demo_target: Path, demo_drafter: Path
) -> None:
    with pytest.raises(ModelLoadError, match="as a target: it is a drafter"):
        _core.Model.load_target(str(demo_drafter))
    with pytest.raises(ModelLoadError, match="as a drafter: its architecture must be dflash, got qwen3"):
        _core.Model.load_drafter(str(demo_target), target)
    with pytest.raises(ModelMismatchError, match="it is a drafter itself"):
        _core.Model.load_drafter(str(demo_drafter), drafter)
    with pytest.raises(ValueError, match="target must be a target model, got the drafter"):
        _core.Engine(drafter, target)
    with pytest.raises(ValueError, match="drafter must be a drafter model, got the target"):
        _core.Engine(target, target)


def test_confidence_feature_is_read_off_the_width(target: _core.Model, demo_drafter: Path, tmp_path: Path) -> None:
    """Upstream's converter writes no key for it."""
    no_key = {"dflash.confidence_with_markov": None}
    for n_inputs, with_markov in ((256 + 64, True), (256, False)):
        forged = Forged(no_key, {"conf_proj.weight": zeros(1, n_inputs)})
        model = _core.Model.load_drafter(str(forge(demo_drafter, tmp_path / f"{n_inputs}.gguf", forged)), target)
        assert model.drafter_info.has_confidence
        assert model.drafter_info.confidence_with_markov is with_markov
        assert generate(target, model).finish_reason == "length"


# A drafter may be bad at its work; the text is the target's all the same.
LOADABLE: dict[str, Forged] = {
    "block_size 1": dflash(block_size=1),
    "block_size 256": dflash(block_size=256),
    "layers tapped twice": dflash(target_layers=[2, 2, 2]),
    "causal": dflash(attention__causal=True),
    "anchor predicts nothing": dflash(sample_from_anchor=False),
    "no confidence": Forged(tensors={"conf_proj.weight": None, "conf_proj.bias": None}),
    "no head": Forged(tensors={f"{name}.weight": None for name in ("markov_w1", "markov_w2", "conf_proj")}),
    "own embedding": Forged(tensors={EMBEDDING: zeros(2048, 256)}),
    "own output": Forged(tensors={"output.weight": zeros(2048, 256)}),
    "reduced vocabulary": reduced(np.arange(100) * 7),
    "context_length 0": dflash(context_length=0),
    "NaN confidence": Forged(tensors={"conf_proj.weight": np.full((1, 320), NAN, np.float32)}),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_odd_drafter_leaves_the_text_alone(name: str, target: _core.Model, demo_drafter: Path, tmp_path: Path) -> None:
    model = _core.Model.load_drafter(str(forge(demo_drafter, tmp_path / "odd.gguf", LOADABLE[name])), target)
    with_drafter, plain = generate(target, model), generate(target)
    assert (with_drafter.finish_reason, with_drafter.error) == (plain.finish_reason, "")
    assert with_drafter.stats is not None
    assert with_drafter.stats.n_drafted > 0


# ---- options ----

ENGINE: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n_ctx": -1}, ValueError, "n_ctx must be 0 or in 2 .. 16777216, got -1"),
    ({"n_ctx": 1}, ValueError, "n_ctx must be .* got 1"),
    ({"n_ctx": (1 << 24) + 1}, ValueError, "n_ctx must be .* got 16777217"),
    ({"n_ctx": 1 << 24, "n_parallel": 256}, ValueError, r"n_ctx \* n_parallel must be at most 2\^30 cells, got"),
    ({"n_ctx": 1 << 24, "n_parallel": 64}, ValueError, "must leave the KV cache within the memory of all devices"),
    ({"n_ctx": 1 << 40}, TypeError, "incompatible constructor arguments"),
    ({"n_ctx": "x"}, TypeError, "incompatible constructor arguments"),
    ({"n_ctx": 1.5}, TypeError, "incompatible constructor arguments"),
    ({"n_ctx": None}, TypeError, "incompatible constructor arguments"),
    ({"n_parallel": 0}, ValueError, "n_parallel must be in 1 .. 256, got 0"),
    ({"n_parallel": 257}, ValueError, "n_parallel must be .* got 257"),
    ({"n_batch": 0}, ValueError, "n_batch must be in 1 .. 16384, got 0"),
    ({"n_batch": 1 << 20}, ValueError, "n_batch must be .* got 1048576"),
    ({"n_threads": -1}, ValueError, "n_threads must be in 0 .. 512, got -1"),
    ({"n_threads_batch": 513}, ValueError, "n_threads_batch must be in 0 .. 512, got 513"),
    ({"kv_type": "f8"}, ValueError, "kv_type must be one of .*, got f8"),
    ({"kv_type": ""}, ValueError, "kv_type must be"),
    ({"kv_type": "q8_0", "flash_attention": False}, ValueError, "kv_type must be .* without flash_attention, got q8_0"),
    ({"head": "both"}, ValueError, "head must be candidates, full or graph, got both"),
    ({"n_candidates": 0}, ValueError, "n_candidates must be at least 1, got 0"),
    ({"policy": "fixed:-2"}, ValueError, "policy must be .* got .fixed:-2."),
    ({"policy": "threshold:2"}, ValueError, "policy must be .* got .threshold:2."),
    ({"policy": ""}, ValueError, "policy must be .* got .."),
    ({"objective": "speed"}, ValueError, "objective must be throughput or latency, got speed"),
    ({"calibration": [("exact", 0.0, [1.0], [], [], [])]}, ValueError, "calibration sts must hold block_size"),
    ({"draft_window": 0}, ValueError, "draft_window must be at least 1, got 0"),
    ({"max_queue": 0}, ValueError, "max_queue must be at least 1, got 0"),
    ({"draft": 3}, TypeError, "incompatible constructor arguments"),
]


@pytest.mark.parametrize(("options", "error", "message"), ENGINE, ids=[str(options) for options, _, _ in ENGINE])
def test_bad_engine_option_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, target: _core.Model, drafter: _core.Model
) -> None:
    with pytest.raises(error, match=message):
        _core.Engine(target, drafter, **{"n_ctx": 64} | options)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_every_cache_type_works_by_default(kv_type: str, target: _core.Model, drafter: _core.Model) -> None:
    engine = _core.Engine(target, drafter, n_ctx=64, kv_type=kv_type)
    engine.submit([1, 2, 3], _core.RequestOptions(**GREEDY))
    assert [event.error for event in engine.step()] == [""]


REQUEST: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
    ({"max_tokens": -1}, ValueError, "max_tokens must be at least 1, got -1"),
    ({"temperature": NAN}, ValueError, "temperature must be finite and at least 0, got nan"),
    ({"temperature": INF}, ValueError, "temperature must be .* got inf"),
    ({"temperature": -1}, ValueError, "temperature must be .* got -1"),
    ({"top_k": -1}, ValueError, "top_k must be .* got -1"),
    ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
    ({"top_p": 1.5}, ValueError, "top_p must be .* got 1.5"),
    ({"top_p": NAN}, ValueError, "top_p must be .* got nan"),
    ({"min_p": -0.1}, ValueError, "min_p must be between 0 and 1, got -0.1"),
    ({"min_p": NAN}, ValueError, "min_p must be .* got nan"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be finite and above 0, got 0"),
    ({"repetition_penalty": INF}, ValueError, "repetition_penalty must be .* got inf"),
    ({"presence_penalty": 3}, ValueError, "presence_penalty must be between -2 and 2, got 3"),
    ({"presence_penalty": NAN}, ValueError, "presence_penalty must be .* got nan"),
    ({"frequency_penalty": -3}, ValueError, "frequency_penalty must be .* got -3"),
    ({"penalty_window": -2}, ValueError, r"penalty_window must be -1 \(all\) or more, got -2"),
    ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias token must be at least 0, got -1"),
    ({"logit_bias": {0: NAN}}, ValueError, "logit_bias value must be finite, got nan"),
    ({"logit_bias": {0: -INF}}, ValueError, "logit_bias value must be finite, got -inf"),
    ({"logit_bias": [1]}, TypeError, "incompatible constructor arguments"),
    ({"verification": "trust"}, ValueError, "verification must be auto, exact, rejection or block, got trust"),
    ({"draft_limit": -2}, ValueError, "draft_limit must be -1 or more, got -2"),
    ({"n_logprobs": -2}, ValueError, "n_logprobs must be between -1 and 1000, got -2"),
    ({"n_logprobs": 1001}, ValueError, "n_logprobs must be .* got 1001"),
    ({"seed": -1}, TypeError, "incompatible constructor arguments"),
    ({"seed": 1 << 64}, TypeError, "incompatible constructor arguments"),
    ({"temperature": "hot"}, TypeError, "incompatible constructor arguments"),
    ({"stop": ["x"]}, TypeError, "incompatible constructor arguments"),
]


@pytest.mark.parametrize(("options", "error", "message"), REQUEST, ids=[str(options) for options, _, _ in REQUEST])
def test_bad_request_option_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _core.RequestOptions(**options)


# ---- calls ----

SUBMIT: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "prompt must hold at least 1 token, got 0"),
    ([-1], {}, ValueError, r"prompt tokens must be in \[0, 2048\), got -1"),
    ([1, 2048], {}, ValueError, r"prompt tokens must be in \[0, 2048\), got 2048"),
    ([1] * 64, {}, ContextFullError, "prompt must leave room for one token in n_ctx = 64, got 64 tokens"),
    ([1] * 100_000, {}, ContextFullError, "prompt must leave room .* got 100000 tokens"),
    ([1], {"logit_bias": {2048: 1.0}}, ValueError, r"logit_bias tokens must be in \[0, 2048\), got 2048"),
    ("text", {}, TypeError, "incompatible function arguments"),
    ([1.5], {}, TypeError, "incompatible function arguments"),
    ([1 << 40], {}, TypeError, "incompatible function arguments"),
    (None, {}, TypeError, "incompatible function arguments"),
]


@pytest.fixture
def engine(target: _core.Model, drafter: _core.Model) -> _core.Engine:
    return _core.Engine(target, drafter, n_ctx=64, n_threads=1, max_queue=2)


@pytest.mark.parametrize(("prompt", "options", "error", "message"), SUBMIT)
def test_bad_prompt_is_refused(
    prompt: Any, options: dict[str, Any], error: type[Exception], message: str, engine: _core.Engine
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(prompt, _core.RequestOptions(**options))
    assert not engine.has_work


def test_full_queue_refuses_and_recovers(engine: _core.Engine) -> None:
    options = _core.RequestOptions(**GREEDY)
    for _ in range(2):
        engine.submit([1], options)
    with pytest.raises(QueueFullError, match="max_queue = 2 requests are waiting"):
        engine.submit([1], options)
    engine.step()
    engine.submit([1], options)


def test_closed_engine_says_so(engine: _core.Engine) -> None:
    request = engine.submit([1], _core.RequestOptions(**GREEDY))
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError, match="cannot submit a request: the engine is closed"):
        engine.submit([1], _core.RequestOptions())
    with pytest.raises(EngineClosedError, match="cannot step: the engine is closed"):
        engine.step()
    assert engine.closed
    assert not engine.has_work
    assert not engine.cancel(request)
    assert engine.cache_positions() == []
    assert (engine.n_running, engine.n_queued) == (0, 0)


def test_unknown_request_cannot_be_cancelled(engine: _core.Engine) -> None:
    assert not engine.cancel(99)
    with pytest.raises(TypeError):
        engine.cancel(-1)
    with pytest.raises(TypeError):
        engine.cancel("1")  # type: ignore[arg-type]


def test_step_belongs_to_one_thread(target: _core.Model) -> None:
    """Many steppers at once: each either steps or is told so, and the text comes out whole."""
    engine = _core.Engine(target, n_ctx=512, n_threads=1)
    engine.submit([1, 2, 3], _core.RequestOptions(max_tokens=200, temperature=0, ignore_eos=True))
    tokens: list[int] = []
    refusals: list[str] = []

    def step_on() -> None:
        while engine.has_work:
            try:
                for event in engine.step():
                    tokens.extend(event.tokens)
            except DSparkError as error:
                refusals.append(str(error))

    threads = [threading.Thread(target=step_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 200
    assert set(refusals) == {"step must be called by one thread at a time"}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda target: _core.Engine(None), TypeError, "incompatible"),
        (lambda target: _core.Engine("target"), TypeError, "incompatible"),
        (lambda target: _core.Model.load_drafter("x", None), TypeError, "incompatible"),
        (lambda target: _core.Model.load_target(None), TypeError, "incompatible"),
        (lambda target: _core.Model(), TypeError, "No constructor defined"),
        (lambda target: target.drafter_info, ValueError, "drafter_info needs a drafter"),
        (lambda target: target.token_to_piece(2048), ValueError, r"token must be in \[0, 2048\), got 2048"),
        (lambda target: target.detokenize([-1]), ValueError, r"token must be in \[0, 2048\), got -1"),
        (lambda target: target.tokenize(5), TypeError, "incompatible"),
        (lambda target: target.tokenize("\udc80"), TypeError, "incompatible"),
        (lambda target: target.apply_chat_template("{"), ValueError, "cannot apply the chat template"),
        (lambda target: target.apply_chat_template("[5]"), ValueError, "cannot apply the chat template"),
        (
            lambda target: target.apply_chat_template("[]", template_override="{% if %}"),
            ValueError,
            "cannot apply the chat template",
        ),
        (lambda target: _core.set_log_level(9), ValueError, "log level must be in 0 .. 4, got 9"),
        (lambda target: _core.quantize_model(target.path, "x.gguf", "q9", []), ValueError, "type_name must be"),
        (lambda target: _core.quantize_model(target.path, target.path, "q8_0", []), ValueError, "destination must be"),
        (lambda target: _core.quantize_model("/no/file", "x.gguf", "q8_0", []), ModelLoadError, "cannot load /no/file"),
        (lambda target: _core.quantize_model(target.path, "/no/x", "q8_0", []), ModelLoadError, "cannot quantize"),
    ],
)
def test_bad_call_is_refused(call: Callable[[_core.Model], Any], error: Any, message: str, target: _core.Model) -> None:
    with pytest.raises(error, match=message):
        call(target)


# ---- the process ----

# These once ended it: failed assertions of ggml on the way to a context, in the first decode, and a null pointer.
DEADLY = ["epsilon NaN", "epsilon negative", "rope dimension odd", "rope scaling unknown", "10^6 experts"]
DEADLY += ["experts used of none", "50 extra layers of 10", "norm of integers"]
CHILD = """
import json, sys
from dspark_cpp import DSparkError, _core
for path in json.loads(sys.argv[1]):
    try:
        engine = _core.Engine(_core.Model.load_target(path), n_ctx=64, n_threads=1)
        engine.submit([1, 2, 3], _core.RequestOptions(max_tokens=4))
        print([event.finish_reason for event in engine.step()])
    except DSparkError as error:
        print(type(error).__name__)
try:
    _core.Engine(None)
except TypeError:
    print("TypeError")
"""


def test_nothing_aborts_the_process(demo_target: Path, tmp_path: Path) -> None:
    files = [str(forge(demo_target, tmp_path / f"{i}.gguf", TARGETS[n][0])) for i, n in enumerate(DEADLY)]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(files)], capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == ["ModelLoadError"] * len(DEADLY) + ["TypeError"]


def test_engine_works_after_all_of_this(target: _core.Model, drafter: _core.Model) -> None:
    last = generate(target, drafter)
    assert (last.finish_reason, last.error) == ("length", "")
