"""Train a DSpark drafter on text that the target generated.

The losses are the paper's (equations 9 to 12): per slot k, with weight exp(-k / 4), a small cross-entropy on the text
and a large distance between draft and target distribution; beside them the confidence head learns 1 - TV.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from demo_text import DOMAINS, SYSTEM_PROMPTS, render_prompt, sample_training_dialogue
from tokenizers import Tokenizer
from torch import Tensor

from tests.reference.dspark_torch import (
    DrafterConfig,
    TransformerConfig,
    Weights,
    base_logits,
    block_hidden_states,
    block_inputs,
    confidence_logit,
    markov_features,
    previous_embedding,
    project_context,
    target_hidden_states,
    target_logits,
    transition_bias,
)

from . import parallel
from .optimizer import PairedOptimizer
from .target import DOMAIN_WEIGHTS, half_precision, initial_weights, layer_shapes, sample_rows

LOSS_DECAY_GAMMA = 4.0
CE_WEIGHT, L1_WEIGHT, CONFIDENCE_WEIGHT = 0.1, 0.9, 1.0
# From random weights the L1 distance gives little to follow, so the cross-entropy starts heavy (our deviation).
CE_WARMUP_WEIGHT, CE_WARMUP_SHARE = 1.0, 0.3


@dataclass(slots=True)
class DraftData:
    """Rows of target text with what the drafter learns from (R rows of L tokens)."""

    ids: Tensor  # (R, L)
    generated: Tensor  # (R, L) of bool: the target's own tokens
    taps: Tensor  # (R, L, m * d) bfloat16, outputs of the tapped layers
    last: Tensor  # (R, L, d) bfloat16, output of the last layer

    def to(self, device: torch.device, rows: Tensor) -> DraftData:
        """Copy some rows to a device."""
        return DraftData(*(x[rows].to(device) for x in (self.ids, self.generated, self.taps, self.last)))


@dataclass(frozen=True, slots=True)
class DrafterTraining:
    """Length of a drafter's training, rows and anchors per step, seed."""

    n_steps: int
    batch: int = 8
    n_anchors: int = 24
    seed: int = 2
    minutes: float | None = None


def training_prompts(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """Yield prompts that are not held out, over and over new ones."""
    rng = random.Random(seed)
    weights = [DOMAIN_WEIGHTS[domain] for domain in DOMAINS]
    while True:
        question = sample_training_dialogue(rng, rng.choices(DOMAINS, weights)[0]).question
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.1 else None
        yield tokenizer.encode(render_prompt(question, system)).ids


@torch.no_grad()
def generate_draft_data(
    tokenizer: Tokenizer,
    target: Weights,
    c: TransformerConfig,
    tapped_layers: tuple[int, ...],
    n_rows: int,
    length: int,
    seed: int,
) -> DraftData:
    """Sample rows from the target and run it over them once more for features and last states."""
    end_id = tokenizer.token_to_id("<|im_end|>")
    parts, half, batch = [], half_precision(target), min(128, n_rows)
    device = target["embed_tokens.weight"].device
    for begin in range(0, n_rows, batch):
        began = time.monotonic()
        prompts = training_prompts(tokenizer, seed + begin)
        ids, generated = sample_rows(target, c, prompts, batch, length, end_id, seed + begin)
        for chunk in range(0, batch, 16):
            states = target_hidden_states(half, c, ids[chunk : chunk + 16].to(device))
            taps = torch.cat([states[i + 1] for i in tapped_layers], dim=-1)
            parts.append(
                DraftData(ids[chunk : chunk + 16], generated[chunk : chunk + 16], taps.cpu(), states[-1].cpu())
            )
        print(
            f"draft data {begin + batch} / {n_rows} rows, {batch * length / (time.monotonic() - began):.0f} tokens/s",
            flush=True,
        )
    return DraftData(*(torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "generated", "taps", "last")))


