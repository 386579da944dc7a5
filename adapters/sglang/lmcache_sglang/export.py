"""Exports a cache's counters on SGLang's `/metrics`.

SGLang's server gathers what all its processes have written into `PROMETHEUS_MULTIPROC_DIR`; the cache's own metrics stay in
memory, so their growth is added to counters of the same names there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from threading import Lock

from prometheus_client import CollectorRegistry, Counter

from lmcache.observe.increments import Increments
from lmcache.observe.metrics import Metrics


@cache
def _counters() -> dict[str, Counter]:
    """The counters of this process: one file holds them, whichever cache counts."""
    registry = CollectorRegistry()  # the server reads the files, nobody this registry
    families = [family for family in Metrics().families if family.kind == "counter"]
    return {family.name: Counter(family.name, family.doc, family.labels, registry=registry) for family in families}


class Exporter:
    """Adds to SGLang's counters what those of some caches have grown by."""

    def __init__(self) -> None:
        self._lock = Lock()  # the linker stores on a thread of its own
        self._increments: dict[int, tuple[Metrics, Increments]] = {}

    def export(self, caches: Iterable[Metrics]) -> None:
        """Adds the growth since the last call; does nothing where SGLang exports no metrics."""
        if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            return
        with self._lock:
            for metrics in caches:
                _, increments = self._increments.setdefault(id(metrics), (metrics, Increments(metrics)))
                for key, amount in increments.take().items():
                    name, *labels = key.split("|")
                    counter = _counters()[name]
                    (counter.labels(*labels) if labels else counter).inc(amount)
