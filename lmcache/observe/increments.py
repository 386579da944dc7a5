"""Growth of a cache's counters, for engines that export them beside their own."""

from __future__ import annotations

from lmcache.observe.metrics import Metrics


class Increments:
    """Computes how much the counters of `metrics` have grown."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._seen: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Returns the growth since the last call: `name|label value|…` → amount; without counters that have not grown."""
        current = {
            "|".join((sample.name, *sample.labels.values())): sample.value
            for family in self._metrics.registry.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        }
        grown = {key: value - self._seen.get(key, 0) for key, value in current.items()}
        self._seen = current
        return {key: amount for key, amount in grown.items() if amount}
