"""What a lookup found, and a retrieve that arrives layer by layer."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Protocol

from lmcache.driver import ControlLoop


class _Owner(Protocol):
    """Where a hit is given back."""

    def _release(self, owner: int) -> None: ...


class Hit:
    """What a lookup found. Use it as a context manager, or call `release`: until then it is kept from eviction.

    Attributes:
        tokens: how many leading tokens can be retrieved; a multiple of `chunk_tokens`.
        by_tier: where they lie now, e.g. `{"dram": 2048, "disk": 512}`.
        stop: why the hit ends there, one of `lmcache.control`'s reasons.
    """

    def __init__(self, engine: _Owner, owner: int, tokens: int, by_tier: Mapping[str, int], stop: str) -> None:
        self.tokens = tokens
        self.by_tier = dict(by_tier)
        self.stop = stop
        self.owner = owner
        self._engine: _Owner | None = engine

    def release(self) -> None:
        """Let go of what was found. Idempotent."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine._release(self.owner)

    def __enter__(self) -> Hit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Hit(tokens={self.tokens}, by_tier={self.by_tier}, stop={self.stop!r})"


class LayerLoad:
    """A retrieve under way, layer by layer: `wait(layer)` before the forward pass reads that layer, `finish()` at the end."""

    def __init__(self, loop: ControlLoop, layers: Mapping[int, int], timeout: float) -> None:
        self._loop = loop
        self._timeout = timeout
        self._arrived = {
            key: threading.Event() for group, n in layers.items() for key in ((group, i) for i in range(n))
        }
        self._job: int | None = None
        self._loaded: int | None = None

    def _layer_done(self, group: int, layer: int) -> None:
        self._arrived[group, layer].set()

    def wait(self, layer: int, *, group: int = 0, timeout: float | None = None) -> bool:
        """Block until local layer `layer` of `group` is in place, or the load failed; True if it arrived."""
        event = self._arrived[group, layer]
        limit = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while not event.is_set() and self._loaded is None and time.monotonic() < deadline:
            event.wait(0.005)
            if not event.is_set():
                self._loaded = self._loop.try_result(self._job)
        return event.is_set()

    def finish(self) -> int:
        """Tokens really loaded. If fewer than the hit, the slots beyond are undefined: recompute from there."""
        if self._loaded is None:
            self._loaded = self._loop.result(self._job)
        for event in self._arrived.values():
            event.set()
        return self._loaded
