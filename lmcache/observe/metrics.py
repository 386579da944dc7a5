"""Prometheus counters, gauges and histograms of one cache. Every name ends in its unit.

Each `Metrics` has its own registry: two caches in one process do not mix, and nothing is registered globally. No port is
opened unless `serve` is called; an engine with its own endpoint can expose `registry` instead.

Values are kept in this process's memory, also where `PROMETHEUS_MULTIPROC_DIR` is set. prometheus_client's own counters would
then live in files that all metrics of the same name in a process share: a new cache would start with the counts of another,
and an engine that exports our counters (vLLM) would export the files' as well.

Calls are cheap and thread-safe.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from threading import Lock
from time import perf_counter
from typing import Final, Generic, Literal, NamedTuple, TypeVar

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

Op = Literal["lookup", "retrieve", "store"]

MISS_REASONS: Final = {
    "absent": "no tier holds the chunk",
    "evicted": "it was cached, and has been evicted",
    "corrupt": "the bytes found failed verification",
    "tail": "tokens after the last full chunk, and the last prompt token, which the engine always computes",
    "group": "another layer group or rank lacks the objects that a hit up to here needs",
    "pending": "it is being written or loaded at this moment",
    "failed": "a tier failed or was too slow",
    "room": "a tier holds the chunk, and memory has no room to load it through",
}
"""Reasons of misses; the values of the label `reason` of `lmcache_miss_tokens_total`."""

SECONDS_BUCKETS: Final = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)

Child = TypeVar("Child")


class _Value:
    """One number: of a metric without labels, or for one combination of label values."""

    __slots__ = ("_lock", "read", "value")

    def __init__(self) -> None:
        self._lock = Lock()
        self.value = 0.0
        self.read: Callable[[], float] | None = None

    def inc(self, amount: float) -> None:
        with self._lock:
            self.value += amount

    def set(self, value: float) -> None:
        self.value = float(value)

    def get(self) -> float:
        return self.value if self.read is None else float(self.read())


class _Durations:
    """Durations by bucket, with their sum."""

    __slots__ = ("_lock", "counts", "sum")

    def __init__(self) -> None:
        self._lock = Lock()
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        bucket = bisect_left(SECONDS_BUCKETS, seconds)
        with self._lock:
            self.counts[bucket] += 1
            self.sum += seconds

    def get(self) -> tuple[list[tuple[str, float]], float]:
        """Returns the cumulative buckets, by upper bound, and the sum."""
        with self._lock:
            counts, total = list(self.counts), self.sum
        bounds = [*map(str, SECONDS_BUCKETS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(counts)), strict=True)), total


class Family(NamedTuple):
    """A metric, as shown in the documentation."""

    name: str
    kind: str
    labels: tuple[str, ...]
    doc: str


class _Metric(Collector, Generic[Child]):
    """A metric: its values by label values, and how prometheus_client reads them."""

    def __init__(self, family: Family, kind: type[Child]) -> None:
        self.family = family
        self._kind = kind
        self._children: dict[tuple[str, ...], Child] = {}
        if not family.labels:
            self.labels()  # a metric without labels is 0 from the start

    def labels(self, *values: str) -> Child:
        """Returns the value for these label values, which begins at 0."""
        child = self._children.get(values)
        if child is None:  # if two threads race, both get the first one's
            child = self._children.setdefault(values, self._kind())
        return child

    def collect(self) -> Iterable[Metric]:
        """Returns the current values."""
        name, kind, labels, doc = self.family
        found = list(self._children.items())
        if kind == "histogram":
            durations = HistogramMetricFamily(name, doc, labels=labels)
            for values, child in found:
                if isinstance(child, _Durations):
                    durations.add_metric(values, *child.get())
            return [durations]
        numbers = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(name, doc, labels=labels)
        for values, child in found:
            if isinstance(child, _Value):
                numbers.add_metric(values, child.get())
        return [numbers]

    def describe(self) -> Iterable[Metric]:
        """Returns the metric without values, by which a registry finds duplicates."""
        return [Metric(self.family.name.removesuffix("_total"), self.family.doc, self.family.kind)]


class Metrics:
    """The metrics of one cache, with one method per event.

    Attributes:
        registry: the Prometheus registry to expose.
        families: all metrics, for the documentation.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families: list[Family] = []

        def add(kind: type[Child], name: str, doc: str, type_: str, *labels: str) -> _Metric[Child]:
            family = Family(f"lmcache_{name}", type_, labels, doc)
            metric = _Metric(family, kind)
            self.families.append(family)
            self.registry.register(metric)
            return metric

        def counter(name: str, doc: str, *labels: str) -> _Metric[_Value]:
            return add(_Value, name, doc, "counter", *labels)

        def gauge(name: str, doc: str, *labels: str) -> _Metric[_Value]:
            return add(_Value, name, doc, "gauge", *labels)

        def seconds(op: Op, doc: str) -> _Metric[_Durations]:
            return add(_Durations, f"{op}_seconds", doc, "histogram")

        self._requested_tokens = counter("requested_tokens_total", "Tokens requested by lookups.")
        self._hit_tokens = counter(
            "hit_tokens_total", "Tokens found by lookups, by the tier nearest to the engine.", "tier"
        )
        self._miss_tokens = counter("miss_tokens_total", "Tokens not found by lookups, by reason.", "reason")
        self._loaded_tokens = counter("loaded_tokens_total", "Tokens loaded into the engine.")
        self._stored_tokens = counter("stored_tokens_total", "Tokens accepted by stores that were not cached before.")
        self._seconds: dict[Op, _Metric[_Durations]] = {
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

    def looked_up(self, tokens: int, found: Mapping[str, int], missed: Mapping[str, int]) -> None:
        """Counts a lookup of `tokens` tokens: those found, by tier, and those not found, by reason."""
        self.requested(tokens)
        for tier, count in found.items():
            self.hit(tier, count)
        for reason, count in missed.items():
            self.missed(reason, count)

    def requested(self, tokens: int) -> None:
        """Counts `tokens` tokens requested by a lookup."""
        self._requested_tokens.labels().inc(tokens)

    def hit(self, tier: str, tokens: int) -> None:
        """Counts `tokens` tokens found by a lookup whose nearest copy is in `tier`."""
        self._hit_tokens.labels(tier).inc(tokens)

    def missed(self, reason: str, tokens: int) -> None:
        """Counts `tokens` tokens not found by a lookup; `reason` is one of `MISS_REASONS`."""
        self._miss_tokens.labels(reason).inc(tokens)

    def loaded(self, tokens: int) -> None:
        """Counts `tokens` tokens that a retrieve put into the engine's memory."""
        self._loaded_tokens.labels().inc(tokens)

    def stored(self, tokens: int) -> None:
        """Counts `tokens` tokens accepted by a store that were not cached before."""
        self._stored_tokens.labels().inc(tokens)

    def moved(self, src: str, dst: str, nbytes: int) -> None:
        """Counts `nbytes` bytes moved from `src` to `dst`: `engine`, `dram`, `disk`, …"""
        self._moved_bytes.labels(src, dst).inc(nbytes)

    def evicted(self, tier: str, objects: int = 1) -> None:
        """Counts `objects` objects evicted from `tier`."""
        self._evictions.labels(tier).inc(objects)

    def corrupted(self, tier: str, objects: int = 1) -> None:
        """Counts `objects` objects read from `tier` that failed verification."""
        self._corruptions.labels(tier).inc(objects)

    def failed(self, op: str, reason: str, count: int = 1) -> None:
        """Counts failed operations; `op`: `load`, `write_back`, `probe`, …; `reason`: `failed`, `late`, `full`, …"""
        self._failures.labels(op, reason).inc(count)

    def skipped_store(self, reason: str, objects: int = 1) -> None:
        """Counts `objects` objects that were not stored; `reason`: `queue`, `arena`, `pinned`, …"""
        self._skipped.labels(reason).inc(objects)

    def uncached(self, reason: str, requests: int = 1) -> None:
        """Counts requests that ran without the cache; `reason`: a short word or phrase from a fixed set."""
        self._uncached.labels(reason).inc(requests)

    def kernel_fallbacks(self, count: Callable[[], float]) -> None:
        """Registers `count`, called at each scrape: the number of device types that torch copies instead of the kernels."""
        self._fallbacks.labels().read = count

    def queue(self, jobs: int, nbytes: int) -> None:
        """Sets the number of jobs in the transfer's queue and the bytes queued for write-back."""
        self._queue.labels().set(jobs)
        self._queue_bytes.labels().set(nbytes)

    def arena(self, group: str | int, *, free: int, writing: int, ready: int, evicting: int) -> None:
        """Sets the number of arena slots of `group` in each state."""
        for state, slots in (("free", free), ("writing", writing), ("ready", ready), ("evicting", evicting)):
            self._slots.labels(str(group), state).set(slots)

    def tier(self, tier: str, nbytes: int) -> None:
        """Sets the bytes occupied by `tier`."""
        self._tier_bytes.labels(tier).set(nbytes)

    @contextmanager
    def timed(self, op: Op) -> Iterator[None]:
        """Records the duration of the body as one `op`, whether or not it raises."""
        start = perf_counter()
        try:
            yield
        finally:
            self._seconds[op].labels().observe(perf_counter() - start)

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
