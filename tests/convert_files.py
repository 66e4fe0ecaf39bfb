"""Tiny random checkpoints and target files for the tests of conversion, made with other libraries than ours."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from dspark_cpp.convert.gguf_file import GGUFFile
from dspark_cpp.convert.gguf_writer import encode_value
from numpy.typing import NDArray
from safetensors.numpy import save_file

Arrays = dict[str, NDArray[Any]]

VOCAB, D_MODEL, D_FF, RANK, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 80, 64, 96, 32, 4, 2, 32, 2
TARGET_LAYERS = 5
TAPS = [-1, 1, 3]

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "block_size": 7,
    "mask_token_id": 79,
    "target_layer_ids": TAPS,
    "num_target_layers": TARGET_LAYERS,
    "markov_rank": RANK,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "use_sliding_window": False,
    "sliding_window": None,
    "layer_types": ["full_attention"] * LAYERS,
}


def make_config(**changes: Any) -> dict[str, Any]:
    """Return the tiny config with some entries changed; None removes one."""
    return {key: value for key, value in (CONFIG | changes).items() if value is not None}


def list_shapes(config: dict[str, Any], embed: bool = False, head: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor, written out from the description of the checkpoint format."""
    c = config
    d, d_ff, v, r = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["markov_rank"]
    n_q, n_kv = (c[name] * c["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    draft_v = config.get("draft_vocab_size") or v
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (d, len(c["target_layer_ids"]) * d), "hidden_norm.weight": (d,)}
    shapes |= {"norm.weight": (d,)}
    shapes |= {"markov_head.markov_w1.weight": (v, r), "markov_head.markov_w2.weight": (draft_v, r)}
    if config["markov_head_type"] == "gated":
        shapes |= {"markov_head.gate_proj.weight": (r, d + r), "markov_head.gate_proj.bias": (r,)}
    if config["markov_head_type"] == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (3 * r, d + 2 * r), "markov_head.joint_proj.bias": (3 * r,)}
    if config["enable_confidence_head"]:
        width = d + r if config["confidence_head_with_markov"] else d
        shapes |= {"confidence_head.proj.weight": (1, width), "confidence_head.proj.bias": (1,)}
    for i in range(c["num_hidden_layers"]):
        prefix = f"layers.{i}."
        shapes |= {prefix + f"{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {prefix + f"self_attn.{name}_norm.weight": (c["head_dim"],) for name in "qk"}
        shapes |= {prefix + "self_attn.q_proj.weight": (n_q, d)}
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (n_kv, d) for name in "kv"}
        shapes |= {prefix + "self_attn.o_proj.weight": (d, n_q)}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (d_ff, d) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (d, d_ff)}
    if embed:
        shapes["embed_tokens.weight"] = (v, d)
    if head:
        shapes["lm_head.weight"] = (draft_v, d)
    return shapes


def make_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Arrays:
    """Return random float32 values that bfloat16 holds exactly, so that every dtype stores the same numbers."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.normal(0.0, 0.5, shape).astype(np.float32)
        tensors[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return tensors


def write_checkpoint(
    path: Path, config: dict[str, Any], tensors: Arrays, dtype: str = "bfloat16", n_shards: int = 1, prefix: str = ""
) -> Path:
    """Write a checkpoint directory."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    names = list(named)
    if n_shards == 1:
        write_safetensors(path / "model.safetensors", named, dtype)
        return path
    weight_map: dict[str, str] = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = {name: named[name] for name in names[i::n_shards]}
        write_safetensors(path / file, part, dtype)
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_safetensors(path: Path, tensors: Arrays, dtype: str) -> None:
    """Write one safetensors file; integer arrays keep their type."""
    if dtype != "bfloat16":
        cast = {name: t if t.dtype.kind == "i" else t.astype(dtype) for name, t in tensors.items()}
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in cast.items()}, path, {"format": "pt"})
        return
    # numpy has no bfloat16, so its files are put together by hand: header length, header, data.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, tensor in tensors.items():
        is_integer = tensor.dtype.kind == "i"
        bits = tensor if is_integer else (tensor.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        span = [len(body), len(body) + bits.nbytes]
        header[name] = {"dtype": "I64" if is_integer else "BF16", "shape": list(tensor.shape), "data_offsets": span}
        body += bits.tobytes()
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_target(
    path: Path,
    architecture: str = "qwen3",
    vocab: int = VOCAB,
    d_model: int = D_MODEL,
    n_layers: int = TARGET_LAYERS,
    tokenizer: str | None = "gpt2",
    is_tied: bool = True,
    tokens: list[str] | None = None,
    tensors: Arrays | None = None,
) -> Path:
    """Write a target's GGUF file with the official writer: tokenizer, sizes, embedding and head."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(n_layers)
    writer.add_embedding_length(d_model)
    writer.add_context_length(512)
    if tokenizer is not None:
        writer.add_tokenizer_model(tokenizer)
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(tokens or [f"tok{i}é" for i in range(vocab)])
        writer.add_token_types([1] * vocab)
        writer.add_token_merges(["a b", "b c"])
        writer.add_eos_token_id(3)
        writer.add_add_bos_token(False)
        writer.add_chat_template("{{ messages[0].content }}")
    rng = np.random.default_rng(7)
    names = ["token_embd.weight"] + ([] if is_tied else ["output.weight"])
    values = {name: rng.normal(0, 1, (vocab, d_model)).astype(np.float32) for name in names} | (tensors or {})
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Read a file with the official reader: keys, and tensors as float32."""
    reader = gguf.GGUFReader(str(path))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors if t.name != "d2t"
    }
    tensors |= {t.name: np.array(t.data) for t in reader.tensors if t.name == "d2t"}
    return keys, tensors


def build_header(values: dict[str, Any] | None = None, tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    """Return a GGUF header put together by hand; a value in bytes is one already encoded."""
    values = {"general.architecture": "qwen3"} if values is None else values
    parts = [b"GGUF", struct.pack("<IQQ", 3, n_tensors, len(values))]
    for key, value in values.items():
        parts += [struct.pack("<Q", len(key)), key.encode()]
        parts.append(value if isinstance(value, bytes) else encode_value(value))
    return b"".join(parts) + tensors


def rewrite_gguf(
    file: Path,
    values: dict[str, Any] | None = None,
    rename: dict[str, str] | None = None,
    vectors: tuple[str, ...] = (),
) -> Path:
    """Write a file again with more (or other) keys, other tensor names, or single rows as vectors."""
    source = GGUFFile(file)
    encoded = {key: source.encoded(key) for key in source.values}
    encoded |= {key: encode_value(value) for key, value in (values or {}).items()}
    infos, data = b"", b""
    for info in source.tensors.values():
        name = (rename or {}).get(info.name, info.name)
        dims = info.shape[::-1][:1] if name in vectors else info.shape[::-1]
        infos += struct.pack("<Q", len(name)) + name.encode()
        infos += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, info.type_id, len(data))
        data += source.tensor_rows(info.name).tobytes()
        data += bytes(-len(data) % 32)
    head = build_header(encoded, infos, len(source.tensors))
    file.write_bytes(head + bytes(-len(head) % 32) + data)
    return file
