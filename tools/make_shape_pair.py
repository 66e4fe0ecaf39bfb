"""Make a target and a drafter of a real model's shape with random weights: files to time, not to read.

    python tools/make_shape_pair.py --shape 0.6B --quant Q4_K_M             # into build/shapes
    python tools/make_shape_pair.py --shape 8B --n-layer 4 --draft-quant Q8_0 --draft-vocab 32768

Weights are drawn in their quantized form, so a file takes as long as the disk does. Nothing they generate is text:
`dspark bench --synthetic-acceptance` gives them the accepted lengths of a real pair.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from dspark_cpp.bench.random_pair import QUANTS, SHAPES, write_random_drafter, write_random_target

ROOT = Path(__file__).resolve().parents[1]


def make_pair(options: argparse.Namespace) -> tuple[Path, Path]:
    """Write both files; returns their paths."""
    shape = SHAPES[options.shape]
    stem = f"qwen3-{options.shape}-{options.quant}"
    if options.n_layer:
        shape, stem = replace(shape, n_layers=options.n_layer), f"{stem}-{options.n_layer}-layers"
    draft_quant = options.draft_quant or options.quant
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"{stem}.gguf"
    vocab = f"-{options.draft_vocab}-tokens" if options.draft_vocab else ""
    drafter = options.out / f"{stem}-drafter-{draft_quant}{vocab}.gguf"
    if not (options.keep and target.exists()):
        write_random_target(target, shape, options.quant, options.seed)
    write_random_drafter(drafter, target, draft_quant, draft_vocab=options.draft_vocab, seed=options.seed + 1)
    return target, drafter


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--quant", type=str.lower, choices=QUANTS, default="q4_k_m")
    parser.add_argument("--draft-quant", type=str.lower, choices=QUANTS, help="default: as the target")
    parser.add_argument("--draft-vocab", type=int, default=0, metavar="N", help="tokens the drafter proposes; 0: all")
    parser.add_argument("--n-layer", type=int, default=0, metavar="N", help="layers of the target; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="take a target file that is already there as it is")
    parser.add_argument("--out", type=Path, default=ROOT / "build/shapes", help="folder")
    return parser.parse_args(arguments)


def main() -> None:
    began = time.perf_counter()
    for path in make_pair(parse_options()):
        print(f"{path}  {path.stat().st_size / 1e6:.0f} MB")
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
