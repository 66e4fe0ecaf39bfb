"""Train the target on packed documents and sample from it."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from demo_text import DOMAINS, sample_document
from tokenizers import Tokenizer
from torch import Tensor

from tests.reference.dspark_torch import KvCache, TransformerConfig, Weights, target_hidden_states, target_logits

from . import parallel
from .optimizer import PairedOptimizer

DOMAIN_WEIGHTS = {"arithmetic": 0.40, "code": 0.25, "chat": 0.35}


def layer_shapes(c: TransformerConfig, layer: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one Qwen3 layer."""
    d, ffn, q, kv = c.hidden_size, c.intermediate_size, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return {
        f"{layer}.input_layernorm.weight": (d,),
        f"{layer}.self_attn.q_proj.weight": (q, d),
        f"{layer}.self_attn.k_proj.weight": (kv, d),
        f"{layer}.self_attn.v_proj.weight": (kv, d),
        f"{layer}.self_attn.o_proj.weight": (d, q),
        f"{layer}.self_attn.q_norm.weight": (c.head_dim,),
        f"{layer}.self_attn.k_norm.weight": (c.head_dim,),
        f"{layer}.post_attention_layernorm.weight": (d,),
        f"{layer}.mlp.gate_proj.weight": (ffn, d),
        f"{layer}.mlp.up_proj.weight": (ffn, d),
        f"{layer}.mlp.down_proj.weight": (d, ffn),
    }


def target_shapes(c: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tied target."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (c.vocab_size, c.hidden_size),
        "norm.weight": (c.hidden_size,),
    }
    for i in range(c.n_layers):
        shapes |= layer_shapes(c, f"layers.{i}")
    return shapes


def initial_weights(shapes: dict[str, tuple[int, ...]], seed: int, device: torch.device) -> Weights:
    """Norms one, biases and residual outputs zero, the rest normal."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            value = torch.ones(shape)
        elif name.endswith(
            ("bias", "o_proj.weight", "down_proj.weight", "markov_w2.weight", "confidence_head.proj.weight")
        ):
            value = torch.zeros(shape)
        else:
            std = 0.02 if name.startswith(("embed", "markov")) else 0.5 / math.sqrt(shape[-1])
            value = torch.randn(shape, generator=generator) * std
        weights[name] = value.to(device).requires_grad_()
    return weights


def packed_rows(tokenizer: Tokenizer, length: int, seed: int) -> Iterator[list[int]]:
    """Yield rows of whole documents, cut at ``length``; each row starts with a new document."""
    rng = random.Random(seed)
    weights = [DOMAIN_WEIGHTS[domain] for domain in DOMAINS]
    while True:
        row: list[int] = []
        while len(row) < length:
            row += tokenizer.encode(sample_document(rng, rng.choices(DOMAINS, weights)[0])).ids
        yield row[:length]


def half_precision(weights: Weights) -> Weights:
    """Cast to bfloat16; gradients flow back to the float32 originals."""
    return {name: w.bfloat16() for name, w in weights.items()}


def next_token_loss(w: Weights, c: TransformerConfig, ids: Tensor) -> Tensor:
    """Cross-entropy of ids (B, T + 1), in float32."""
    logits = target_logits(w, c, target_hidden_states(w, c, ids[:, :-1])[-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


@dataclass(frozen=True, slots=True)
class TargetTraining:
    """Length of the training, its seed and its pace."""

    n_steps: int
    batch: int = 12
    length: int = 384
    seed: int = 1
    minutes: float | None = None
    rate: float = 1.0  # factor on the learning rates


def train_target(
    tokenizer: Tokenizer, c: TransformerConfig, t: TargetTraining, device: torch.device, start: Weights | None = None
) -> Weights:
    """Train by next-token cross-entropy in bfloat16, from ``start`` or from random weights; returns float32 weights."""
    weights = initial_weights(target_shapes(c), t.seed, device)
    if start is not None:
        weights = {name: start[name].to(device).clone().requires_grad_() for name in weights}
    optimizer = PairedOptimizer(weights, muon_lr=0.02 * t.rate, adam_lr=4e-3 * t.rate)
    rows = packed_rows(tokenizer, t.length + 1, 1000 * t.seed + parallel.rank())
    compiled = torch.compile(next_token_loss)
    schedule, losses = parallel.Schedule(t.n_steps, t.minutes), []
    for step in itertools.count():
        progress = schedule.progress(step)
        if progress >= 1:
            break
        ids = torch.tensor([next(rows) for _ in range(t.batch)], device=device)
        loss = compiled(half_precision(weights), c, ids)
        loss.backward()
        parallel.average_gradients(weights)
        optimizer.step(progress)
        losses.append(loss.item())
        if step % 20 == 19 and parallel.rank() == 0:
            rate = (step + 1) * t.batch * t.length / (time.monotonic() - schedule.began)
            mean = sum(losses[-20:]) / 20
            print(f"target step {step + 1}, {progress:.0%}: loss {mean:.4f}, {rate:.0f} tokens/s a process", flush=True)
    return {name: w.detach() for name, w in weights.items()}


@torch.no_grad()
def sample_rows(
    w: Weights, c: TransformerConfig, prompts: Iterator[list[int]], batch: int, length: int, end_id: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Let the target answer prompts, one after the other in each row, at temperatures 0.7 to 1.

    Returns
    -------
    ids : Tensor (batch, length)
    generated : Tensor (batch, length) of bool
        True where the token is the target's own, False where it belongs to a prompt.
    """
    device = w["embed_tokens.weight"].device
    generator = torch.Generator(device).manual_seed(seed)
    half = half_precision(w)
    temperatures = torch.linspace(0.7, 1.0, batch, device=device)[:, None]
    forced = [next(prompts) for _ in range(batch)]
    ids = torch.zeros(batch, length, dtype=torch.long)
    generated = torch.zeros(batch, length, dtype=torch.bool)
    cache = KvCache.empty(c.n_layers)
    sampled = [0] * batch
    for t in range(length):
        for row in range(batch):
            generated[row, t] = not forced[row]
            token = forced[row].pop(0) if forced[row] else sampled[row]
            ids[row, t] = token
            if generated[row, t] and token == end_id:
                forced[row] = next(prompts)
        states = target_hidden_states(half, c, ids[:, t : t + 1].to(device), cache)
        logits = target_logits(half, c, states[-1][:, 0]).float()
        sampled = torch.multinomial(torch.softmax(logits / temperatures, -1), 1, generator=generator)[:, 0].tolist()
    return ids, generated
