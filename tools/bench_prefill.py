"""Time to read a prompt with and without a drafter, whose features are recorded meanwhile.

    python tools/bench_prefill.py --target T.gguf --drafter D.gguf [--tokens 1024] [--repeats 6]

Both ways take turns, each with its engine open all the time; the ratio is taken within a repetition. Tokens are random.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from statistics import median

from bench_reuse import answer
from dspark_cpp import _core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    target = _core.Model.load_target(str(options.target))
    drafter = _core.Model.load_drafter(str(options.drafter), target)
    sizes = {"n_ctx": options.tokens + 16, "n_parallel": 1, "prefix_reuse": False}
    engines = [_core.Engine(target, model, **sizes) for model in (None, drafter)]
    source = random.Random(1)
    rows: list[tuple[float, float]] = []
    for _ in range(options.repeats + 1):  # the first one warms up
        prompt = [source.randrange(target.n_vocab // 2) for _ in range(options.tokens)]
        without, with_drafter = (answer(engine, prompt, 1).first_ms / 1e3 for engine in engines)
        rows.append((without, with_drafter))
    without, with_drafter = (options.tokens / median(column) for column in zip(*rows[1:], strict=True))
    ratios = sorted(a / b for a, b in rows[1:])
    print(f"{options.tokens} tokens: {without:.0f} tokens/s without a drafter, {with_drafter:.0f} with one")
    print(f"with over without: {median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} turns)")


if __name__ == "__main__":
    main()
