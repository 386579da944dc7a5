"""Passes the counters of scheduler and workers to vLLM's `/metrics`."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmcache.observe import increments
from lmcache.observe.metrics import Metrics

_EVERY_S = 1.0
"""Minimum seconds between two reads of all counters, which take longer than a step should."""


class CacheStats(KVConnectorStats):
    """Increments of counters: `name|label value|…` → amount."""

    data: dict[str, float]

    def reset(self) -> None:
        """Removes all increments."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> CacheStats:
        """Adds the increments of `other` and returns self."""
        for key, amount in other.data.items():
            self.data[key] = self.data.get(key, 0) + amount
        return self

    def reduce(self) -> dict[str, int | float]:
        """Returns loaded and stored tokens, for vLLM's log line."""
        wanted = {"lmcache_loaded_tokens_total": "loaded tokens", "lmcache_stored_tokens_total": "stored tokens"}
        return {wanted[key]: amount for key, amount in self.data.items() if key in wanted}

    def is_empty(self) -> bool:
        """Whether nothing has been counted."""
        return not self.data


class Increments(increments.Increments):
    """Increments for vLLM, which asks for them after every step."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(metrics)
        self._due = 0.0

    def stats(self, quiet: bool = False) -> CacheStats | None:
        """Returns the growth since the last result, at most once a second unless `quiet` (no step may follow for long)."""
        now = time.monotonic()
        if now < self._due and not quiet:
            return None
        self._due = now + _EVERY_S
        changed = self.take()
        return CacheStats(changed) if changed else None


class PromMetrics(KVConnectorPromMetrics):
    """`lmcache_*` counters, with vLLM's labels before ours."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            family.name: metric_types[Counter](
                name=family.name, documentation=family.doc, labelnames=[*labelnames, *family.labels]
            )
            for family in Metrics().families
            if family.kind == "counter"
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Adds increments."""
        for key, amount in transfer_stats_data.items():
            name, *labels = key.split("|")
            counter = self._counters.get(name)
            if counter is not None:
                counter.labels(*self.per_engine_labelvalues[engine_idx], *labels).inc(amount)
