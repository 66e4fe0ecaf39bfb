"""A drafter without a confidence head through the engine, every policy, the scheduler's learning and the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dspark_cpp import LLM, SamplingParams, _core
from pairs import read_prompts

PROMPTS = read_prompts(3)  # in chat form: raw questions end at once
POLICIES = ["off", "full", "fixed:3", "threshold:0.5", "algorithm1", "adaptive"]


@pytest.fixture(scope="module")
def pair(demo_target: Path, no_confidence_drafter: Path) -> tuple[_core.Model, _core.Model]:
    target = _core.Model.load_target(str(demo_target))
    return target, _core.Model.load_drafter(str(no_confidence_drafter), target)


def test_there_is_no_confidence(pair: tuple[_core.Model, _core.Model]) -> None:
    assert not pair[1].drafter_info.has_confidence
    engine = _core.Engine(*pair, n_ctx=256, n_threads=1, policy="full")
    engine.submit(pair[0].tokenize(PROMPTS[0]), _core.RequestOptions(max_tokens=16, temperature=0, trace=True))
    rounds = [record for _ in range(20) for event in engine.step() for record in event.rounds]
    engine.close()
    assert any(record.n_drafted == 7 for record in rounds)
    assert all(record.confidence_logits == [] for record in rounds)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_writes_the_target_s_text(policy: str, pair: tuple[_core.Model, _core.Model]) -> None:
    params = SamplingParams(temperature=0, max_tokens=40)
    with LLM(*pair, n_ctx=256, n_parallel=3, n_threads=1, policy=policy) as llm:
        answers = llm.generate(PROMPTS[:3], params)
        alone = [llm.generate(question, params)[0] for question in PROMPTS[:3]]
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in alone]
    assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    n_drafted = sum(answer.stats.n_drafted for answer in answers)
    assert (n_drafted == 0) == (policy == "off") or policy in ("adaptive", "algorithm1")
    if policy == "threshold:0.5":  # expected acceptance takes the confidence's place
        assert sum(answer.stats.n_scheduled for answer in answers) > 0


def test_expectations_learn_from_outcomes(pair: tuple[_core.Model, _core.Model]) -> None:
    """Useless drafts (all but impossible to accept at a high temperature) make algorithm 1 schedule less."""
    n_scheduled = {}
    for temperature in (0.0, 4.0):
        params = SamplingParams(temperature=temperature, max_tokens=60, seed=1, policy="threshold:0.5", ignore_eos=True)
        with LLM(*pair, n_ctx=256, n_threads=1) as llm:
            [answer] = llm.generate(PROMPTS[0], params)
        n_scheduled[temperature] = answer.stats.n_scheduled / max(answer.stats.n_rounds, 1)
    assert n_scheduled[4.0] < n_scheduled[0.0]


def test_benchmark_runs(no_confidence_drafter: Path, demo_target: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "dspark_cpp.cli", "bench", str(demo_target), "--draft", str(no_confidence_drafter)]
    options = "--concurrency 2 --temperatures 1 --domains chat --policies adaptive,threshold:0.5 --n-tokens 16"
    options += " --repeats 1 --n-threads 1"
    result = subprocess.run(
        [*command, *options.split(), "--json", str(report)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    text = json.dumps(json.loads(report.read_text(encoding="utf-8")))
    assert "adaptive" in text
    assert "threshold:0.5" in text
