"""The bundled pair on an accelerator: the same numbers, the same texts, the same acceptance as on the CPU.

Run by `tools/gpu_run.sh`, with `tests/test_graph_head.py` on the same device.

Tolerances. A GPU multiplies f32 matrices in tf32 (10 mantissa bits) where it may: sums are off by some 1e-3 of their
largest term, and a dozen layers add up. Texts are compared up to the first decision nearer than that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("dspark_cpp._core")

from dspark_cpp import LLM, SamplingParams, _core
from pairs import HEADS, convert_heads, count_complete, greedy, read_prompts, run, run_plain
from test_goldens import CASES, load_case, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not any("gpu" in device.kind.lower() for device in _core.build_info().devices), reason="no GPU in this build"
    ),
]

LARGEST_ERROR = 2e-2
MARGIN = 0.1


@pytest.fixture(scope="module")
def target(f32_target: Path) -> _core.Model:
    return _core.Model.load_target(str(f32_target), n_gpu_layers=-1)


@pytest.fixture(scope="module")
def drafters(f32_target: Path, target: _core.Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, _core.Model]:
    files = convert_heads(f32_target, tmp_path_factory.mktemp("gpu"))
    return {head: _core.Model.load_drafter(str(path), target, n_gpu_layers=-1) for head, path in files.items()}


@pytest.mark.parametrize("head", HEADS)
def test_drafter_equals_the_reference(head: str, target: _core.Model, drafters: dict[str, _core.Model]) -> None:
    for case in CASES:
        golden = load_case(head, case)
        probe = _core._testing.draft_probe(target, drafters[head], golden["tokens"].tolist())
        kept, columns = len(golden["taps"]), golden["columns"]
        ours = {
            "taps": probe["taps"][-kept:],
            "h_ctx": probe["h_ctx"][-kept:],
            "hidden": probe["hidden"],
            "base_logits": probe["base_logits"][:, columns],
            "confidence": 1 / (1 + np.exp(-np.asarray(probe["confidence_logits"]))),
        }
        errors = {name: relative_error(value, golden[name]) for name, value in ours.items()}
        print(head, case, {name: f"{error:.1e}" for name, error in errors.items()})
        assert max(errors.values()) < LARGEST_ERROR, errors


@pytest.mark.parametrize("form", ["candidates", "graph"])
@pytest.mark.parametrize("n_parallel", [1, 4])
def test_greedy_text_is_that_of_the_cpu(
    form: str, n_parallel: int, f32_target: Path, target: _core.Model, drafters: dict[str, _core.Model]
) -> None:
    on_cpu = _core.Model.load_target(str(f32_target), n_gpu_layers=0)
    prompts = [on_cpu.tokenize(text) for text in read_prompts(12)]
    plain = run_plain(on_cpu, prompts, 48)
    engine = _core.Engine(
        target, drafters["vanilla"], n_ctx=512, n_parallel=n_parallel, head=form, prefix_reuse=False, policy="full"
    )
    answers = run(engine, prompts, lambda i: greedy(48))
    assert count_complete(plain, answers, MARGIN) > 0.1
    assert sum(answer.stats.n_accepted for answer in answers) > sum(answer.stats.n_rounds for answer in answers)


def test_acceptance_is_that_of_the_cpu(demo_target: Path, demo_drafter: Path, questions: list[str]) -> None:
    params = SamplingParams(temperature=0, max_tokens=96, policy="full")
    lengths = []
    for n_gpu_layers in (0, -1):
        with LLM(demo_target, demo_drafter, n_ctx=512, n_parallel=4, n_gpu_layers=n_gpu_layers) as llm:
            replies = [llm.chat([{"role": "user", "content": question}], params) for question in questions]
        rounds = sum(reply.stats.n_rounds for reply in replies)
        lengths.append(sum(reply.stats.n_accepted for reply in replies) / rounds)
    on_cpu, on_gpu = lengths
    assert on_gpu == pytest.approx(on_cpu, rel=0.05)  # a near tie now and then
