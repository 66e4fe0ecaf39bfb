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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dspark_cpp import _core
from dspark_cpp.compute_thread import compute_thread
from dspark_cpp.config import EngineConfig

__all__ = ["CostCache", "cache_folder", "prepare_costs"]

_log = logging.getLogger(__name__)

_CurveName = Literal["verify", "plain", "prefill", "draft", "inject"]
_SlopeName = Literal["verify_ms_per_row_cell", "draft_ms_per_block_cell"]

_FORMAT = 13

_N_KEPT = 3  # measurements; what all of them say is dear is believed to be
_LOOK_MS = 80.0  # of a look, more where a dozen passes take longer
_TOO_DEAR = 1.3  # times what a look finds: noise only adds, so the costs are wrong and not the look
_MOST_SECONDS = 1.5  # after which nothing is measured again, so that all of it takes 3 s at most
_CURVES: tuple[_CurveName, ...] = ("verify", "plain", "prefill", "draft", "inject")
_SLOPES: tuple[_SlopeName, ...] = ("verify_ms_per_row_cell", "draft_ms_per_block_cell")


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

    def load(self) -> list[_core.CostCurves]:
        """Return what was measured, the newest first; nothing where the file is damaged or made for something else."""
        try:
            stored = json.loads(self._path.read_text(encoding="utf-8"))
            if stored["key"] != self._key:
                return []
            measured: list[_core.CostCurves] = stored["measured"]
            for curves in measured:
                for name in _CURVES:
                    curves[name] = [(int(size), float(ms)) for size, ms in curves[name]]
                for slope in _SLOPES:
                    curves[slope] = float(curves[slope])
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("cannot use the measured costs in %s: %s", self._path, error)
            return []
        return measured

    def add(self, curves: _core.CostCurves) -> None:
        """Keep what an engine learned beside what was measured before."""
        self.store([curves, *self.load()])

    def store(self, measured: Sequence[_core.CostCurves]) -> None:
        """Keep the newest of the measurements, which come first, and nothing else.

        A folder that cannot be written costs a measurement next time, no more.
        """
        file = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump({"key": self._key, "measured": measured[:_N_KEPT]}, file)
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
    stored = cache.load() if config.costs == "auto" else []
    if stored:
        try:
            costs = cheapest(stored)
            engine.set_costs(costs)
            if not _is_too_dear(costs, _look(engine)):
                return cache
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            _log.warning("cannot use the measured costs in %s: %s", cache.path, error)
            stored = []
    measured = _measure(engine, stored)
    measured += stored
    engine.set_costs(cheapest(measured))
    cache.store(measured)
    return cache


def cheapest(measured: Sequence[_core.CostCurves]) -> _core.CostCurves:
    """Return the least time that any of the measurements has for each size.

    Something else on the machine only adds to a time, and what is priced too dear is not run and shows it late; what is
    priced too cheap is run, and shows it at once.

    Parameters
    ----------
    measured
        One measurement or more, the newest first. Of the costs of a context the newest are taken.
    """
    costs = measured[0].copy()
    for name in _CURVES:
        least: dict[int, float] = {}
        for curves in measured:
            for size, ms in curves[name]:
                least[size] = min(ms, least.get(size, ms))
        costs[name] = sorted(least.items())
    for slope in _SLOPES:
        costs[slope] = next((curves[slope] for curves in measured if curves[slope] > 0), 0.0)
    return costs


def _measure(engine: _core.Engine, stored: Sequence[_core.CostCurves]) -> list[_core.CostCurves]:
    """Measure until a look finds nothing cheaper. The look counts too, at the few sizes that it has."""
    end = time.monotonic() + _MOST_SECONDS
    measured: list[_core.CostCurves] = []
    while True:
        measured.insert(0, compute_thread.run(engine.measure_costs))
        if time.monotonic() > end:
            return measured
        look = _look(engine)
        costs = cheapest([*measured, *stored])
        if not _is_too_dear(costs, look):
            return measured
        if time.monotonic() > end:
            return [_bounded(measured[0], look), *measured[1:]]


def _bounded(costs: _core.CostCurves, look: _core.CostCurves) -> _core.CostCurves:
    """Return the costs where no size takes longer than it, or a larger one, did in the look."""
    bounded = cheapest([costs, look])
    for name in _CURVES:
        bounded[name] = [
            (size, min([ms, *(looked_ms for looked, looked_ms in look[name] if looked >= size)]))
            for size, ms in bounded[name]
        ]
    return bounded


def _look(engine: _core.Engine) -> _core.CostCurves:
    return compute_thread.run(lambda: engine.measure_costs(budget_ms=_LOOK_MS, look=True))


def _is_too_dear(costs: _core.CostCurves, look: _core.CostCurves) -> bool:
    """Whether any of the sizes that were looked at takes far less; what only one of the two has is left out."""
    names: tuple[_CurveName, ...] = ("verify", "plain", "draft")
    return any(dict(costs[name]).get(size, 0.0) > _TOO_DEAR * ms for name in names for size, ms in look[name])


def _identity(model: _core.Model) -> list[str | int]:
    """Return what a model's costs depend on: its shape and types, not its name or place."""
    return [model.architecture, model.description, model.size_bytes, model.n_params, model.n_layer, model.n_vocab]
