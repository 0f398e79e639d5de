"""Counters and gauges for Prometheus, in its text form."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ifp_mlx.server.request_log import RequestRecord

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """What the server did so far, and what it holds now.

    Args:
        gauges: name -> what it is, and what returns its value now.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ifp_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._tokens = Counter("ifp_tokens", "Tokens.", ["kind"], registry=self._registry)
        self._first_token_s = Histogram(
            "ifp_first_token_seconds",
            "From a request to its first token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._elapsed_s = Histogram(
            "ifp_request_seconds",
            "From a request to its last token.",
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._speed = Histogram(
            "ifp_tokens_per_second",
            "Decoding speed of a request.",
            registry=self._registry,
            buckets=_SPEEDS,
        )
        for name, (text, value) in gauges.items():
            Gauge(f"ifp_{name}", text, registry=self._registry).set_function(value)

    def note(self, record: RequestRecord, path: str) -> None:
        """Count a request; ``path`` is its route, one of few."""
        self._requests.labels(path, str(record.status)).inc()
        for kind, number in (
            ("prompt", record.prompt_tokens),
            ("cached", record.cached_tokens),
            ("completion", record.completion_tokens),
        ):
            self._tokens.labels(kind).inc(number)
        if record.first_token_s is not None:
            self._first_token_s.observe(record.first_token_s)
            self._elapsed_s.observe(record.elapsed_s)
        if record.tokens_per_s is not None:
            self._speed.observe(record.tokens_per_s)

    def text(self) -> bytes:
        """Return everything in Prometheus's text form."""
        return generate_latest(self._registry)
