"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope


class Metrics:
    """Counters of one server. Labels never hold ids of people."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self.requests = Counter(
            "plrhf_requests", "Requests answered.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "plrhf_request_seconds", "Time to answer.", ("route",), registry=self.registry
        )
        self.tokens = Counter("plrhf_tokens", "Tokens written.", registry=self.registry)
        self.waiting = Gauge("plrhf_waiting", "Answers that wait.", registry=self.registry)

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        """Count a request that ended with a status; 0 if the client left before."""
        route = getattr(scope.get("route"), "path", "unknown")
        known = ("GET", "POST", "PUT", "DELETE")
        method = scope["method"] if scope["method"] in known else "other"
        self.requests.labels(method, route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all values in Prometheus' text format."""
        return generate_latest(self.registry)
