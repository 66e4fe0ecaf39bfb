"""A process of its own for chat templates and JSON schemas: `python -m dspark_cpp.server.template_worker SECONDS`.

A template comes with a model's file and is a program: it may loop for hours or fill the memory. Here it can do so
without the server: the parent ends this process after a time, and should the parent be gone, the system does after
SECONDS of computing; the memory is limited, the environment is bare. A line `{}` says that it is ready, then one JSON
value per line comes in, one goes out.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from dspark_cpp import _core

_MEMORY_BYTES = 1 << 30


def main() -> None:
    """Answer until the input ends."""
    _limit_memory()
    _say({})
    for line in sys.stdin.buffer:
        _limit_time(int(sys.argv[1]))
        _say(_answer(line))


def _say(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        work = {"plan": _core.plan_chat, "grammar": _core.json_schema_to_grammar}[request["work"]]
        return {"result": work(json.dumps(request["argument"], ensure_ascii=False))}
    except (ValueError, MemoryError) as error:
        return {"error": str(error) or "out of memory"}


def _limit_memory() -> None:
    """Allow this much more than the libraries have mapped already."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        n_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = n_pages * resource.getpagesize() + _MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _limit_time(seconds: int) -> None:
    """Allow this much more than was used already."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + seconds, most))


if __name__ == "__main__":
    main()
