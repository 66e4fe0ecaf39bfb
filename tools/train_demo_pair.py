"""Train the demo pair: a small Qwen3 target and three DSpark drafters, on text that this repository generates.

    python tools/train_demo_pair.py all --work build/demo_pair

or stage by stage (the stages target and drafters also under torchrun, one process per core or device): tokenizer,
target, data, drafters, measure. Every stage reads what the ones before left in the work folder and in the repository.
Needs torch, numpy, gguf, safetensors and tokenizers; nothing else in the project does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo_pair.drafting import DraftData, DrafterTraining, generate_draft_data, train_drafter  # noqa: E402
from demo_pair.files import read_target, write_drafter, write_json, write_prompts, write_target  # noqa: E402
from demo_pair.measure import Pair, measure  # noqa: E402
from demo_pair.parallel import rank  # noqa: E402
from demo_pair.target import DOMAIN_WEIGHTS, TargetTraining, train_target  # noqa: E402
from demo_pair.tokenizer import load_tokenizer, train_tokenizer  # noqa: E402
from demo_text import DOMAINS, sample_document  # noqa: E402

from tests.reference.dspark_torch import DrafterConfig, TransformerConfig, load_drafter  # noqa: E402

SEED = 20261122
VOCAB_SIZE = 2048
N_TOKENIZER_DOCUMENTS = 30000
DATA_LENGTH = 320
TARGET = TransformerConfig(
    hidden_size=256, intermediate_size=768, n_layers=10, n_heads=4, n_kv_heads=2, head_dim=64, vocab_size=VOCAB_SIZE
)
TAPPED_LAYERS = (1, 5, 8)
MASK_TOKEN_ID = VOCAB_SIZE - 1
HEADS = ("vanilla", "gated", "rnn")

TARGET_PATH = ROOT / "python/dspark_cpp/demo/target.gguf"
PAIR_PATH = ROOT / "tests/data/demo_pair"


def drafter_config(head: str) -> DrafterConfig:
    """The shipped drafter has two layers and the vanilla head; gated and rnn are smaller, for tests."""
    n_layers, rank = (2, 64) if head == "vanilla" else (1, 32)
    layers = TransformerConfig(
        hidden_size=256,
        intermediate_size=512,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        head_dim=64,
        vocab_size=VOCAB_SIZE,
    )
    return DrafterConfig(
        layers=layers,
        block_size=7,
        mask_token_id=MASK_TOKEN_ID,
        target_layer_ids=TAPPED_LAYERS,
        markov_rank=rank,
        markov_head_type=head,
        confidence_with_markov=head != "gated",
    )


def make_tokenizer(args: argparse.Namespace) -> None:
    """Train the tokenizer and write the prompts."""
    rng = random.Random(SEED)
    weights = [DOMAIN_WEIGHTS[domain] for domain in DOMAINS]
    texts = [sample_document(rng, rng.choices(DOMAINS, weights)[0]) for _ in range(N_TOKENIZER_DOCUMENTS)]
    PAIR_PATH.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, VOCAB_SIZE).save(str(PAIR_PATH / "tokenizer.json"))
    write_prompts(PAIR_PATH / "prompts.json", n_per_domain=60, n_raw=10, seed=SEED)


def make_target(args: argparse.Namespace) -> None:
    """Train the target and write it as GGUF."""
    tokenizer = load_tokenizer(PAIR_PATH / "tokenizer.json")
    saved = args.work / "target.pt"
    start = torch.load(saved) if args.resume else None
    training = TargetTraining(
        args.target_steps, args.target_batch, seed=args.seed, minutes=args.target_minutes, rate=args.target_rate
    )
    weights = train_target(tokenizer, TARGET, training, torch.device(args.device), start)
    if rank() > 0:
        return
    torch.save(weights, saved)
    write_target(TARGET_PATH, weights, TARGET, tokenizer)


def make_data(args: argparse.Namespace) -> None:
    """Sample the drafters' training text from the quantized target."""
    target, config = read_target(TARGET_PATH)
    target = {name: w.to(args.device) for name, w in target.items()}
    tokenizer = load_tokenizer(PAIR_PATH / "tokenizer.json")
    data = generate_draft_data(tokenizer, target, config, TAPPED_LAYERS, args.data_rows, DATA_LENGTH, SEED + args.seed)
    torch.save((data.ids, data.generated, data.taps, data.last), args.work / "draft_data.pt")


def make_drafters(args: argparse.Namespace) -> None:
    """Train the drafters on the sampled text and write their checkpoints."""
    target, target_config = read_target(TARGET_PATH)
    target = {name: w.to(args.device) for name, w in target.items()}
    data = DraftData(*torch.load(args.work / "draft_data.pt"))
    for head in args.heads:
        config = drafter_config(head)
        n_steps = args.vanilla_steps if head == "vanilla" else args.other_steps
        minutes = args.vanilla_minutes if head == "vanilla" else args.other_minutes
        training = DrafterTraining(n_steps, seed=args.seed, minutes=minutes)
        saved = args.work / f"{head}.pt"
        start = torch.load(saved) if args.resume else None
        weights = train_drafter(data, target, target_config, config, training, start)
        if rank() > 0:
            continue
        torch.save(weights, saved)
        if head == "vanilla":  # one checkpoint carries its own embedding, the others borrow the target's
            weights["embed_tokens.weight"] = target["embed_tokens.weight"]
        write_drafter(PAIR_PATH / head, weights, config, target_config, training.n_anchors)


def make_measurements(args: argparse.Namespace) -> None:
    """Measure accepted lengths with the reference loop and write them beside the checkpoints."""
    target, target_config = read_target(TARGET_PATH)
    tokenizer = load_tokenizer(PAIR_PATH / "tokenizer.json")
    prompts = json.loads((PAIR_PATH / "prompts.json").read_text())["prompts"]
    path = PAIR_PATH / "accepted_lengths.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    for head in args.heads:
        drafter, config = load_drafter(PAIR_PATH / head, target)
        pair = Pair(target, target_config, drafter, config)
        rows = measure(pair, tokenizer, prompts, args.prompts, args.max_tokens)
        settings = {"n_prompts": args.prompts, "max_tokens": args.max_tokens, "n_candidates": 64}
        measured[head] = {**settings, "results": rows}
        write_json(path, measured)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "tokenizer": make_tokenizer,
    "target": make_target,
    "data": make_data,
    "drafters": make_drafters,
    "measure": make_measurements,
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["all", *STAGES])
    parser.add_argument("--work", type=Path, default=ROOT / "build/demo_pair", help="folder for intermediate files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--target-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1, help="seed of initial weights and training text")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in the work folder")
    parser.add_argument("--data-rows", type=int, default=2048)
    parser.add_argument("--vanilla-steps", type=int, default=1500)
    parser.add_argument("--other-steps", type=int, default=800)
    parser.add_argument("--target-batch", type=int, default=12, help="rows of 384 tokens per step and process")
    parser.add_argument("--target-rate", type=float, default=1.0, help="factor on the target's learning rates")
    parser.add_argument("--target-minutes", type=float, help="end the target's training early")
    parser.add_argument("--vanilla-minutes", type=float, help="end the vanilla drafter's training early")
    parser.add_argument("--other-minutes", type=float, help="end the other drafters' training early")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--prompts", type=int, default=40, help="prompts per domain to measure on")
    parser.add_argument("--max-tokens", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    """Run one stage, or all of them in order."""
    args = parse_arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "nccl")
    for name, stage in STAGES.items():
        if args.stage in ("all", name):
            stage(args)


if __name__ == "__main__":
    main()
