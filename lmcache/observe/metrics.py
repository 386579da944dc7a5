"""Counters, gauges and histograms of one cache, in the prometheus client's terms. Every name ends in its unit.

Each `Metrics` has its own registry: two caches in one process do not mix, and nothing is registered globally. Nothing
listens on a port unless `serve` is called; an engine with an endpoint of its own can scrape `registry` instead.

Calls are cheap (label children are bound once) and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

Op = Literal["lookup", "retrieve", "store"]

MISS_REASONS: Final = {
    "absent": "no tier holds the chunk",
    "evicted": "it was held, and had to go to make room",
    "corrupt": "bytes were found, but not those of this object",
    "tail": "tokens after the last whole chunk, or the last token, which the engine must compute itself",
    "group": "another layer group or rank does not hold what a hit up to here needs",
    "pending": "it is being written or fetched at this moment",
    "failed": "a tier failed or was too slow",
}
"""Why tokens were not found; the values of `reason` in `lmcache_miss_tokens_total`."""

SECONDS_BUCKETS: Final = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

M = TypeVar("M", Counter, Gauge)


class Family(NamedTuple):
    """A metric as documentation shows it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


class Metrics:
    """The metrics of one cache. One method per event; each says what to count and in which unit.

    Attributes:
        registry: what a prometheus endpoint scrapes.
        families: what there is, for documentation.
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

        self._requested_tokens = counter("requested_tokens_total", "Tokens asked for by lookups.")
        self._hit_tokens = counter(
            "hit_tokens_total", "Tokens found by lookups, by the tier nearest to the engine.", "tier"
        )
        self._miss_tokens = counter("miss_tokens_total", "Tokens not found by lookups, by reason.", "reason")
        self._loaded_tokens = counter("loaded_tokens_total", "Tokens handed back to the engine.")
        self._stored_tokens = counter("stored_tokens_total", "Tokens newly accepted by stores.")
        self._seconds: dict[Op, Histogram] = {
            "lookup": seconds("lookup", "Seconds per lookup."),
            "retrieve": seconds("retrieve", "Seconds per retrieve."),
            "store": seconds("store", "Seconds per store, until the source may be overwritten."),
        }
        self._moved_bytes = counter("moved_bytes_total", "Bytes of KV moved, by source and destination.", "src", "dst")
        self._evictions = counter("evictions_total", "Objects evicted, by tier.", "tier")
        self._corruptions = counter("corruptions_total", "Objects whose bytes failed verification, by tier.", "tier")
        self._failures = counter("failures_total", "Operations that failed and became misses.", "op", "reason")
        self._skipped = counter("skipped_stores_total", "Objects not stored, or not written down, by reason.", "reason")
        self._uncached = counter("uncached_requests_total", "Requests that ran without cache, by reason.", "reason")
        self._queue = gauge("queue_depth", "Jobs waiting for or held by I/O threads.")
        self._queue_bytes = gauge("queue_bytes", "Bytes waiting to be written to tiers below.")
        self._slots = gauge("arena_slots", "Arena slots, by group and state.", "group", "state")
        self._tier_bytes = gauge("tier_bytes", "Bytes that a tier occupies.", "tier")
        self._fallbacks = gauge("kernel_fallbacks", "Kinds of devices whose kernels cannot run, so that torch copies.")
        self._children: dict[tuple[object, ...], Counter | Gauge] = {}

    def requested(self, tokens: int) -> None:
        """A lookup asked for `tokens` tokens."""
        self._requested_tokens.inc(tokens)

    def hit(self, tier: str, tokens: int) -> None:
        """A lookup found `tokens` tokens whose nearest copy is in `tier`."""
        self._child(self._hit_tokens, tier).inc(tokens)

    def missed(self, reason: str, tokens: int) -> None:
        """A lookup did not find `tokens` tokens; `reason` is one of `MISS_REASONS`."""
        self._child(self._miss_tokens, reason).inc(tokens)

    def loaded(self, tokens: int) -> None:
        """A retrieve put `tokens` tokens into the engine's memory."""
        self._loaded_tokens.inc(tokens)

    def stored(self, tokens: int) -> None:
        """A store accepted `tokens` tokens that were not held yet."""
        self._stored_tokens.inc(tokens)

    def moved(self, src: str, dst: str, nbytes: int) -> None:
        """`nbytes` bytes went from one place to another: `engine`, `dram`, `disk`, …"""
        self._child(self._moved_bytes, src, dst).inc(nbytes)

    def evicted(self, tier: str, objects: int = 1) -> None:
        """`objects` objects left `tier` to make room."""
        self._child(self._evictions, tier).inc(objects)

    def corrupted(self, tier: str, objects: int = 1) -> None:
        """`objects` objects read from `tier` were not what their name says."""
        self._child(self._corruptions, tier).inc(objects)

    def failed(self, op: str, reason: str, count: int = 1) -> None:
        """An operation (`load`, `write_back`, `probe`, …) ended badly: `failed`, `late`, `full`, …"""
        self._child(self._failures, op, reason).inc(count)

    def skipped_store(self, reason: str, objects: int = 1) -> None:
        """`objects` objects were not stored: `queue`, `arena`, `pinned`, …"""
        self._child(self._skipped, reason).inc(objects)

    def uncached(self, reason: str, requests: int = 1) -> None:
        """A request ran as if there was no cache, because of `reason` (a short word or phrase from a fixed set)."""
        self._child(self._uncached, reason).inc(requests)

    def kernel_fallbacks(self, count: Callable[[], float]) -> None:
        """`count()`, asked at each scrape, tells how many kinds of devices are copied by torch instead of kernels."""
        self._fallbacks.set_function(count)

    def queue(self, jobs: int, nbytes: int) -> None:
        """The transfer's queue now holds `jobs` jobs, with `nbytes` bytes waiting to be written."""
        self._queue.set(jobs)
        self._queue_bytes.set(nbytes)

    def arena(self, group: str | int, *, free: int, writing: int, ready: int, evicting: int) -> None:
        """How many arena slots of `group` are in each state."""
        for state, slots in (("free", free), ("writing", writing), ("ready", ready), ("evicting", evicting)):
            self._child(self._slots, str(group), state).set(slots)

    def tier(self, tier: str, nbytes: int) -> None:
        """`tier` now occupies `nbytes` bytes."""
        self._child(self._tier_bytes, tier).set(nbytes)

    def took(self, op: Op, seconds: float) -> None:
        """One `lookup`, `retrieve` or `store` took this long."""
        self._seconds[op].observe(seconds)

    @contextmanager
    def timed(self, op: Op) -> Iterator[None]:
        """Measure the body as one `op`, whether or not it raises."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[op].observe(perf_counter() - start)

    def snapshot(self) -> dict[str, float]:
        """Every sample's value under its exposition name, e.g. `lmcache_hit_tokens_total{tier="dram"}`.

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
        """Answer prometheus scrapes on `host:port` from a daemon thread until the process ends; returns the port.

        Port 0 takes a free one. There is no authentication: think before binding to anything but this machine.
        """
        server, _ = start_http_server(port, addr=host, registry=self.registry)
        return int(server.server_port)

    def _child(self, metric: M, *labels: str) -> M:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:  # two threads may both bind it: the metric hands both the same child
            child = self._children[key] = metric.labels(*labels)
        return child  # type: ignore[return-value]  # the key holds the metric, so the child is of its type
