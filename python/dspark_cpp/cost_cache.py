"""What passes cost on this machine, kept between runs.

Owns: the files of measured costs and the key that tells when one no longer fits. Must not know: how costs are measured
or used. Any thread, any number of processes: files are replaced whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from dspark_cpp import _core
from dspark_cpp.compute_thread import compute_thread
from dspark_cpp.config import EngineConfig

__all__ = ["CostCache", "cache_folder", "prepare_costs"]

_log = logging.getLogger(__name__)

_FORMAT = 8

_LOOK_MS = 100.0  # budget of the look that confirms costs
_MOST_LOOK_PASS_MS = 10.0  # longer passes suffer less from a bad moment, and a look has a dozen of them or more
_AGREE = 1.6  # times as dear against plain decoding, one way or the other, are still the same costs
_MOST_SECONDS = 1.5  # after which nothing is measured again, so that all of it takes 3 s at most


def cache_folder() -> Path:
    """Where caches lie: DSPARK_CACHE, or dspark-cpp in the user's cache folder."""
    named = os.environ.get("DSPARK_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "dspark-cpp"
    try:
        return Path.home() / ".cache" / "dspark-cpp"
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir()) / "dspark-cpp"


class CostCache:
    """The measured costs of one pair in one setting on one machine.

    Parameters
    ----------
    target, drafter
        The models.
    settings
        `Engine.settings`: threads, types, sizes.
    """

    def __init__(self, target: _core.Model, drafter: _core.Model | None, settings: dict[str, int | str | bool]) -> None:
        build = _core.build_info()
        self._key: dict[str, Any] = {
            "format": _FORMAT,
            "version": build.version,
            "llama_cpp": build.llama_cpp_commit,
            "features": build.system_info,
            "devices": [[device.name, device.description, device.memory_total_bytes] for device in build.devices],
            "target": _identity(target),
            "drafter": None if drafter is None else _identity(drafter),
            "settings": dict(settings),
            "kernels": [target.uses_kernels, _core.kernel_instruction_set(), _core.kernel_types()],
        }
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._path = cache_folder() / "costs" / f"{digest[:32]}.json"

    @property
    def path(self) -> Path:
        """The file, whether it exists or not."""
        return self._path

    def load(self) -> _core.CostCurves | None:
        """Return the stored costs; None when there are none, or the file is damaged or was made for something else."""
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["key"] != self._key:
                return None
            curves: _core.CostCurves = stored["costs"]
            for name in ("verify", "plain", "prefill", "draft", "inject"):
                curves[name] = [(int(size), float(ms)) for size, ms in curves[name]]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("cannot use the measured costs in %s: %s", self._path, error)
            return None
        return curves

    def store(self, curves: _core.CostCurves) -> None:
        """Replace the stored costs; a folder that cannot be written costs a measurement next time, no more."""
        file = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump({"key": self._key, "costs": curves}, file)
            os.replace(file.name, self._path)
        except OSError as error:
            if file is not None:
                Path(file.name).unlink(missing_ok=True)
            _log.warning("cannot keep the measured costs in %s: %s", self._path, error)


def prepare_costs(
    target: _core.Model, drafter: _core.Model | None, engine: _core.Engine, config: EngineConfig
) -> CostCache | None:
    """Give a fresh engine its costs, measured or from the cache. Returns where to keep what it learns, if anywhere."""
    if drafter is None or config.costs == "none" or config.policy not in ("adaptive", "algorithm1"):
        return None
    cache = CostCache(target, drafter, engine.settings)
    curves = cache.load() if config.costs == "auto" else None
    if curves is not None:
        try:
            engine.set_costs(curves)
            if _are_confirmed(engine, curves):
                return cache
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            _log.warning("cannot use the measured costs in %s: %s", cache.path, error)
    cache.store(_measure(engine))
    return cache


def _measure(engine: _core.Engine) -> _core.CostCurves:
    end = time.monotonic() + _MOST_SECONDS
    curves = compute_thread.run(engine.measure_costs)
    while time.monotonic() < end and not _are_confirmed(engine, curves):
        curves = compute_thread.run(engine.measure_costs)
    return curves


def _are_confirmed(engine: _core.Engine, curves: _core.CostCurves) -> bool:
    """Whether a second look finds the same; leaves the engine with `curves`.

    Drafts that were measured in a bad moment (something else had a processor) look ten times too dear, and then hardly
    anything ever drafts that could correct it.
    """
    if dict(curves["plain"] or curves["verify"]).get(1, 0.0) > _MOST_LOOK_PASS_MS:
        return True
    look = compute_thread.run(lambda: engine.measure_costs(budget_ms=_LOOK_MS))
    engine.set_costs(curves)
    return _agree(curves, look)


def _agree(one: _core.CostCurves, other: _core.CostCurves) -> bool:
    """Whether drafting and verifying cost about as many plain passes in both; what only one of them has is left out."""
    sizes = dict(one["verify"]).keys() & dict(other["verify"]).keys() - {1}
    ratios = []
    for curves in (one, other):
        verify, draft, plain = (dict(curves[name]) for name in ("verify", "draft", "plain"))
        plain_ms = plain.get(1) or verify.get(1, 0.0)
        if not sizes or not draft.get(1) or plain_ms <= 0:
            return True
        ratios.append((median(verify[size] for size in sizes) + draft[1]) / plain_ms)
    return max(ratios) <= _AGREE * min(ratios)


def _identity(model: _core.Model) -> list[str | int]:
    """Return what a model's costs depend on: its shape and types, not its name or place."""
    return [model.architecture, model.description, model.size_bytes, model.n_params, model.n_layer, model.n_vocab]
