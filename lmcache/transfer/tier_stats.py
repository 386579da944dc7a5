"""What the data plane measures about a tier, for those who decide what goes there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Meter:
    """Throughput of loads: bytes, and the time in which any of them was under way. Thread-safe.

    Objects that load at the same time share that time, so that `bytes / busy` is what all threads together get.
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
        """The body reads one object, and calls what it is given with the bytes that were good."""
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
        """(bytes, seconds) of all loads, up to now."""
        with self._lock:
            if self._active:  # time is counted up to now, as the bytes are
                now = self._clock()
                self._busy += now - self._since
                self._since = now
            return self._loaded, self._busy

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self._loaded += nbytes
