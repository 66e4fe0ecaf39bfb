"""Figures for Prometheus. One registry per server. Event loop only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dspark_cpp.results import RequestStats
from dspark_cpp.server.loaded_model import LoadedModel

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_LENGTHS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 12, 16)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_SPEEDUPS = (0.5, 0.75, 0.9, 1, 1.1, 1.25, 1.5, 2, 2.5, 3, 4, 5)


class Metrics:
    """Counts what requests did.

    Parameters
    ----------
    models
        Returns what is loaded.
    n_waiting
        Returns how many requests wait for a model.
    """

    def __init__(self, models: Callable[[], Sequence[LoadedModel]], n_waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(models, n_waiting))
        counter, histogram = self._counter, self._histogram
        self._requests = counter("dspark_requests", "Requests by what became of them", ["path", "status"])
        self._seconds = histogram("dspark_request_seconds", "Time of a request", ["path"], _SECONDS)
        self._first = histogram("dspark_first_token_seconds", "Time to the first token", ["model"], _SECONDS)
        self._tokens = counter("dspark_tokens", "Tokens read (prompt) and generated", ["model", "kind"])
        self._rate = histogram("dspark_tokens_per_second", "Decoding speed of a request", ["model"], _RATES)
        self._length = histogram("dspark_accepted_length", "Tokens per round of a request", ["model"], _LENGTHS)
        self._speedup = histogram("dspark_speedup", "Against plain decoding, by measured costs", ["model"], _SPEEDUPS)
        self._rounds = counter("dspark_rounds", "Passes of the target that decoded", ["model"])
        self._parked = counter("dspark_rounds_parked", "Of those, without a drafted token", ["model"])
        self._drafts = counter("dspark_draft_tokens", "Tokens drafted, scheduled, accepted", ["model", "kind"])
        self._position = counter("dspark_position_tokens", "By position in the block", ["model", "kind", "position"])
        self._scheduled = counter("dspark_scheduled_rounds", "Rounds by drafted tokens verified", ["model", "length"])
        self._time = counter("dspark_step_seconds", "Time of requests by part of the step", ["model", "part"])

    def text(self) -> bytes:
        """Return everything in Prometheus' format."""
        return generate_latest(self.registry)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an exchange; `path` must be a route, not what a client wrote."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_answer(self, model: str, stats: RequestStats, n_generated: int, prompt_ns: int, decode_ns: int) -> None:
        """Count a finished answer."""
        self._first.labels(model).observe(prompt_ns / 1e9)
        self._tokens.labels(model, "prompt").inc(stats.n_prompt)
        self._tokens.labels(model, "generated").inc(n_generated)
        if n_generated > 1:
            self._rate.labels(model).observe((n_generated - 1) * 1e9 / decode_ns)
        if stats.n_rounds:
            self._count_speculation(model, stats)

    def _count_speculation(self, model: str, stats: RequestStats) -> None:
        self._length.labels(model).observe(stats.accepted_length)
        if stats.speedup:
            self._speedup.labels(model).observe(stats.speedup)
        self._rounds.labels(model).inc(stats.n_rounds)
        kinds = {"drafted": stats.n_drafted, "scheduled": stats.n_scheduled, "accepted": stats.n_accepted}
        for kind, n in kinds.items():
            self._drafts.labels(model, kind).inc(n)
        positions = {"scheduled": stats.scheduled_per_position, "accepted": stats.accepted_per_position}
        for kind, counts in positions.items():
            for position, n in enumerate(counts, 1):
                self._position.labels(model, kind, str(position)).inc(n)
        # Rounds that verified at least k drafts, for k = 0, 1, ...: differences give those of exactly k.
        at_least = [stats.n_rounds, *stats.scheduled_per_position, 0]
        self._parked.labels(model).inc(max(at_least[0] - at_least[1], 0))
        for length, (n, n_next) in enumerate(pairwise(at_least)):
            self._scheduled.labels(model, str(length)).inc(max(n - n_next, 0))
        parts = {"draft": stats.draft_ms, "verify": stats.verify_ms, "host": stats.host_ms}
        for part, milliseconds in (parts | {"prefill": stats.prefill_ms, "queue": stats.queue_ms}).items():
            self._time.labels(model, part).inc(max(milliseconds, 0.0) / 1e3)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


class _Engines(Collector):
    """Reads the engines when asked."""

    def __init__(self, models: Callable[[], Sequence[LoadedModel]], n_waiting: Callable[[], int]) -> None:
        self._models = models
        self._n_waiting = n_waiting

    def collect(self) -> Iterable[Metric]:
        """Return gauges and totals of what is loaded now."""
        running = GaugeMetricFamily("dspark_running", "Requests that hold a place", labels=["model"])
        queued = GaugeMetricFamily("dspark_queued", "Requests that wait for a place", labels=["model"])
        cache = GaugeMetricFamily("dspark_cache_share", "Share of the cache in use", labels=["model"])
        memory = GaugeMetricFamily("dspark_memory_bytes", "Weights and caches", labels=["model", "part"])
        steps = CounterMetricFamily("dspark_engine_steps", "Steps of the engine", labels=["model"])
        times = CounterMetricFamily("dspark_engine_seconds", "Step time by part", labels=["model", "part"])
        plain = GaugeMetricFamily("dspark_plain_tokens_per_second", "Measured at load without drafts", labels=["model"])
        for model in self._models():
            name, engine = model.entry.name, model.llm.engine
            stats = engine.stats
            running.add_metric([name], engine.n_running)
            queued.add_metric([name], engine.n_queued)
            cache.add_metric([name], model.cache_share)
            for part, n_bytes in engine.memory_bytes.items():
                memory.add_metric([name, part], n_bytes)
            steps.add_metric([name], stats.n_steps)
            for part in ("draft", "verify", "inject", "host"):
                times.add_metric([name, part], getattr(stats, f"{part}_ms") / 1e3)
            plain.add_metric([name], model.plain_tokens_per_second or 0.0)
        waiting = GaugeMetricFamily("dspark_waiting_for_model", "Requests that wait for a model", self._n_waiting())
        return [running, queued, cache, memory, steps, times, plain, waiting]
