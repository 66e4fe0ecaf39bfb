"""Upstream's llama-server of the same llama.cpp tree: building, starting, stopping. Knows no benchmark."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspark_cpp import build_info
from dspark_cpp.cost_cache import cache_folder

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/upstream"
START_SECONDS = 300


def cached_server() -> Path:
    """Return llama-server, built on first use and kept in the user's cache: a cleaned checkout need not build it again.

    The key is what decides the binary: the pinned tree, the flags, the compiler and the processor.
    """
    info, flags = build_info(), os.environ.get("CMAKE_ARGS", "")
    compilers = [os.environ.get(name) or sysconfig.get_config_var(name) or "" for name in ("CC", "CXX")]
    parts = [info.llama_cpp_commit, info.system_info, flags, *compilers]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    kept = cache_folder() / "upstream" / key / "llama-server"
    if not kept.exists():
        built = build_server()
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        shutil.copy2(built, temporary)
        temporary.replace(kept)
    return kept


def build_server() -> Path:
    """Build llama-server out of this project's own configuration: same flags, so that only the code differs."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for name in ("CC", "CXX"):  # as scikit-build-core does, so that ccache knows the objects of the package
        environment.setdefault(name, (sysconfig.get_config_var(name) or {"CC": "cc", "CXX": "c++"}[name]).split()[0])
    cmake = shutil.which("cmake", path=environment["PATH"]) or sys.exit("cmake must be on the PATH")
    import pybind11

    configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    configure += ["-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_USE_PREBUILT_UI=OFF"]
    configure += shlex.split(environment.get("CMAKE_ARGS", ""))
    subprocess.run(configure, env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([cmake, "--build", str(BUILD), "--target", "llama-server"], env=environment, check=True)
    return BUILD / "bin/llama-server"


def server_command(
    server: Path, options: argparse.Namespace, port: int, draft_length: int, n_streams: int = 1, p_min: float = 0.0
) -> list[str]:
    """Build the command: no prompt cache, one cache for all slots; `draft_length` 0 is plain decoding."""
    threads = str(options.threads)
    command = [str(server), "--model", str(options.target), "--host", "127.0.0.1", "--port", str(port), "--offline"]
    command += ["--parallel", str(n_streams), "--kv-unified", "--ctx-size", str(options.n_ctx * n_streams)]
    command += ["--batch-size", "512", "--ubatch-size", "512"]
    command += ["--threads", threads, "--threads-batch", threads, "--n-gpu-layers", str(options.n_gpu_layers)]
    command += ["--flash-attn", "on" if uses_flash_attention(options) else "off", "--fit", "off", "--no-webui"]
    command += ["--no-cache-prompt", "--cache-ram", "0", "--ctx-checkpoints", "0", "--no-context-shift"]
    if draft_length > 0:
        command += ["--spec-type", "draft-dspark", "--spec-draft-model", str(options.drafter)]
        command += [
            "--spec-draft-n-max",
            str(draft_length),
            "--spec-draft-n-min",
            "0",
            "--spec-draft-p-min",
            str(p_min),
        ]
        command += ["--spec-draft-threads", threads, "--spec-draft-threads-batch", threads]
        command += ["--spec-draft-ngl", str(options.n_gpu_layers)]
    return command


@contextmanager
def running_server(command: list[str], port: int, log_file: Path | None = None) -> Iterator[str]:
    """Start a server, wait until it answers, stop it in the end; yields its address. Its log stays in `log_file`."""
    with (
        tempfile.TemporaryDirectory() as folder,
        (log_file or Path(folder) / "log").open("w+", errors="replace") as log,
    ):
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}"
        except Exception:
            log.seek(0)
            sys.stderr.write("".join(log.readlines()[-30:]))
            raise
        finally:
            process.terminate()
            process.wait()


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(f"llama-server must answer within {START_SECONDS} s")


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send JSON, return the JSON that answers it."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        reply: dict[str, Any] = json.load(response)
        return reply


def uses_flash_attention(options: argparse.Namespace) -> bool:
    """Say whether both sides use it: as both do by default where speed is compared, off on a CPU where texts are."""
    if options.flash_attention is None:
        is_gpu = any("gpu" in device.kind.lower() for device in build_info().devices)
        return is_gpu or options.sweep or options.drafting
    return options.flash_attention == "on"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
