"""What Prometheus reads from /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

# From one small picture on a GPU to a batch of large ones on two cores.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ServerMetrics:
    """Counters of one server, in a registry of its own; also the observer of its batches.

    Note:
        Thread safe.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = self._counter("ntf_requests", "Requests answered", "route", "method", "status")
        self.errors = self._counter("ntf_errors", "Requests and pictures refused or failed", "code")
        self.verdicts = self._counter("ntf_verdicts", "Pictures by verdict", "verdict")
        self.latency = self._histogram("ntf_request_seconds", "From the head of a request to its answer", "route")
        self.batch_size = Histogram(
            "ntf_batch_size", "Pictures scored at once", buckets=_BATCH_SIZES, registry=self.registry
        )
        self.waiting = self._histogram("ntf_picture_wait_seconds", "From the queue to the engine, decoding included")
        self.inference = self._histogram("ntf_inference_seconds", "Of one batch in the engine")
        self.model = Gauge(
            "ntf_model_info", "The model that scores", ("model", "backend", "precision", "version"),
            registry=self.registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when /metrics is."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def batch(self, size: int, wait_s: list[float], infer_s: float) -> None:
        """Takes down one batch."""
        self.batch_size.observe(size)
        self.inference.observe(infer_s)
        for seconds in wait_s:
            self.waiting.observe(seconds)

    def text(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)
