"""What Prometheus reads. Names follow KEP-5823 (``*_operations_total``, ``*_duration_seconds``, ``*_size_bytes``)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

import chrek

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
_BYTES = tuple(float(1 << power) for power in range(20, 42, 2))


class Metrics:
    """The agent's numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        operations = ("outcome", "reason")
        self._operations = {
            "checkpoint": self._counter("chrek_checkpoint_operations", "Captures that ended.", operations),
            "restore": self._counter("chrek_restore_operations", "Restores by this agent that ended.", operations),
        }
        self._durations = {
            name: Histogram(
                f"chrek_{name}_duration_seconds", f"Seconds of one {name}.", registry=self.registry, buckets=_SECONDS
            )
            for name in ("checkpoint", "restore")
        }
        self._sizes = {
            name: Histogram(
                f"chrek_{name}_size_bytes", f"Bytes moved by one {name}.", registry=self.registry, buckets=_BYTES
            )
            for name in ("checkpoint", "restore")
        }
        self._frozen = Histogram(
            "chrek_checkpoint_frozen_seconds",
            "Seconds an application stood still.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._phases = Histogram(
            "chrek_phase_duration_seconds",
            "Seconds of one phase.",
            ["operation", "phase"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._rates = Gauge(
            "chrek_rate_bytes_per_second", "Rate of the last operation.", ["operation"], registry=self.registry
        )
        self._starts = self._counter("chrek_starts", "Starts of containers, by how.", ("mode", "reason"))
        self._progress = Gauge(
            "chrek_operations_in_progress", "Operations under way.", ["operation"], registry=self.registry
        )
        self._queued = Gauge("chrek_captures_queued", "Captures that wait for their turn.", registry=self.registry)
        self._info = Gauge(
            "chrek_agent_info",
            "Versions, value 1.",
            ["version", "criu", "driver", "runtime", "kernel"],
            registry=self.registry,
        )
        self._api_failures = self._counter(
            "chrek_api_failures", "Requests to the Kubernetes API that were refused or not answered.", ("status",)
        )
        for name in ("checkpoint", "restore"):
            self._progress.labels(name).set(0)

    def _counter(self, name: str, what: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, what, labels, registry=self.registry)

    def versions(self, *, criu: str, driver: str, runtime: str) -> None:
        """Say what is at work here."""
        self._info.labels(chrek.__version__, criu, driver, runtime, platform.release()).set(1)

    def ended(self, operation: str, outcome: str, reason: str = "") -> None:
        """Count an operation that ended: created, skipped, refused, failed, restored."""
        self._operations[operation].labels(outcome, reason).inc()

    def measured(self, operation: str, *, seconds: float, size: int, phases: Mapping[str, float]) -> None:
        """Note times and sizes of an operation that worked."""
        self._durations[operation].observe(seconds)
        self._sizes[operation].observe(size)
        self._rates.labels(operation).set(size / seconds if seconds > 0 else 0)
        for phase, took in phases.items():
            self._phases.labels(operation, phase).observe(took)

    def frozen(self, seconds: float) -> None:
        """Note how long an application stood still."""
        self._frozen.observe(seconds)

    def started(self, mode: str, reason: str) -> None:
        """Count how a container started."""
        self._starts.labels(mode, reason or "none").inc()

    def under_way(self, operation: str, change: int) -> None:
        """Note that an operation began (1) or ended (-1)."""
        self._progress.labels(operation).inc(change)

    def api_failed(self, status: int | None) -> None:
        """Count a request to the API that failed with this status, None: nobody answered."""
        self._api_failures.labels(str(status or "none")).inc()

    def queue(self, length: Callable[[], int]) -> None:
        """Say how the length of the queue is asked for."""
        self._queued.set_function(lambda: float(length()))

    def text(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self.registry)
