"""Files of the demo pair: the target as GGUF (Q8_0), the drafters as DeepSpec checkpoints, the prompts."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from demo_text import DOMAINS, render_prompt, sample_held_out
from safetensors.torch import save_file
from tokenizers import Tokenizer

from tests.reference.dspark_torch import DrafterConfig, TransformerConfig, Weights

from .tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, vocabulary_and_merges

MAX_POSITIONS = 2048
GLOBAL_NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """Hugging Face name of a target tensor -> its GGUF name."""
    if name in GLOBAL_NAMES:
        return GLOBAL_NAMES[name]
    _, index, rest = name.split(".", 2)
    return f"blk.{index}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def write_tokenizer_keys(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Add the tokenizer and the chat template."""
    tokens, merges = vocabulary_and_merges(tokenizer)
    types = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_mask_token_id(tokens.index("<|mask|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_target(path: Path, weights: Weights, c: TransformerConfig, tokenizer: Tokenizer) -> None:
    """Write the target as a qwen3 GGUF: matrices Q8_0, norms f32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3")
    writer.add_name("dspark-cpp demo target")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    write_tokenizer_keys(writer, tokenizer)
    for name, weight in weights.items():
        data = weight.float().cpu().numpy()
        if data.ndim == 1:
            writer.add_tensor(gguf_name(name), data)
        else:
            quantized = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def read_target(path: Path) -> tuple[Weights, TransformerConfig]:
    """Read the target back from GGUF, dequantized to float32."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(f"qwen3.{key}")
        if field is None:
            raise ValueError(f"cannot read target: {path} has no key qwen3.{key}")
        return field.contents()

    c = TransformerConfig(
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        n_layers=value("block_count"),
        n_heads=value("attention.head_count"),
        n_kv_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        vocab_size=value("vocab_size"),
        rope_theta=value("rope.freq_base"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
    )
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = [*GLOBAL_NAMES, *(f"layers.{i}.{name}.weight" for i in range(c.n_layers) for name in LAYER_NAMES)]
    weights = {
        n: torch.from_numpy(np.array(stored[gguf_name(n)], dtype=np.float32)) for n in names if gguf_name(n) in stored
    }
    return weights, c


def drafter_json(c: DrafterConfig, target: TransformerConfig, n_anchors: int) -> dict[str, Any]:
    """Build the flat DeepSpec configuration."""
    t = c.layers
    return {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": c.block_size,
        "confidence_head_with_markov": c.confidence_with_markov,
        "enable_confidence_head": c.has_confidence,
        "head_dim": t.head_dim,
        "hidden_act": "silu",
        "hidden_size": t.hidden_size,
        "intermediate_size": t.intermediate_size,
        "layer_types": ["full_attention"] * t.n_layers,
        "markov_head_type": c.markov_head_type,
        "markov_rank": c.markov_rank,
        "mask_token_id": c.mask_token_id,
        "max_position_embeddings": MAX_POSITIONS,
        "num_anchors": n_anchors,
        "num_attention_heads": t.n_heads,
        "num_hidden_layers": t.n_layers,
        "num_key_value_heads": t.n_kv_heads,
        "num_target_layers": target.n_layers,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_parameters": {"rope_theta": t.rope_theta, "rope_type": "default"},
        "rope_theta": t.rope_theta,
        "target_layer_ids": list(c.target_layer_ids),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": t.vocab_size,
    }


def write_drafter(
    directory: Path, weights: Weights, c: DrafterConfig, target: TransformerConfig, n_anchors: int
) -> None:
    """Write config.json and model.safetensors (bfloat16)."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: w.bfloat16().contiguous().cpu() for name, w in weights.items()}
    save_file(tensors, directory / "model.partial", metadata={"format": "pt"})
    (directory / "model.partial").chmod(0o644)
    os.replace(directory / "model.partial", directory / "model.safetensors")
    write_json(directory / "config.json", drafter_json(c, target, n_anchors))


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def write_prompts(path: Path, n_per_domain: int, n_raw: int, seed: int) -> None:
    """Write held-out prompts as chat messages and as rendered text, and a few bare beginnings of answers."""
    rng = random.Random(seed)
    prompts, raw = [], []
    for domain in DOMAINS:
        for dialogue in sample_held_out(rng, domain, n_per_domain):
            messages = [{"role": "user", "content": dialogue.question}]
            prompts.append({"domain": domain, "messages": messages, "text": render_prompt(dialogue.question)})
        for dialogue in sample_held_out(rng, domain, n_raw):
            words = dialogue.answer.split(" ")
            raw.append({"domain": domain, "text": " ".join(words[: max(4, len(words) // 6)])})
    write_json(path, {"seed": seed, "prompts": prompts, "raw": raw})
