"""Measures the read throughput of a tier, for admission."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Throughput of loads: bytes loaded, and the time during which at least one load was in progress. Thread-safe.

    Concurrent loads share that time, so that `bytes / busy` is the throughput of all threads together.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._active = 0
        self._since = 0.0
        self._loaded = 0
        self._busy = 0.0

    @contextmanager
    def load(self) -> Iterator[Callable[[int], None]]:
        """Times the load of one object. The body calls the returned function with the bytes loaded and verified."""
        with self._lock:
            now = self._clock()
            if not self._active:
                self._since = now
            self._active += 1
        try:
            yield self._count
        finally:
            with self._lock:
                self._active -= 1
                if not self._active:
                    self._busy += self._clock() - self._since

    def read(self) -> tuple[int, float]:
        """Returns (bytes, seconds) of all loads up to now."""
        with self._lock:
            if self._active:  # includes the time of loads in progress, because their bytes may be counted already
                now = self._clock()
                self._busy += now - self._since
                self._since = now
            return self._loaded, self._busy

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._loaded += nbytes
