"""The counters of a server, in Prometheus' form."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime import Stats
from vocabtrim_export.serve.cache_store import CacheStore
from vocabtrim_export.serve.workers import Workers

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, workers: Workers) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StoreFigures(workers.store))
        self._requests = Counter("vocabtrim_requests", "Requests, by HTTP status", ["status"], registry=self._registry)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("cached_tokens", "Tokens of prompts that a KV cache held already")
        self._generated = self._counter("generated_tokens", "Tokens that were generated")
        self._drafted = self._counter("drafted_tokens", "Tokens that were drafted")
        self._accepted = self._counter("accepted_tokens", "Drafted tokens that the target accepted")
        self._rounds = self._counter("rounds", "Target calls; generated tokens over these are the block efficiency")
        self._broken = self._counter("broken_streams", "Streamed answers that an error broke off after their status")
        self._collapses = self._counter("collapses", "Answers during which acceptance had collapsed")
        self._seconds = self._counter("generation_seconds", "Seconds of generating, prefills included")
        self._first = Histogram(
            "vocabtrim_first_token_seconds",
            "Seconds from a request's arrival to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        Gauge("vocabtrim_busy_workers", "Workers that generate", registry=self._registry).set_function(
            lambda: workers.busy
        )
        Gauge("vocabtrim_waiting_requests", "Requests that wait for a worker", registry=self._registry).set_function(
            lambda: workers.waiting
        )

    def answered(self, status: int) -> None:
        """Count a request by the status of its answer."""
        self._requests.labels(str(status)).inc()

    def streamed(self, is_broken: bool) -> None:
        """Count a streamed answer that has ended."""
        self._broken.inc(is_broken)

    def first_token(self, seconds: float) -> None:
        """Count the time to an answer's first token."""
        self._first.observe(seconds)

    def generated(self, stats: Stats, prompt_tokens: int, seconds: float) -> None:
        """Count one answer, or what was generated of one that was left; in any thread.

        Args:
            stats: The sums over its rounds.
            prompt_tokens: The tokens of its prompt.
            seconds: The time for which a worker had it.
        """
        self._prompt.inc(prompt_tokens)
        self._cached.inc(stats.cached)
        self._generated.inc(stats.tokens)
        self._drafted.inc(stats.drafted)
        self._accepted.inc(stats.accepted)
        self._rounds.inc(stats.rounds + stats.prefills)
        self._collapses.inc(stats.collapse is not None)
        self._seconds.inc(seconds)

    def text(self) -> bytes:
        """Returns all counters in Prometheus' text form."""
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"vocabtrim_{name}", what, registry=self._registry)


class _StoreFigures(Collector):
    """The figures that the store counts itself, in its workers' threads."""

    def __init__(self, store: CacheStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Yield the figures as they are now."""
        store = self._store
        yield CounterMetricFamily("vocabtrim_cache_hits", "Requests that began from a stored KV cache", store.hits)
        yield CounterMetricFamily("vocabtrim_cache_evictions", "Stored KV caches that made room", store.evictions)
        yield GaugeMetricFamily("vocabtrim_cache_bytes", "Bytes of the stored KV caches", store.bytes)
