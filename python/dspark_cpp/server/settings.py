"""What a server may be told: the only home of its defaults and limits. Plain data, checked when it is made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspark_cpp.config import EngineConfig

__all__ = ["Limits", "ServerConfig", "StaticModel", "parse_duration"]

_LONGEST_SECONDS = 100 * 365 * 86400.0  # what is longer is for ever
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one request may ask for.

    Attributes
    ----------
    body_bytes, blob_bytes
        Most bytes of a JSON body, of an uploaded blob.
    json_depth, schema_depth, schema_nodes
        Deepest nesting of a body, and of a JSON schema in it; most values in a schema.
    messages, tools, images, stops, inputs
        Most messages, tools, images of one request, stop strings, texts to embed.
    choices, top_logprobs
        Most answers to one prompt, alternatives shown beside a token.
    body_seconds, header_seconds
        Longest wait for the next bytes of a body, for the header of a request.
    """

    body_bytes: int = 32 * 2**20
    blob_bytes: int = 2**40
    json_depth: int = 64
    schema_depth: int = 24
    schema_nodes: int = 2000
    messages: int = 2048
    tools: int = 128
    images: int = 16
    stops: int = 32
    inputs: int = 2048
    choices: int = 8
    top_logprobs: int = 20
    body_seconds: float = 30.0
    header_seconds: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticModel:
    """A model given on the command line; it needs no store.

    Attributes
    ----------
    name
        What clients call it.
    target, draft
        GGUF files.
    template
        A chat template to use in place of the file's.
    """

    name: str
    target: Path
    draft: Path | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How a server runs.

    Attributes
    ----------
    host, port
        Where it listens; port 0 takes a free one.
    models
        Models beside those of the store.
    store
        Folder of the store; None: none.
    engine
        Options of every engine; `n_parallel` requests of a model run at the same time.
    max_queue
        Requests that may wait, for a place or for a model; one more is refused with 503.
    request_timeout
        Seconds a request may take from its arrival; 0: no limit.
    keep_alive
        Seconds a model stays loaded after its last request; infinite: until its place is needed.
    max_memory
        Bytes that loaded models may take together; 0: 90 % of the machine's.
    api_key
        Key that clients must send; None: none.
    origins, hosts
        Origins of web pages and names of this machine that are accepted beside the usual ones; `*` accepts all.
    drain_timeout
        Seconds that running requests get to end after a signal.
    log_format
        "text" or "json".
    tls_certificate, tls_key
        PEM files; with them the server speaks HTTPS.
    limits
        How much one request may ask for.
    """

    host: str = "127.0.0.1"
    port: int = 11434
    models: tuple[StaticModel, ...] = ()
    store: Path | None = None
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(n_parallel=4))
    max_queue: int = 512
    request_timeout: float = 0.0
    keep_alive: float = 300.0
    max_memory: int = 0
    api_key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    drain_timeout: float = 30.0
    log_format: str = "text"
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _require("port", self.port, 0 <= self.port < 65536, "be in 0 .. 65535")
        _require("max_queue", self.max_queue, self.max_queue >= 1, "be at least 1")
        _require("request_timeout", self.request_timeout, self.request_timeout >= 0, "be at least 0")
        _require("drain_timeout", self.drain_timeout, self.drain_timeout >= 0, "be at least 0")
        _require("max_memory", self.max_memory, self.max_memory >= 0, "be at least 0")
        _require("log_format", self.log_format, self.log_format in ("text", "json"), "be text or json")
        is_pair = (self.tls_certificate is None) == (self.tls_key is None)
        _require("tls_key", self.tls_key, is_pair, "come with a certificate, and the other way round")
        _require("api_key", "an empty text", self.api_key != "", "not be empty")


def parse_duration(value: Any) -> float:
    """Return seconds from Ollama's `keep_alive`: a number of seconds or a text such as "5m"; negative is infinite.

    Raises
    ------
    ValueError
        If it is neither.
    """
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(max(min(value, 2 * _LONGEST_SECONDS), -1.0)) if value == value else math.nan
    elif isinstance(value, str):
        seconds = _parse_text(value.strip())
    if math.isnan(seconds):
        raise ValueError(f"keep_alive must be seconds or a duration such as 5m, got {str(value)[:50]!r}")
    return math.inf if seconds < 0 or seconds > _LONGEST_SECONDS else seconds


def _parse_text(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    text = text.removeprefix("-")
    try:
        return sign * float(text)
    except ValueError:
        parts = _DURATION.findall(text)
        is_whole = bool(parts) and "".join(map("".join, parts)) == text
        return sign * sum(float(number) * _UNITS[unit] for number, unit in parts) if is_whole else math.nan


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} must {rule}, got {value}")
