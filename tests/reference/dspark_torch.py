"""Independent PyTorch reference of the target and of the DSpark drafter.

Written from the equations (paper, equations 2 to 7; DESIGN of this project), in float32, with no concern for speed. It
knows nothing of llama.cpp, of GGUF and of the C++ code: weights are plain dictionaries from Hugging Face names to
tensors. The demo pair is trained with these same functions.

Shapes: B sequences, T context positions, N block rows, d hidden size, V vocabulary, r Markov rank, m tapped layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TransformerConfig:
    """Sizes shared by target and drafter (Qwen3 layers)."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """A DSpark drafter: its layers, the tapped target layers and its heads."""

    layers: TransformerConfig
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]  # 0-based: the output of decoder layer i
    markov_rank: int
    markov_head_type: str  # vanilla | gated | rnn
    has_confidence: bool = True
    confidence_with_markov: bool = True


@dataclass(slots=True)
class KvCache:
    """Keys and values of one transformer, one pair (B, n_kv_heads, T, head_dim) per layer."""

    layers: list[tuple[Tensor, Tensor] | None]

    @classmethod
    def empty(cls, n_layers: int) -> KvCache:
        """Make a cache without rows."""
        return cls([None] * n_layers)

    @property
    def length(self) -> int:
        """Number of cached positions."""
        first = self.layers[0]
        return 0 if first is None else first[0].shape[2]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append rows to one layer and return all of its rows."""
        old = self.layers[layer]
        rows = (k, v) if old is None else (torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2))
        self.layers[layer] = rows
        return rows

    def truncate(self, length: int) -> None:
        """Drop every row from position ``length`` on."""
        self.layers = [None if kv is None else (kv[0][:, :, :length], kv[1][:, :, :length]) for kv in self.layers]


