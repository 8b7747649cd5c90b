"""The figures of a server, for Prometheus."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The figures of requests, and those that an engine counts itself.

    Attributes:
        registry: what `/metrics` shows.
        requests: requests by status.
        first: the seconds until the first piece of an answer.
    """

    def __init__(self, engine: Any) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "adapters_jax_http_requests", "Requests", ["status"], registry=self.registry
        )
        self.first = Histogram(
            "adapters_jax_first_token_seconds",
            "Time until the first piece of an answer",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._engine = engine
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self) -> Iterator[Any]:
        """What the engine has counted."""
        counts = self._engine.counts
        ended = CounterMetricFamily("adapters_jax_completions", "Answers by end", labels=["end"])
        for why, n in dict(counts.ended).items():
            ended.add_metric([why], n)
        yield ended
        for name, text, value in (
            ("tokens", "New tokens", counts.tokens),
            ("prompt_tokens", "Tokens of prompts", counts.prompt_tokens),
            ("steps", "Turns of the engine", counts.steps),
            ("adapter_changes", "Adapters added, replaced and dropped", counts.changes),
        ):
            yield CounterMetricFamily(f"adapters_jax_{name}", text, value)
        for name, text, value in (
            ("waiting", "Requests in the queue", self._engine.waiting),
            ("running", "Requests with a row", self._engine.running),
            ("adapters", "Adapters", len(self._engine.adapters)),
        ):
            yield GaugeMetricFamily(f"adapters_jax_{name}", text, value)
