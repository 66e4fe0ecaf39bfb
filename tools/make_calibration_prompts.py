"""Draw the questions that the bundled pair is calibrated with: into python/dspark_cpp/demo/calibration_prompts.json.

    python tools/make_calibration_prompts.py [--n-prompts 360]

Questions held out of the target's training come first, then others of the same templates where those run out (the
target has not necessarily seen them). None is among the demo's or the tests' prompts, which judge the pair.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import count
from pathlib import Path

from demo_text import DOMAINS, SAMPLERS, is_held_out, render_prompt

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "python/dspark_cpp/demo"
TESTS = ROOT / "tests/data/demo_pair/prompts.json"
_MOST_DRAWS = 60_000


def draw_questions(domain: str, n_prompts: int, taken: set[str]) -> list[str]:
    """Return different questions of one domain, held-out ones as far as they go."""
    rng = random.Random(f"calibration {domain}")
    held_out: dict[str, None] = {}
    others: dict[str, None] = {}
    for i in count():
        question = SAMPLERS[domain](rng).question
        if render_prompt(question) not in taken:
            (held_out if is_held_out(question) else others).setdefault(question)
        if len(held_out) >= n_prompts or (i >= _MOST_DRAWS and len(held_out) + len(others) >= n_prompts):
            return [*held_out, *others][:n_prompts]
    raise AssertionError("count() has no end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-prompts", type=int, default=360, help="of every domain")
    options = parser.parse_args()
    taken = {prompt["text"] for prompt in json.loads(TESTS.read_text(encoding="utf-8"))["prompts"]}
    demo = json.loads((DEMO / "prompts.json").read_text(encoding="utf-8"))
    taken |= {render_prompt(question) for questions in demo.values() for question in questions}
    drawn = {domain: draw_questions(domain, options.n_prompts, taken) for domain in DOMAINS}
    for domain, questions in drawn.items():
        print(f"{domain}: {len(questions)} questions, {sum(map(is_held_out, questions))} of them held out of training")
    path = DEMO / "calibration_prompts.json"
    path.write_text(json.dumps(drawn, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
