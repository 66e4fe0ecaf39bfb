"""Write the golden files: what the PyTorch reference computes for one block after a few prompts, for each head.

The target's weights are the shipped Q8_0 file dequantized to float32, the drafter's are its bfloat16 checkpoint in
float32; embedding and head are the target's, as in a converted drafter that borrows them. Arrays of a file
``tests/data/goldens/<head>.npz``, where <i> counts the cases:

=================  ==================  =====================================================================
name               shape               content
=================  ==================  =====================================================================
target_layer_ids   (m,)                tapped layers, 0-based (the output of decoder layer i)
n_cases            ()                  number of cases
<i>.tokens         (T + 1,) int32      prompt and the anchor, its last entry (position T)
<i>.taps           (T, m * d)          tapped outputs for the context rows, last 8 rows only except in case 0
<i>.h_ctx          (T, d)              context features, the same rows
<i>.hidden         (block, d)          h_k after the final norm
<i>.greedy         (block,) int32      tokens drafted at temperature 0 over the full vocabulary
<i>.columns        (n,) int32          vocabulary columns kept below (all in case 0)
<i>.base_logits    (block, n)          U
<i>.bias           (block, n)          B, with the greedy tokens as previous tokens
<i>.draft_probs    (block, n)          softmax(U + B) over the full vocabulary (temperature 1)
<i>.confidence     (block,)            c, with the greedy tokens as previous tokens
<i>.target_greedy  (block,) int32      the target's own greedy continuation of tokens
<i>.target_logits  (n,)                the target's logits for the token that is the anchor (row T - 1)
=================  ==================  =====================================================================
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo_pair.files import read_target  # noqa: E402
from demo_pair.measure import Pair  # noqa: E402
from demo_pair.tokenizer import load_tokenizer  # noqa: E402
from train_demo_pair import HEADS, PAIR_PATH, TARGET_PATH  # noqa: E402

from tests.reference.dspark_torch import (  # noqa: E402
    context_features,
    draft_block,
    load_drafter,
    plain_decode,
    target_hidden_states,
    target_logits,
)

GOLDENS_PATH = ROOT / "tests/data/goldens"
N_COLUMNS = 96
N_KEPT_ROWS = 8
# The anchor stands this many greedily decoded tokens behind the prompt, one case per domain.
N_DECODED = {"arithmetic": 9, "code": 33, "chat": 17}


def golden_columns(base_logits: Tensor) -> np.ndarray:
    """Pick the columns of one case: each slot's largest logits and an even spread over the vocabulary."""
    top = base_logits.topk(6, dim=-1).indices.flatten()
    spread = torch.linspace(0, base_logits.shape[-1] - 1, N_COLUMNS - 42).long()
    return torch.cat((top, spread)).unique().numpy()


@torch.no_grad()
def golden_case(pair: Pair, tokens: list[int], is_whole: bool) -> dict[str, np.ndarray]:
    """Compute the arrays of one case; tokens ends with the anchor."""
    states = target_hidden_states(pair.target, pair.target_config, torch.tensor([tokens[:-1]]))
    h_ctx = context_features(pair.drafter, pair.config, states)
    block = draft_block(pair.drafter, pair.config, h_ctx, tokens[-1])
    probs = torch.softmax(block.base_logits + block.transition_bias, dim=-1)
    columns = np.arange(probs.shape[-1]) if is_whole else golden_columns(block.base_logits)
    kept = slice(0, None) if is_whole else slice(-N_KEPT_ROWS, None)
    taps = torch.cat([states[i + 1] for i in pair.config.target_layer_ids], dim=-1)
    return {
        "tokens": np.array(tokens, dtype=np.int32),
        "taps": taps[0, kept].numpy(),
        "h_ctx": h_ctx[0, kept].numpy(),
        "hidden": block.hidden.numpy(),
        "greedy": np.array(block.tokens, dtype=np.int32),
        "columns": columns.astype(np.int32),
        "base_logits": block.base_logits.numpy()[:, columns],
        "bias": block.transition_bias.numpy()[:, columns],
        "draft_probs": probs.numpy()[:, columns],
        "confidence": block.confidence.numpy(),
        "target_greedy": np.array(
            plain_decode(pair.target, pair.target_config, tokens, pair.config.block_size), dtype=np.int32
        ),
        "target_logits": target_logits(pair.target, pair.target_config, states[-1][0, -1]).numpy()[columns],
    }


def main() -> None:
    """Write one file per head."""
    target, target_config = read_target(TARGET_PATH)
    tokenizer = load_tokenizer(PAIR_PATH / "tokenizer.json")
    prompts = json.loads((PAIR_PATH / "prompts.json").read_text())["prompts"]
    cases = []
    for domain, n_decoded in N_DECODED.items():
        ids = tokenizer.encode(next(p["text"] for p in prompts if p["domain"] == domain)).ids
        cases.append(ids + plain_decode(target, target_config, ids, n_decoded))
    GOLDENS_PATH.mkdir(parents=True, exist_ok=True)
    for head in HEADS:
        drafter, config = load_drafter(PAIR_PATH / head, target)
        pair = Pair(target, target_config, drafter, config)
        arrays: dict[str, np.ndarray] = {
            "target_layer_ids": np.array(config.target_layer_ids),
            "n_cases": np.array(len(cases)),
        }
        for i, tokens in enumerate(cases):
            case = golden_case(pair, tokens, is_whole=i == 0)
            arrays |= {f"{i}.{name}": value for name, value in case.items()}
            print(head, i, "drafted", case["greedy"].tolist(), "target", case["target_greedy"].tolist())
        np.savez_compressed(GOLDENS_PATH / f"{head}.npz", **arrays)


if __name__ == "__main__":
    main()
