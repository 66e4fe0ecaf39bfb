"""llama-cpp-python and this package in one process, in either order of import.

Both carry their own llama.cpp, ours linked statically with hidden symbols: neither may find the other's functions. Each
order runs in a process of its own, loads the bundled target in both packages and generates with both, in turns, while
the other's model is still loaded. In 32-bit floats, so that two builds for different processors agree on the text.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import importlib, sys

sys.path[:] = {path!r}
for name in {order!r}:
    importlib.import_module(name)

import llama_cpp
from dspark_cpp import LLM, SamplingParams

def theirs():
    model = llama_cpp.Llama({target!r}, n_ctx=256, n_threads=1, verbose=False)
    def generate():
        tokens = []
        for token in model.generate({prompt!r}, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(token)
            if len(tokens) == 12:
                return tokens
    return generate, model.close

def ours():
    model = LLM({target!r}, {drafter!r}, n_ctx=256, n_threads=1)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return lambda: model.generate({prompt!r}, params)[0].token_ids, model.close

makers = dict(llama_cpp=theirs, dspark_cpp=ours)
models = [makers[name]() for name in {order!r}]
first = [generate() for generate, _ in models]
second = [generate() for generate, _ in reversed(models)]
for _, close in models:
    close()
assert first == second[::-1], (first, second)
print(*first, sep="\\n")
"""
PROMPT = list(range(40, 60))


@pytest.mark.parametrize("order", [("llama_cpp", "dspark_cpp"), ("dspark_cpp", "llama_cpp")], ids="-then-".join)
def test_import_beside_llama_cpp_works(order: tuple[str, str], f32_target: Path, f32_drafter: Path) -> None:
    # Not importorskip: importing it here would put its libraries into every later test.
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    script = SCRIPT.format(path=sys.path, order=order, target=str(f32_target), drafter=str(f32_drafter), prompt=PROMPT)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs_and_ours = done.stdout.splitlines()
    assert len(theirs_and_ours) == 2
    assert theirs_and_ours[0] == theirs_and_ours[1]  # same weights, same greedy text
