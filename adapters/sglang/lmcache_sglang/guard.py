"""What storage and linker share: they disable themselves with one log line, and never raise into SGLang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from lmcache.adapter import guarded, reason_of, record_failure
from lmcache.config import Config
from lmcache.engine import CacheEngine
from lmcache.observe.log import Throttle
from lmcache_sglang.export import Exporter

T = TypeVar("T")


class Guarded:
    """Base of both entry points. SGLang sees failures as misses only."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._log = Throttle()
        self._exporter = Exporter()
        self._off = ""  # why caching is disabled

    def _engines(self) -> Sequence[CacheEngine]:
        raise NotImplementedError

    def _switch_off(self, error: Exception) -> None:
        self._off = reason_of(error)
        self._log.warning("cache-disabled", reason=self._off)
        if self._config.strict:
            raise error

    def _safely(self, op: str, default: T, call: Callable[[], T]) -> T:
        """Returns `call()`, or `default` if it raises: counted, logged, and only this request runs uncached."""

        def failed(error: Exception) -> None:
            metrics = next((engine.metrics for engine in self._engines()), None)
            record_failure(error, "storage-failed", self._log, metrics, key=op, op=op)

        found = guarded(call, default, failed)
        guarded(lambda: self._exporter.export(engine.metrics for engine in self._engines()), None, failed)
        return found

    def _weights_changed(self) -> None:
        """Starts a new epoch: earlier KV no longer hits, and other processes do not see what is stored from now on."""
        epoch = torch.randint(0, 2**62, (2,)).tolist()
        for engine in self._engines():
            engine.set_weights_version(f"{epoch[0]:x}{epoch[1]:x}")

    def close(self) -> None:
        """Completes pending writes and closes the engines. Idempotent."""
        for engine in self._engines():
            self._safely("close", None, engine.close)

    def flush(self) -> bool:
        """Blocks until everything stored is on disk, where it survives kill −9; returns whether it is."""
        flushed = [bool(engine.flush()) for engine in self._engines()]
        return all(flushed)

    def clear(self, salt: str | None = None) -> bool:
        """Removes everything in the folder, whoever stored it; with `salt`, that tenant's KV known to this process."""

        def empty() -> bool:
            for engine in self._engines():
                engine.clear(salt)
            return True

        return self._safely("clear", False, empty)

    def stats(self) -> dict[str, float]:
        """Returns the metrics, summed over all engines."""
        found: dict[str, float] = {}
        for engine in self._engines():
            for name, value in engine.stats().items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _changed_settings(self) -> dict[str, str]:
        """Returns the settings that were set anywhere (source other than `default`), for the log."""
        return {n: e["value"] for n, e in self._config.describe().items() if e["source"] != "default"}
