"""The server's side of `template_worker`: starts it, asks it, ends it when it takes too long. Event loop only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from dspark_cpp.server.problems import BadRequestError

__all__ = ["TemplateSandbox"]

_ANSWER_SECONDS = 10.0
_START_SECONDS = 120.0  # for the interpreter and the libraries: from a slow disk, or on a busy machine
_SPARE_SECONDS = 5  # of computing, before the system ends a worker whose server was killed
_MAX_ANSWER_BYTES = 64 * 2**20
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HOME", "LANG", "SYSTEMROOT")


class TemplateSandbox:
    """Renders the templates of one model in a process of its own.

    Parameters
    ----------
    answer_seconds
        Seconds that one rendering may take; the start of the process is not counted.
    """

    def __init__(self, answer_seconds: float = _ANSWER_SECONDS) -> None:
        self._answer_seconds = answer_seconds
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def plan_chat(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `_core.plan_chat` says of a request.

        Raises
        ------
        BadRequestError
            With the template's complaint, or when it takes too long or too much memory.
        """
        plan: dict[str, Any] = json.loads(await self._ask("plan", request))
        return plan

    async def grammar_of(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of a JSON schema; raises as `plan_chat`."""
        return await self._ask("grammar", schema)

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, work: str, argument: Mapping[str, Any]) -> str:
        line = json.dumps({"work": work, "argument": argument}).encode() + b"\n"
        async with self._turn:
            try:
                process = await asyncio.wait_for(self._running(), _START_SECONDS)
                answer = await asyncio.wait_for(_exchange(process, line), self._answer_seconds)
            except (TimeoutError, ValueError, OSError, asyncio.IncompleteReadError):
                await self.close()
                what = "the chat template" if work == "plan" else "the JSON schema"
                raise BadRequestError(f"cannot use {what}: it takes too long, too much memory, or breaks") from None
            except asyncio.CancelledError:
                await self.close()  # its answer would be taken for the next one's
                raise
        if "error" in answer:
            raise BadRequestError(answer["error"])
        return str(answer["result"])

    async def _running(self) -> asyncio.subprocess.Process:
        """Return the process, started and ready."""
        if self._process is None or self._process.returncode is not None:
            self._process = await _start(math.ceil(self._answer_seconds) + _SPARE_SECONDS)
            await _read(self._process)
        return self._process


async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any]:
    assert process.stdin is not None
    process.stdin.write(line)
    await process.stdin.drain()
    return await _read(process)


async def _read(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    answer: dict[str, Any] = json.loads(await process.stdout.readuntil(b"\n"))
    return answer


async def _start(cpu_seconds: int) -> asyncio.subprocess.Process:
    environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dspark_cpp.server.template_worker",
        str(cpu_seconds),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=_MAX_ANSWER_BYTES,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # a terminal's Ctrl-C is the server's to handle
    )
