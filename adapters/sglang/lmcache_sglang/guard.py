"""What both adapters do first and last: read their settings, switch themselves off with one line, never raise into SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lmcache.adapter import guarded, reason_of, record_failure
from lmcache.config import Config
from lmcache.engine import CacheEngine
from lmcache.observe.log import Throttle

T = TypeVar("T")


class Guarded:
    """A part of SGLang's cache that may fail without SGLang noticing more than misses."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._log = Throttle()
        self._off = ""  # why nothing is cached

    def _engines(self) -> Sequence[CacheEngine]:
        raise NotImplementedError

    def _switch_off(self, error: Exception) -> None:
        self._off = reason_of(error)
        self._log.warning("cache-disabled", reason=self._off)
        if self._config.strict:
            raise error

    def _safely(self, op: str, default: T, call: Callable[[], T]) -> T:
        """Returns `call()`, or `default` where it raises: counted, logged, and this request alone goes on uncached."""

        def failed(error: Exception) -> None:
            metrics = next((engine.metrics for engine in self._engines()), None)
            record_failure(error, "storage-failed", self._log, metrics, key=op, op=op)

        return guarded(call, default, failed)

    def _weights_changed(self) -> None:
        """Nothing stored before is found from here on, and nothing stored from here on is found by others."""
        epoch = torch.randint(0, 2**62, (2,)).tolist()
        for engine in self._engines():
            engine.set_weights_version(f"{epoch[0]:x}{epoch[1]:x}")

    def close(self) -> None:
        """Write out what waits. Idempotent."""
        for engine in self._engines():
            self._safely("close", None, engine.close)

    def flush(self) -> bool:
        """All that was stored is on disk, safe from kill −9."""
        return min((engine.flush() for engine in self._engines()), default=True)

    def clear(self, salt: str | None = None) -> bool:
        """Empty the folder, whoever wrote what is in it; with `salt`, of what this process knows of that tenant."""

        def empty() -> bool:
            for engine in self._engines():
                engine.clear(salt)
            return True

        return self._safely("clear", False, empty)

    def stats(self) -> dict[str, float]:
        """The cache's metrics, of all its engines together."""
        found: dict[str, float] = {}
        for engine in self._engines():
            for name, value in engine.stats().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _said(self) -> dict[str, str]:
        """Settings that somebody made, for the log."""
        return {n: e["value"] for n, e in self._config.describe().items() if e["source"] != "default"}