# ---------------------------------------------------------------------------------------------- transformer layers


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to unit root mean square, then by ``weight``."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (..., N, head_dim), for rotate-half (NeoX) RoPE at absolute positions (..., N)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * theta**-exponents  # (..., N, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, n_heads, N, head_dim) by tables (N, head_dim) or (B, N, head_dim)."""
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, n_heads * head_dim) -> (B, n_heads, N, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def project(w: Weights, name: str, x: Tensor) -> Tensor:
    """Apply the linear map ``name``, with its bias if it has one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def project_keys(w: Weights, c: TransformerConfig, layer: str, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Keys (B, n_kv_heads, N, head_dim): per-head norm, then RoPE."""
    k = split_heads(project(w, f"{layer}.self_attn.k_proj", x), c.head_dim)
    return apply_rope(rms_norm(k, w[f"{layer}.self_attn.k_norm.weight"], c.rms_norm_eps), *rope)


def project_queries(w: Weights, c: TransformerConfig, layer: str, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Queries (B, n_heads, N, head_dim): per-head norm, then RoPE."""
    q = split_heads(project(w, f"{layer}.self_attn.q_proj", x), c.head_dim)
    return apply_rope(rms_norm(q, w[f"{layer}.self_attn.q_norm.weight"], c.rms_norm_eps), *rope)


def project_values(w: Weights, c: TransformerConfig, layer: str, x: Tensor) -> Tensor:
    """Values (B, n_kv_heads, N, head_dim): no norm, no RoPE."""
    return split_heads(project(w, f"{layer}.self_attn.v_proj", x), c.head_dim)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Grouped-query attention, heads joined again: (B, N, n_heads * head_dim)."""
    dtype = v.dtype
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, mask, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def feed_forward(w: Weights, c: TransformerConfig, layer: str, x: Tensor) -> Tensor:
    """Post-attention norm and SwiGLU."""
    x = rms_norm(x, w[f"{layer}.post_attention_layernorm.weight"], c.rms_norm_eps)
    gate = F.silu(project(w, f"{layer}.mlp.gate_proj", x))
    return project(w, f"{layer}.mlp.down_proj", gate * project(w, f"{layer}.mlp.up_proj", x))


# --------------------------------------------------------------------------------------------------------- target


def target_hidden_states(w: Weights, c: TransformerConfig, ids: Tensor, cache: KvCache | None = None) -> list[Tensor]:
    """Run the target over ids (B, N), behind what ``cache`` holds.

    Returns
    -------
    list of Tensor, each (B, N, d)
        Entry 0 is the embedding output, entry i + 1 the output of decoder layer i. No final norm is applied.
    """
    past = cache.length if cache else 0
    n_new = ids.shape[1]
    positions = torch.arange(past, past + n_new, device=ids.device)
    rope = rope_tables(positions, c.head_dim, c.rope_theta)
    mask = None if past == 0 else torch.arange(past + n_new, device=ids.device)[None] <= positions[:, None]
    states = [F.embedding(ids, w["embed_tokens.weight"])]
    for i in range(c.n_layers):
        layer, x = f"layers.{i}", states[-1]
        normed = rms_norm(x, w[f"{layer}.input_layernorm.weight"], c.rms_norm_eps)
        q = project_queries(w, c, layer, normed, rope)
        k, v = project_keys(w, c, layer, normed, rope), project_values(w, c, layer, normed)
        if cache:
            k, v = cache.extend(i, k.to(v.dtype), v)
        x = x + project(w, f"{layer}.self_attn.o_proj", attend(q, k, v, mask, is_causal=mask is None))
        states.append(x + feed_forward(w, c, layer, x))
    return states


def target_logits(w: Weights, c: TransformerConfig, last_hidden: Tensor) -> Tensor:
    """Final norm and output head: (..., d) -> (..., V). The head is the embedding when it is tied."""
    head = w.get("lm_head.weight", w["embed_tokens.weight"])
    return F.linear(rms_norm(last_hidden, w["norm.weight"], c.rms_norm_eps), head)


# ------------------------------------------------------------------------------------------------ drafter backbone


def context_features(w: Weights, c: DrafterConfig, states: list[Tensor]) -> Tensor:
    """H_ctx (B, T, d): the tapped layer outputs side by side through fc and hidden_norm."""
    tapped = torch.cat([states[i + 1] for i in c.target_layer_ids], dim=-1)  # (B, T, m * d)
    return project_context(w, c, tapped)


def project_context(w: Weights, c: DrafterConfig, tapped: Tensor) -> Tensor:
    """H_ctx (B, T, d) from the concatenated taps (B, T, m * d)."""
    return rms_norm(project(w, "fc", tapped), w["hidden_norm.weight"], c.layers.rms_norm_eps)


def block_inputs(c: DrafterConfig, anchors: Tensor) -> Tensor:
    """Token ids (..., block_size) of blocks that start with the anchors (...): the anchor, then masks."""
    masks = anchors.new_full((*anchors.shape, c.block_size - 1), c.mask_token_id)
    return torch.cat((anchors[..., None], masks), dim=-1)


def block_hidden_states(
    w: Weights, c: DrafterConfig, h_ctx: Tensor, block_ids: Tensor, block_positions: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Run the draft layers over block rows; context row t has position t.

    Parameters
    ----------
    h_ctx : Tensor (B, T, d)
        Context features; the layer's input norm is not applied to them.
    block_ids, block_positions : Tensor (B, N)
        One or several blocks side by side, with absolute positions.
    mask : Tensor (B, 1, N, T + N) of bool, optional
        Which rows each block row sees. None: all (one block whose context ends before its anchor).

    Returns
    -------
    Tensor (B, N, d)
        h_k after the final norm.
    """
    t = c.layers
    x = F.embedding(block_ids, w["embed_tokens.weight"])
    rope_ctx = rope_tables(torch.arange(h_ctx.shape[1], device=h_ctx.device), t.head_dim, t.rope_theta)
    rope_block = rope_tables(block_positions, t.head_dim, t.rope_theta)
    for i in range(t.n_layers):
        layer = f"layers.{i}"
        normed = rms_norm(x, w[f"{layer}.input_layernorm.weight"], t.rms_norm_eps)
        q = project_queries(w, t, layer, normed, rope_block)
        k = torch.cat(
            (project_keys(w, t, layer, h_ctx, rope_ctx), project_keys(w, t, layer, normed, rope_block)), dim=2
        )
        v = torch.cat((project_values(w, t, layer, h_ctx), project_values(w, t, layer, normed)), dim=2)
        x = x + project(w, f"{layer}.self_attn.o_proj", attend(q, k, v, mask))
        x = x + feed_forward(w, t, layer, x)
    return rms_norm(x, w["norm.weight"], t.rms_norm_eps)


def base_logits(w: Weights, h: Tensor) -> Tensor:
    """U (..., V) from h (..., d)."""
    return F.linear(h, w.get("lm_head.weight", w["embed_tokens.weight"]))


# --------------------------------------------------------------------------------------------------- sequential head


def previous_embedding(w: Weights, previous: Tensor) -> Tensor:
    """e_k = W1[x_{k-1}]: (...) -> (..., r)."""
    return F.embedding(previous, w["markov_head.markov_w1.weight"])


def markov_step(w: Weights, c: DrafterConfig, h: Tensor, e: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One slot of the Markov head.

    Parameters
    ----------
    h : Tensor (..., d)
    e, state : Tensor (..., r)
        ``state`` is s_{k-1}; zero before the first slot, and unused but by the rnn head.

    Returns
    -------
    feature, state : Tensor (..., r)
        B_k = W2 feature, and s_k.
    """
    if c.markov_head_type == "vanilla":
        return e, state
    if c.markov_head_type == "gated":
        return torch.sigmoid(project(w, "markov_head.gate_proj", torch.cat((h, e), dim=-1))) * e, state
    gate, candidate, output = project(w, "markov_head.joint_proj", torch.cat((state, e, h), dim=-1)).chunk(3, dim=-1)
    gate = torch.sigmoid(gate)
    return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


def transition_bias(w: Weights, feature: Tensor) -> Tensor:
    """B (..., V) from the head's feature (..., r)."""
    return F.linear(feature, w["markov_head.markov_w2.weight"])


def markov_features(w: Weights, c: DrafterConfig, h: Tensor, previous: Tensor) -> Tensor:
    """Head features (..., block_size, r) of whole blocks with known previous tokens (teacher forcing).

    h is (..., block_size, d), previous (..., block_size).
    """
    e = previous_embedding(w, previous)
    state = torch.zeros_like(e[..., 0, :])
    features = []
    for k in range(c.block_size):
        feature, state = markov_step(w, c, h[..., k, :], e[..., k, :], state)
        features.append(feature)
    return torch.stack(features, dim=-2)


def confidence_logit(w: Weights, c: DrafterConfig, h: Tensor, e: Tensor) -> Tensor:
    """Logit of c_k (...,) from h (..., d) and e (..., r)."""
    x = torch.cat((h, e), dim=-1) if c.confidence_with_markov else h
    return project(w, "confidence_head.proj", x)[..., 0]


# ----------------------------------------------------------------------------------------------- drafting one block


@dataclass(slots=True)
class DraftBlock:
    """One drafted block, slot by slot (each list has block_size entries or tensors stacked over slots)."""

    tokens: list[int]
    hidden: Tensor  # h, (block_size, d)
    base_logits: Tensor  # U, (block_size, V)
    transition_bias: Tensor  # B, (block_size, V)
    draft_probs: Tensor  # what each token was drawn from, (block_size, V), zero outside the candidates
    confidence: Tensor  # c, (block_size,)


def candidate_mask(u: Tensor, n_candidates: int | None) -> Tensor:
    """Mark the ``n_candidates`` largest base logits (V,); None marks all."""
    if n_candidates is None or n_candidates >= u.numel():
        return torch.ones_like(u, dtype=torch.bool)
    mask = torch.zeros_like(u, dtype=torch.bool)
    mask[u.topk(n_candidates).indices] = True
    return mask


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax at a temperature; at 0 all mass on the argmax (the lowest id among equals)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return torch.softmax(logits / temperature, dim=-1)


def draw(probs: Tensor, generator: torch.Generator | None) -> int:
    """Draw one id from (V,) probabilities."""
    return int(torch.multinomial(probs, 1, generator=generator))


def draft_block(
    w: Weights,
    c: DrafterConfig,
    h_ctx: Tensor,
    anchor: int,
    temperature: float = 0.0,
    n_candidates: int | None = None,
    generator: torch.Generator | None = None,
) -> DraftBlock:
    """Draft one full block behind the context features h_ctx (1, start, d); the anchor stands at ``start``."""
    start = h_ctx.shape[1]
    ids = block_inputs(c, torch.tensor([anchor]))
    h = block_hidden_states(w, c, h_ctx, ids, torch.arange(start, start + c.block_size)[None])[0]
    u = base_logits(w, h)
    tokens, biases, probs, confidences = [], [], [], []
    previous, state = anchor, torch.zeros(c.markov_rank)
    for k in range(c.block_size):
        e = previous_embedding(w, torch.tensor(previous))
        feature, state = markov_step(w, c, h[k], e, state)
        biases.append(transition_bias(w, feature))
        logits = (u[k] + biases[k]).masked_fill(~candidate_mask(u[k], n_candidates), -torch.inf)
        probs.append(probabilities(logits, temperature))
        confidences.append(torch.sigmoid(confidence_logit(w, c, h[k], e)) if c.has_confidence else torch.tensor(1.0))
        previous = draw(probs[k], generator)
        tokens.append(previous)
    return DraftBlock(tokens, h, u, torch.stack(biases), torch.stack(probs), torch.stack(confidences))


# ------------------------------------------------------------------------------------------------------ verification


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Normalised positive part of target - draft; the target itself where nothing is left."""
    rest = (target - draft).clamp_min(0)
    total = rest.sum()
    return rest / total if total > 0 else target / target.sum()


def verify_exact(tokens: list[int], target_probs: Tensor, generator: torch.Generator | None) -> list[int]:
    """Draw from the target at each position and go on while the draw equals the draft."""
    committed = []
    for k in range(len(tokens) + 1):
        committed.append(draw(target_probs[k], generator))
        if k < len(tokens) and committed[k] != tokens[k]:
            break
    return committed


def verify_rejection(
    tokens: list[int], draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None
) -> list[int]:
    """Accept each token with probability min(1, p^t / p^d); at the first rejection draw from the residual."""
    for k, token in enumerate(tokens):
        ratio = target_probs[k, token] / draft_probs[k, token]
        if torch.rand((), generator=generator) >= ratio:
            return [*tokens[:k], draw(residual(target_probs[k], draft_probs[k]), generator)]
    return [*tokens, draw(target_probs[len(tokens)], generator)]


def verify_block(
    tokens: list[int], draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None
) -> list[int]:
    """Block verification (Sun et al., arXiv 2403.10444): keep the longest prefix that passes its own test."""
    n = len(tokens)
    joint, n_kept, joint_kept = 1.0, 0, 1.0
    for i in range(1, n + 1):
        token = tokens[i - 1]
        joint = min(joint * float(target_probs[i - 1, token] / draft_probs[i - 1, token]), 1.0)
        if i == n:
            accept = joint
        else:
            mass = float((joint * target_probs[i] - draft_probs[i]).clamp_min(0).sum())
            accept = mass / (mass + 1 - joint) if mass + 1 - joint > 0 else 1.0
        if float(torch.rand((), generator=generator)) < accept:
            n_kept, joint_kept = i, joint
    if n_kept == n:
        return [*tokens, draw(target_probs[n], generator)]
    return [*tokens[:n_kept], draw(residual(joint_kept * target_probs[n_kept], draft_probs[n_kept]), generator)]


def verify(
    rule: str, tokens: list[int], draft_probs: Tensor, target_probs: Tensor, generator: torch.Generator | None
) -> list[int]:
    """Return the committed tokens of one round: the accepted prefix and one more.

    target_probs is (n + 1, V): row k is p^t given the anchor and the first k drafted tokens.
    """
    if rule == "exact":
        return verify_exact(tokens, target_probs, generator)
    if rule == "rejection":
        return verify_rejection(tokens, draft_probs, target_probs, generator)
    if rule == "block":
        return verify_block(tokens, draft_probs, target_probs, generator)
    raise ValueError(f"rule must be exact, rejection or block, got {rule!r}")


# ----------------------------------------------------------------------------------------------- speculative decoding


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How the reference loop decodes.

    A round that meets an end token or ``max_tokens`` commits only up to there.
    """

    temperature: float = 0.0
    rule: str = "exact"
    n_candidates: int | None = 64
    max_tokens: int = 128
    end_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(slots=True)
class LoopResult:
    """Text of one prompt and the number of committed tokens (bonus included) of each round."""

    token_ids: list[int] = field(default_factory=list)
    committed_per_round: list[int] = field(default_factory=list)

    @property
    def accepted_length(self) -> float:
        """Committed tokens per round."""
        return sum(self.committed_per_round) / max(len(self.committed_per_round), 1)


def cut_at_end(tokens: list[int], options: LoopOptions, room: int) -> tuple[list[int], bool]:
    """Cut the committed tokens behind an end token or at ``room``; tell whether the text ends there."""
    tokens = tokens[:room]
    for i, token in enumerate(tokens):
        if token in options.end_ids:
            return tokens[: i + 1], True
    return tokens, len(tokens) == room


@torch.no_grad()
def speculative_decode(
    target: Weights,
    target_config: TransformerConfig,
    drafter: Weights,
    config: DrafterConfig,
    prompt: list[int],
    options: LoopOptions,
) -> LoopResult:
    """Decode one prompt, drafting a full block each round.

    The first token comes from the target alone (the prompt's last row) and is the first anchor; it counts as no round.
    """
    generator = torch.Generator().manual_seed(options.seed)
    cache = KvCache.empty(target_config.n_layers)
    states = target_hidden_states(target, target_config, torch.tensor([prompt]), cache)
    h_ctx = context_features(drafter, config, states)
    first = probabilities(target_logits(target, target_config, states[-1][0, -1]), options.temperature)
    anchor = draw(first, generator)
    result = LoopResult([anchor])
    finished = anchor in options.end_ids or options.max_tokens <= 1
    while not finished:
        block = draft_block(drafter, config, h_ctx, anchor, options.temperature, options.n_candidates, generator)
        states = target_hidden_states(target, target_config, torch.tensor([[anchor, *block.tokens]]), cache)
        target_probs = probabilities(target_logits(target, target_config, states[-1][0]), options.temperature)
        committed = verify(options.rule, block.tokens, block.draft_probs, target_probs, generator)
        n_rows = len(committed)  # the anchor and all committed tokens but the last have their target rows now
        h_ctx = torch.cat((h_ctx, context_features(drafter, config, [s[:, :n_rows] for s in states])), dim=1)
        cache.truncate(h_ctx.shape[1])
        anchor = committed[-1]
        kept, finished = cut_at_end(committed, options, options.max_tokens - len(result.token_ids))
        result.token_ids += kept
        result.committed_per_round.append(len(kept))
    return result


@torch.no_grad()
def plain_decode(w: Weights, c: TransformerConfig, prompt: list[int], n_tokens: int) -> list[int]:
    """Decode greedily with the target alone."""
    cache, ids, out = KvCache.empty(c.n_layers), prompt, []
    for _ in range(n_tokens):
        states = target_hidden_states(w, c, torch.tensor([ids]), cache)
        ids = [int(target_logits(w, c, states[-1][0, -1]).argmax())]
        out += ids
    return out


# -------------------------------------------------------------------------------------------------------------- files


def drafter_config_from_json(values: dict[str, Any]) -> DrafterConfig:
    """Read the flat DeepSpec configuration."""
    layers = TransformerConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        n_layers=values["num_hidden_layers"],
        n_heads=values["num_attention_heads"],
        n_kv_heads=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        vocab_size=values["vocab_size"],
        rope_theta=values["rope_theta"],
        rms_norm_eps=values["rms_norm_eps"],
    )
    return DrafterConfig(
        layers=layers,
        block_size=values["block_size"],
        mask_token_id=values["mask_token_id"],
        target_layer_ids=tuple(values["target_layer_ids"]),
        markov_rank=values["markov_rank"],
        markov_head_type=values["markov_head_type"],
        has_confidence=values["enable_confidence_head"],
        confidence_with_markov=values["confidence_head_with_markov"],
    )


def load_drafter(directory: Path, target: Weights | None = None) -> tuple[Weights, DrafterConfig]:
    """Load a DeepSpec checkpoint in float32.

    With ``target``, embedding and head are the target's (what a converted drafter that borrows them sees); without,
    the checkpoint must hold its own.
    """
    from safetensors.torch import load_file

    config = drafter_config_from_json(json.loads((directory / "config.json").read_text()))
    weights = {name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()}
    if target is not None:
        for name in ("embed_tokens.weight", "lm_head.weight"):
            weights.pop(name, None)
            if name in target:
                weights[name] = target[name]
    return weights, config
