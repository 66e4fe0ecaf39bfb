"""Templates are programs of strangers: they run apart, and a bomb costs its own request only."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

import pytest
from dspark_cpp.server.problems import BadRequestError
from dspark_cpp.server.template_sandbox import TemplateSandbox
from waiting import LIMIT_S

from .conftest import run_server

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
REQUEST = {"bos_token": "", "eos_token": "", "messages": [{"role": "user", "content": "Hi"}]}
TIME_BOMB = (
    "{% for i in range(100000) %}{% for j in range(100000) %}"
    "{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}"
)
MEMORY_BOMB = (
    "{% set ns = namespace(s='x' * 1) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}"
)


def ask(template: str, seconds: float = 4.0) -> str:
    """Render `template`, then a good one in the same sandbox; a good one takes a few milliseconds."""

    async def work() -> str:
        sandbox = TemplateSandbox(seconds)
        try:
            with pytest.raises(BadRequestError) as caught:
                await sandbox.plan_chat(REQUEST | {"template": template})
            good = await sandbox.plan_chat(REQUEST | {"template": CHATML})
            assert good["prompt"].startswith("<|im_start|>user\nHi<|im_end|>")
            return str(caught.value)
        finally:
            await sandbox.close()

    return asyncio.run(work())


@pytest.mark.parametrize("bomb", [TIME_BOMB, MEMORY_BOMB], ids=["time", "memory"])
def test_bombs_end_and_leave_the_sandbox_usable(bomb):
    assert "it takes too long, too much memory, or breaks" in ask(bomb)


def test_a_worker_whose_server_is_gone_ends_by_itself():
    """Killed with -9, a server ends nobody: the system does, after a second of computing here."""
    request = {"work": "plan", "argument": REQUEST | {"template": TIME_BOMB}}
    command = [sys.executable, "-m", "dspark_cpp.server.template_worker", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as worker:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        assert worker.wait(LIMIT_S) == -signal.SIGXCPU


@pytest.mark.parametrize("template", ["{{ unclosed", "{% include '/etc/passwd' %}", "{{ raise_exception('no') }}"])
def test_bad_templates_are_told(template):
    assert "template" in ask(template)


@pytest.mark.slow
def test_server_survives_a_model_with_a_bomb(tmp_path, demo_target):
    bomb = tmp_path / "bomb.jinja"
    bomb.write_text(TIME_BOMB + CHATML)
    arguments = ("--model", str(demo_target), "--name", "bad", "--template", str(bomb), "--no-store")
    with run_server(tmp_path, *arguments) as server, server.client() as client:
        answer = client.post("/api/generate", json={"model": "bad", "prompt": "x", "raw": True, "stream": False,
                                                    "options": {"num_predict": 2}})  # fmt: skip
        assert answer.status_code == 200
        assert client.get("/health").status_code == 200