def drafter_shapes(c: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything that is trained."""
    d, r, v = c.layers.hidden_size, c.markov_rank, c.layers.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, len(c.target_layer_ids) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
        "markov_head.markov_w1.weight": (v, r),
        "markov_head.markov_w2.weight": (v, r),
    }
    for i in range(c.layers.n_layers):
        shapes |= layer_shapes(c.layers, f"layers.{i}")
    if c.markov_head_type == "gated":
        shapes |= {"markov_head.gate_proj.weight": (r, d + r), "markov_head.gate_proj.bias": (r,)}
    if c.markov_head_type == "rnn":
        shapes |= {"markov_head.joint_proj.weight": (3 * r, 2 * r + d), "markov_head.joint_proj.bias": (3 * r,)}
    if c.has_confidence:
        n_inputs = d + r if c.confidence_with_markov else d
        shapes |= {"confidence_head.proj.weight": (1, n_inputs), "confidence_head.proj.bias": (1,)}
    return shapes


def choose_anchors(generated: Tensor, block_size: int, n_anchors: int, generator: torch.Generator) -> Tensor:
    """Draw anchor positions (B, n_anchors) whose next token is the target's own and whose block fits the row."""
    fits = generated[:, 1 : generated.shape[1] - block_size + 1].float() + 1e-9  # entry a: token a + 1 is generated
    fits[:, 0] = 1e-9  # an anchor needs context before it
    return torch.multinomial(fits, n_anchors, replacement=False, generator=generator)


def block_mask(anchors: Tensor, n_context: int, block_size: int) -> Tensor:
    """Mask (B, 1, N, T + N): each block row sees the context before its anchor and its own block."""
    rows = anchors.repeat_interleave(block_size, dim=1)  # (B, N)
    context = torch.arange(n_context, device=anchors.device) < rows[..., None]
    block = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(block_size)
    own = (block[:, None] == block[None]).expand(len(anchors), -1, -1)
    return torch.cat((context, own), dim=-1)[:, None]


def drafter_loss(
    w: Weights,
    c: DrafterConfig,
    tapped: Tensor,
    target_probs: Tensor,
    tokens: Tensor,
    anchors: Tensor,
    own: Tensor,
    ce_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss of A blocks per row, and the mean overlap 1 - TV per slot.

    Parameters
    ----------
    tapped : Tensor (B, T, m * d)
    target_probs : Tensor (B, A, block_size, V)
    tokens : Tensor (B, A, block_size + 1)
        The anchor and the text behind it.
    anchors : Tensor (B, A)
    own : Tensor (B, A, block_size)
        One where the slot's text token is the target's own, zero elsewhere.
    """
    g, n_rows = c.block_size, anchors.shape[0]
    positions = (anchors[..., None] + torch.arange(g, device=anchors.device)).flatten(1)
    mask = block_mask(anchors, tapped.shape[1], g)
    h = block_hidden_states(
        w, c, project_context(w, c, tapped), block_inputs(c, tokens[..., 0]).flatten(1), positions, mask
    )
    h = h.view(n_rows, -1, g, h.shape[-1])
    previous = tokens[..., :-1]
    logits = (base_logits(w, h) + transition_bias(w, markov_features(w, c, h, previous))).float()
    log_probs = torch.log_softmax(logits, dim=-1)
    cross_entropy = -log_probs.gather(-1, tokens[..., 1:, None])[..., 0]
    distance = (log_probs.exp() - target_probs).abs().sum(-1)  # twice the total variation
    overlap = 1 - 0.5 * distance.detach()
    loss = ce_weight * cross_entropy + L1_WEIGHT * distance
    if c.has_confidence:
        logit = confidence_logit(w, c, h, previous_embedding(w, previous)).float()
        loss = loss + CONFIDENCE_WEIGHT * F.binary_cross_entropy_with_logits(logit, overlap, reduction="none")
    slot_weights = torch.exp(-torch.arange(g, device=h.device) / LOSS_DECAY_GAMMA) * own
    return (loss * slot_weights).sum() / slot_weights.sum(), (overlap * own).sum((0, 1)) / own.sum((0, 1))


def gather_blocks(x: Tensor, anchors: Tensor, n: int) -> Tensor:
    """Take x[b, a .. a + n - 1] for each anchor a: (B, L, ...) -> (B, A, n, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[rows, anchors[..., None] + torch.arange(n, device=x.device)]


def train_drafter(
    data: DraftData,
    target: Weights,
    target_config: TransformerConfig,
    c: DrafterConfig,
    t: DrafterTraining,
    start: Weights | None = None,
) -> Weights:
    """Train one drafter, from ``start`` or from random weights; returns its float32 weights without the embedding."""
    device = target["embed_tokens.weight"].device
    weights = initial_weights(drafter_shapes(c), t.seed, device)
    if start is not None:
        weights = {name: start[name].to(device).clone().requires_grad_() for name in weights}
    optimizer = PairedOptimizer(weights, muon_lr=0.02, adam_lr=4e-3)
    generator = torch.Generator().manual_seed(1000 * t.seed + parallel.rank())
    frozen = half_precision(
        {n: w for n, w in target.items() if n in ("embed_tokens.weight", "norm.weight", "lm_head.weight")}
    )
    embedding = {"embed_tokens.weight": frozen["embed_tokens.weight"]}
    compiled = torch.compile(drafter_loss)
    schedule, overlaps = parallel.Schedule(t.n_steps, t.minutes), []
    for step in itertools.count():
        progress = schedule.progress(step)
        if progress >= 1:
            break
        rows = torch.randint(len(data.ids), (t.batch,), generator=generator)
        part = data.to(device, rows)
        anchors = choose_anchors(part.generated.cpu(), c.block_size, t.n_anchors, generator).to(device)
        tokens = gather_blocks(part.ids, anchors, c.block_size + 1)
        own = gather_blocks(part.generated, anchors, c.block_size + 1)[..., 1:].float()
        target_probs = torch.softmax(
            target_logits(frozen, target_config, gather_blocks(part.last, anchors, c.block_size)).float(), -1
        )
        ce_weight = CE_WEIGHT + (CE_WARMUP_WEIGHT - CE_WEIGHT) * max(0.0, 1 - progress / CE_WARMUP_SHARE)
        if start is not None:
            ce_weight = CE_WEIGHT
        loss, overlap = compiled(
            half_precision(weights) | embedding,
            c,
            part.taps,
            target_probs,
            tokens,
            anchors,
            own,
            torch.tensor(ce_weight, device=device),
        )
        loss.backward()
        parallel.average_gradients(weights)
        optimizer.step(progress)
        overlaps.append(overlap.cpu())
        if step % 25 == 24 and parallel.rank() == 0:
            slots = " ".join(f"{x:.3f}" for x in torch.stack(overlaps[-25:]).mean(0).tolist())
            rate = (step + 1) / (time.monotonic() - schedule.began)
            line = f"loss {loss.item():.3f}, overlap {slots}, {rate:.2f} steps/s"
            print(f"{c.markov_head_type} step {step + 1}, {progress:.0%}: {line}", flush=True)
    return {name: w.detach() for name, w in weights.items()}
