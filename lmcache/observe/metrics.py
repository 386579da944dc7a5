"""Prometheus counters, gauges and histograms of one cache. Every name ends in its unit.

Each `Metrics` has its own registry: two caches in one process do not mix, and nothing is registered globally. No port is
opened unless `serve` is called; an engine with its own endpoint can expose `registry` instead.

Calls are cheap (label children are cached) and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Final, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

Op = Literal["lookup", "retrieve", "store"]

MISS_REASONS: Final = {
    "absent": "no tier holds the chunk",
    "evicted": "it was cached, and has been evicted",
    "corrupt": "the bytes found failed verification",
    "tail": "tokens after the last full chunk, and the last prompt token, which the engine always computes",
    "group": "another layer group or rank lacks the objects that a hit up to here needs",
    "pending": "it is being written or loaded at this moment",
    "failed": "a tier failed or was too slow",
}
"""Reasons of misses; the values of the label `reason` of `lmcache_miss_tokens_total`."""

SECONDS_BUCKETS: Final = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

M = TypeVar("M", Counter, Gauge)


class Family(NamedTuple):
    """A metric, as shown in the documentation."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


class Metrics:
    """The metrics of one cache, with one method per event.

    Attributes:
        registry: the Prometheus registry to expose.
        families: all metrics, for the documentation.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)

        self.families: list[Family] = []

        def counter(name: str, doc: str, *labels: str) -> Counter:
            self.families.append(Family(f"lmcache_{name}", "counter", labels, doc))
            return Counter(f"lmcache_{name}", doc, labels, registry=self.registry)

        def gauge(name: str, doc: str, *labels: str) -> Gauge:
            self.families.append(Family(f"lmcache_{name}", "gauge", labels, doc))
            return Gauge(f"lmcache_{name}", doc, labels, registry=self.registry)

        def seconds(op: Op, doc: str) -> Histogram:
            self.families.append(Family(f"lmcache_{op}_seconds", "histogram", (), doc))
            return Histogram(f"lmcache_{op}_seconds", doc, buckets=SECONDS_BUCKETS, registry=self.registry)

        self._requested_tokens = counter("requested_tokens_total", "Tokens requested by lookups.")
        self._hit_tokens = counter(
            "hit_tokens_total", "Tokens found by lookups, by the tier nearest to the engine.", "tier"
        )
        self._miss_tokens = counter("miss_tokens_total", "Tokens not found by lookups, by reason.", "reason")
        self._loaded_tokens = counter("loaded_tokens_total", "Tokens loaded into the engine.")
        self._stored_tokens = counter("stored_tokens_total", "Tokens accepted by stores that were not cached before.")
        self._seconds: dict[Op, Histogram] = {
            "lookup": seconds("lookup", "Seconds per lookup."),
            "retrieve": seconds("retrieve", "Seconds per retrieve."),
            "store": seconds("store", "Seconds per store, until the source slots may be overwritten."),
        }
        self._moved_bytes = counter("moved_bytes_total", "Bytes of KV moved, by source and destination.", "src", "dst")
        self._evictions = counter("evictions_total", "Objects evicted, by tier.", "tier")
        self._corruptions = counter("corruptions_total", "Objects whose bytes failed verification, by tier.", "tier")
        self._failures = counter("failures_total", "Operations that failed and became misses.", "op", "reason")
        self._skipped = counter(
            "skipped_stores_total", "Objects not stored, or not written back to a tier, by reason.", "reason"
        )
        self._uncached = counter("uncached_requests_total", "Requests that ran without the cache, by reason.", "reason")
        self._queue = gauge("queue_depth", "Jobs queued for or running on I/O threads.")
        self._queue_bytes = gauge("queue_bytes", "Bytes queued for write-back to tiers.")
        self._slots = gauge("arena_slots", "Arena slots, by group and state.", "group", "state")
        self._tier_bytes = gauge("tier_bytes", "Bytes occupied by a tier.", "tier")
        self._fallbacks = gauge(
            "kernel_fallbacks", "Device types on which the kernels cannot run, so that torch copies instead."
        )
        self._children: dict[tuple[object, ...], Counter | Gauge] = {}

    def looked_up(self, tokens: int, found: Mapping[str, int], missed: Mapping[str, int]) -> None:
        """Counts a lookup of `tokens` tokens: those found, by tier, and those not found, by reason."""
        self.requested(tokens)
        for tier, count in found.items():
            self.hit(tier, count)
        for reason, count in missed.items():
            self.missed(reason, count)

    def requested(self, tokens: int) -> None:
        """Counts `tokens` tokens requested by a lookup."""
        self._requested_tokens.inc(tokens)

    def hit(self, tier: str, tokens: int) -> None:
        """Counts `tokens` tokens found by a lookup whose nearest copy is in `tier`."""
        self._child(self._hit_tokens, tier).inc(tokens)

    def missed(self, reason: str, tokens: int) -> None:
        """Counts `tokens` tokens not found by a lookup; `reason` is one of `MISS_REASONS`."""
        self._child(self._miss_tokens, reason).inc(tokens)

    def loaded(self, tokens: int) -> None:
        """Counts `tokens` tokens that a retrieve put into the engine's memory."""
        self._loaded_tokens.inc(tokens)

    def stored(self, tokens: int) -> None:
        """Counts `tokens` tokens accepted by a store that were not cached before."""
        self._stored_tokens.inc(tokens)

    def moved(self, src: str, dst: str, nbytes: int) -> None:
        """Counts `nbytes` bytes moved from `src` to `dst`: `engine`, `dram`, `disk`, …"""
        self._child(self._moved_bytes, src, dst).inc(nbytes)

    def evicted(self, tier: str, objects: int = 1) -> None:
        """Counts `objects` objects evicted from `tier`."""
        self._child(self._evictions, tier).inc(objects)

    def corrupted(self, tier: str, objects: int = 1) -> None:
        """Counts `objects` objects read from `tier` that failed verification."""
        self._child(self._corruptions, tier).inc(objects)

    def failed(self, op: str, reason: str, count: int = 1) -> None:
        """Counts failed operations; `op`: `load`, `write_back`, `probe`, …; `reason`: `failed`, `late`, `full`, …"""
        self._child(self._failures, op, reason).inc(count)

    def skipped_store(self, reason: str, objects: int = 1) -> None:
        """Counts `objects` objects that were not stored; `reason`: `queue`, `arena`, `pinned`, …"""
        self._child(self._skipped, reason).inc(objects)

    def uncached(self, reason: str, requests: int = 1) -> None:
        """Counts requests that ran without the cache; `reason`: a short word or phrase from a fixed set."""
        self._child(self._uncached, reason).inc(requests)

    def kernel_fallbacks(self, count: Callable[[], float]) -> None:
        """Registers `count`, called at each scrape: the number of device types that torch copies instead of the kernels."""
        self._fallbacks.set_function(count)

    def queue(self, jobs: int, nbytes: int) -> None:
        """Sets the number of jobs in the transfer's queue and the bytes queued for write-back."""
        self._queue.set(jobs)
        self._queue_bytes.set(nbytes)

    def arena(self, group: str | int, *, free: int, writing: int, ready: int, evicting: int) -> None:
        """Sets the number of arena slots of `group` in each state."""
        for state, slots in (("free", free), ("writing", writing), ("ready", ready), ("evicting", evicting)):
            self._child(self._slots, str(group), state).set(slots)

    def tier(self, tier: str, nbytes: int) -> None:
        """Sets the bytes occupied by `tier`."""
        self._child(self._tier_bytes, tier).set(nbytes)

    @contextmanager
    def timed(self, op: Op) -> Iterator[None]:
        """Records the duration of the body as one `op`, whether or not it raises."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[op].observe(perf_counter() - start)

    def snapshot(self) -> dict[str, float]:
        """Returns every sample's value by its exposition name, e.g. `lmcache_hit_tokens_total{tier="dram"}`.

        Histograms appear as their `_count` and `_sum`.
        """
        values: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_created", "_bucket")):
                    labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                    values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return values

    def serve(self, port: int, host: str = "127.0.0.1") -> int:
        """Serves Prometheus scrapes on `host:port` from a daemon thread until the process ends; returns the port.

        Port 0 takes a free one. There is no authentication: be careful when binding to a public address.
        """
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return int(server.server_port)

    def _child(self, metric: M, *labels: str) -> M:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:  # if two threads race, the metric returns the same child to both
            child = self._children[key] = metric.labels(*labels)
        return child  # type: ignore[return-value]  # the metric is part of the key, so the child has its type
