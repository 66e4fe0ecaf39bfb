"""`dspark serve`: arguments and environment to a ServerConfig, one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dspark_cpp.config import EngineConfig
from dspark_cpp.server.address import parse_address

__all__ = ["register"]

_DEMO = Path(__file__).parents[1] / "demo"
_GIB = 2**30


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(serve)


def serve(
    model: Annotated[Path | None, typer.Option("--model", "-m", help="GGUF file of a target to serve.")] = None,
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="GGUF file of its drafter.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call it; default: the file's name.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the bundled pair as `demo`.")] = False,
    template: Annotated[Path | None, typer.Option(help="Chat template (Jinja) in place of the file's.")] = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Serve nothing but --model and --demo.")] = False,
    host: Annotated[str | None, typer.Option(help="Default: OLLAMA_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: OLLAMA_HOST, else 11434.")] = None,
    n_parallel: Annotated[int, typer.Option(help="Requests of a model that run at the same time.")] = 4,
    n_ctx: Annotated[int, typer.Option(help="Tokens of one request; 0: the model's, at most 4096.")] = 0,
    n_threads: Annotated[int, typer.Option(help="0: the engine's choice.")] = 0,
    n_gpu_layers: Annotated[int, typer.Option(help="-1: all.")] = -1,
    kv_type: Annotated[str, typer.Option(help="f16, f32, bf16, q8_0, q4_0.")] = "f16",
    policy: Annotated[str, typer.Option(help="auto, off, full, or drafted tokens a round.")] = "auto",
    max_queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 512,
    request_timeout: Annotated[float, typer.Option(help="Seconds; 0: no limit.")] = 0.0,
    keep_alive: Annotated[str | None, typer.Option(help="How long a model stays: 5m, 0, -1 for ever.")] = None,
    max_memory: Annotated[float, typer.Option(help="GiB for all models; 0: 90 % of the machine's.")] = 0.0,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key; or DSPARK_API_KEY.")] = None,
    origins: Annotated[str | None, typer.Option(help="Web origins to accept, by comma; or OLLAMA_ORIGINS.")] = None,
    allowed_hosts: Annotated[str, typer.Option(help="Names this server may be called by, by comma.")] = "",
    drain_timeout: Annotated[float, typer.Option(help="Seconds that running requests get at the end.")] = 30.0,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file; with --tls-key: HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file.")] = None,
) -> None:
    """Answer Ollama's and OpenAI's clients on one port."""
    from dspark_cpp.server.run import serve as run_server
    from dspark_cpp.server.settings import ServerConfig, StaticModel, parse_duration
    from dspark_cpp.store import default_root

    models = []
    text = None if template is None else template.read_text(encoding="utf-8")
    if demo:
        models.append(
            StaticModel(name="demo", target=_DEMO / "target.gguf", draft=_DEMO / "drafter.gguf", template=text)
        )
    if model is not None:
        models.append(StaticModel(name=name or model.stem, target=model, draft=draft, template=text))
    elif draft is not None or name is not None:
        raise ValueError("--draft and --name must come with --model")
    address = parse_address(os.environ.get("OLLAMA_HOST", ""))
    engine: dict[str, Any] = {
        "n_parallel": n_parallel,
        "n_ctx": n_ctx,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
        "kv_type": kv_type,
        "policy": int(policy) if policy.isdecimal() else policy,
    }
    config = ServerConfig(
        host=host or address.host,
        port=address.port if port is None else port,
        models=tuple(models),
        store=None if no_store else default_root(),
        engine=EngineConfig(**engine),
        max_queue=max_queue,
        request_timeout=request_timeout,
        keep_alive=parse_duration(keep_alive or os.environ.get("OLLAMA_KEEP_ALIVE") or "5m"),
        max_memory=int(max_memory * _GIB),
        api_key=_read_key(api_key_file),
        origins=_listed(origins if origins is not None else os.environ.get("OLLAMA_ORIGINS", "")),
        hosts=_listed(allowed_hosts),
        drain_timeout=drain_timeout,
        log_format=log_format,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
    )
    run_server(config)


def _read_key(path: Path | None) -> str | None:
    if path is not None:
        return path.read_text(encoding="utf-8").strip()
    return os.environ.get("DSPARK_API_KEY") or None


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
