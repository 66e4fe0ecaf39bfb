"""Tiny random-weight targets with recurrent layers, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_VOCAB = 320
WIDTH, N_FF, N_HEADS, HEAD_DIM = 64, 128, 4, 16
RECURRENT = (True, True, False, True, True, False)  # per layer

Add = Callable[..., None]


def write_hybrid_target(path: Path, architecture: str, seed: int = 0, window: int = 0) -> Path:
    """Write a target of one of the architectures in `LAYERS`; `window`: of its attention layers, lfm2 only."""
    writer = gguf.GGUFWriter(path, arch=architecture)
    random = np.random.default_rng(seed)

    def add(name: str, *shape: int, std: float | None = None) -> None:
        values = random.standard_normal(shape) * (shape[-1] ** -0.5 if std is None else std)
        if name.endswith("ssm_a"):
            values = -np.abs(values)  # states decay; else the cost measurement's passes overflow them
        is_norm = "norm" in name
        writer.add_tensor(name, (np.ones(shape) + 0.1 * values if is_norm else values).astype(np.float32))

    _add_tokenizer(writer)
    writer.add_block_count(len(RECURRENT))
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_head_count(N_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    if window:
        writer.add_sliding_window(window)
    add("token_embd.weight", N_VOCAB, WIDTH, std=1.0)
    # As peaked as a language model's, so that the best token lies clear of the second; tied to the embedding it would
    # only repeat itself.
    add("output.weight", N_VOCAB, WIDTH, std=0.5)
    LAYERS[architecture](writer, add)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any) -> None:
    tokens = [chr(0x100 + i) for i in range(N_VOCAB - 1)] + ["<|end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (N_VOCAB - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["\u0100 \u0101"])
    writer.add_eos_token_id(N_VOCAB - 1)


def _add_ffn(add: Add, prefix: str) -> None:
    add(f"{prefix}.ffn_gate.weight", N_FF, WIDTH)
    add(f"{prefix}.ffn_up.weight", N_FF, WIDTH)
    add(f"{prefix}.ffn_down.weight", WIDTH, N_FF)


def _add_attention(add: Add, prefix: str, n_kv_heads: int, n_query_parts: int = 1) -> None:
    add(f"{prefix}.attn_q.weight", n_query_parts * N_HEADS * HEAD_DIM, WIDTH)
    add(f"{prefix}.attn_k.weight", n_kv_heads * HEAD_DIM, WIDTH)
    add(f"{prefix}.attn_v.weight", n_kv_heads * HEAD_DIM, WIDTH)
    add(f"{prefix}.attn_output.weight", WIDTH, N_HEADS * HEAD_DIM)


def _add_head_norms(add: Add, prefix: str) -> None:
    add(f"{prefix}.attn_q_norm.weight", HEAD_DIM)
    add(f"{prefix}.attn_k_norm.weight", HEAD_DIM)


def _lfm2(writer: Any, add: Add) -> None:
    n_kv_heads = 2
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count_kv([0 if is_recurrent else n_kv_heads for is_recurrent in RECURRENT])
    writer.add_shortconv_l_cache(3)
    add("token_embd_norm.weight", WIDTH)
    for i, is_recurrent in enumerate(RECURRENT):
        prefix = f"blk.{i}"
        add(f"{prefix}.attn_norm.weight", WIDTH)
        add(f"{prefix}.ffn_norm.weight", WIDTH)
        _add_ffn(add, prefix)
        if is_recurrent:
            add(f"{prefix}.shortconv.conv.weight", WIDTH, 3)
            add(f"{prefix}.shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            add(f"{prefix}.shortconv.out_proj.weight", WIDTH, WIDTH)
        else:
            _add_attention(add, prefix, n_kv_heads)
            _add_head_norms(add, prefix)


def _add_ssm_keys(writer: Any, state: int, n_heads: int, n_groups: int) -> None:
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(state * n_heads)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(n_heads)
    writer.add_ssm_group_count(n_groups)


def _delta_net(writer: Any, add: Add, name: str) -> None:
    state, n_v_heads, n_k_heads, n_kv_heads = 16, 4, 2, 2
    key, value = state * n_k_heads, state * n_v_heads
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_uint32(f"{name}.full_attention_interval", 3)
    _add_ssm_keys(writer, state, n_v_heads, n_k_heads)
    add("output_norm.weight", WIDTH)
    for i, is_recurrent in enumerate(RECURRENT):
        prefix = f"blk.{i}"
        add(f"{prefix}.attn_norm.weight", WIDTH)
        add(f"{prefix}.post_attention_norm.weight", WIDTH)
        if is_recurrent:
            add(f"{prefix}.attn_qkv.weight", 2 * key + value, WIDTH)
            add(f"{prefix}.attn_gate.weight", value, WIDTH)
            add(f"{prefix}.ssm_conv1d.weight", 2 * key + value, 4)
            add(f"{prefix}.ssm_dt.bias", n_v_heads)
            add(f"{prefix}.ssm_a", n_v_heads, std=0.5)
            add(f"{prefix}.ssm_norm.weight", state)
            add(f"{prefix}.ssm_out.weight", WIDTH, value)
        else:
            _add_attention(add, prefix, n_kv_heads, n_query_parts=2)  # queries and their gate
            _add_head_norms(add, prefix)


def _qwen35(writer: Any, add: Add) -> None:
    """Gated delta net."""
    _delta_net(writer, add, "qwen35")
    writer.add_rope_dimension_sections([4, 2, 2, 0])
    for i, is_recurrent in enumerate(RECURRENT):
        _add_ffn(add, f"blk.{i}")
        if is_recurrent:
            add(f"blk.{i}.ssm_beta.weight", 4, WIDTH)
            add(f"blk.{i}.ssm_alpha.weight", 4, WIDTH)


def _qwen3next(writer: Any, add: Add) -> None:
    """Gated delta net and experts: llama.cpp keeps no older states of it."""
    n_experts, n_expert_ff = 4, 32
    _delta_net(writer, add, "qwen3next")
    writer.add_expert_count(n_experts)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(n_expert_ff)
    writer.add_expert_shared_feed_forward_length(n_expert_ff)
    for i, is_recurrent in enumerate(RECURRENT):
        prefix = f"blk.{i}"
        add(f"{prefix}.ffn_gate_inp.weight", n_experts, WIDTH)
        add(f"{prefix}.ffn_gate_inp_shexp.weight", WIDTH)
        for name in ("gate", "up"):
            add(f"{prefix}.ffn_{name}_exps.weight", n_experts, n_expert_ff, WIDTH)
            add(f"{prefix}.ffn_{name}_shexp.weight", n_expert_ff, WIDTH)
        add(f"{prefix}.ffn_down_exps.weight", n_experts, WIDTH, n_expert_ff)
        add(f"{prefix}.ffn_down_shexp.weight", WIDTH, n_expert_ff)
        if is_recurrent:
            add(f"{prefix}.ssm_ba.weight", 8, WIDTH)


def _nemotron_h(writer: Any, add: Add) -> None:
    """Mamba 2; a layer is a mixer, an attention or a feed-forward one."""
    state, n_heads, n_groups, n_kv_heads = 16, 8, 2, 2
    inner = state * n_heads
    is_ffn = [i % 3 == 1 for i in range(len(RECURRENT))]
    is_recurrent = [a and not b for a, b in zip(RECURRENT, is_ffn, strict=True)]
    writer.add_feed_forward_length([N_FF if ffn else 0 for ffn in is_ffn])
    writer.add_head_count_kv(
        [0 if ffn or mixer else n_kv_heads for ffn, mixer in zip(is_ffn, is_recurrent, strict=True)]
    )
    writer.add_layer_norm_eps(1e-5)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    _add_ssm_keys(writer, state, n_heads, n_groups)
    add("output_norm.weight", WIDTH)
    conv = inner + 2 * n_groups * state
    for i, (ffn, mixer) in enumerate(zip(is_ffn, is_recurrent, strict=True)):
        prefix = f"blk.{i}"
        add(f"{prefix}.attn_norm.weight", WIDTH)
        if mixer:
            add(f"{prefix}.ssm_in.weight", inner + conv + n_heads, WIDTH)
            add(f"{prefix}.ssm_conv1d.weight", conv, 4)
            add(f"{prefix}.ssm_conv1d.bias", conv)
            add(f"{prefix}.ssm_dt.bias", n_heads)
            add(f"{prefix}.ssm_a", n_heads, 1, std=0.5)
            add(f"{prefix}.ssm_d", n_heads, 1)
            add(f"{prefix}.ssm_norm.weight", n_groups, inner // n_groups)
            add(f"{prefix}.ssm_out.weight", WIDTH, inner)
        elif ffn:
            add(f"{prefix}.ffn_up.weight", N_FF, WIDTH)
            add(f"{prefix}.ffn_down.weight", WIDTH, N_FF)
        else:
            _add_attention(add, prefix, n_kv_heads)


LAYERS: dict[str, Callable[[Any, Add], None]] = {
    "lfm2": _lfm2,
    "qwen35": _qwen35,
    "nemotron_h": _nemotron_h,
    "qwen3next": _qwen3next,
}
