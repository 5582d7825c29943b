"""Measurements of the service for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and histograms of one service, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "findrec_requests", "Requests by path and status.", ["path", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "findrec_request_seconds",
            "Time from a request to its response.",
            ["path"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch = Histogram(
            "findrec_batch_lists",
            "Lists that the model made in one pass.",
            buckets=_SIZES,
            registry=self._registry,
        )
        self.appended = Counter("findrec_appended_events", "Events stored.", registry=self._registry)

    def watch(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """Report the current value of a function as a gauge."""
        Gauge(name, help_text, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All values in Prometheus's text format."""
        return generate_latest(self._registry)
