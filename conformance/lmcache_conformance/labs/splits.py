"""In which passes a prompt's KV was computed, so that it can be computed again in the very same ones, without any cache.

Kernels round differently at different shapes, so "what this prompt's KV is" depends on how it was cut: which columns one
prefill computed together, which came one by one while decoding. A `Pass` records one request and points to the pass whose
columns it began with. How passes are played back is each engine's own business.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

Owner = tuple[str, str]
"""Tenant's salt, and what tells states of the weights apart."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a call began: with the first `columns` columns of what `source` computed.

    `source` None with columns > 0: an earlier process computed them, in passes unknown here.
    """

    columns: int = 0
    source: Pass | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """One request: it began at `start`, prefilled up to column `prompt`, and decoded the rest of `tokens` one by one."""

    tokens: tuple[int, ...]
    prompt: int
    start: Start


class Splits:
    """Who wrote which chunk, and where each prompt last began. Thread-safe."""

    def __init__(self, chunk_tokens: int) -> None:
        self.lock = threading.RLock()
        self._chunk = chunk_tokens
        self._writers: dict[tuple[Owner, bytes], Pass] = {}
        self._starts: dict[tuple[Owner, tuple[int, ...]], Start] = {}

    def began(self, owner: Owner, prompt: Sequence[int], columns: int) -> Start:
        """A call for this prompt took its first `columns` columns from the cache."""
        with self.lock:
            source = self._writers.get((owner, _name(prompt[:columns]))) if columns else None
            start = Start(columns, source)
            self._starts[owner, tuple(prompt)] = start
            return start

    def wrote(self, owner: Owner, done: Pass, first: int, last: int) -> None:
        """The chunks of columns [first, last) are in the cache now, as this pass computed them."""
        with self.lock:
            for end in range(first + self._chunk, last + 1, self._chunk):
                self._writers[owner, _name(done.tokens[:end])] = done

    def start_of(self, owner: Owner, prompt: Sequence[int]) -> Start:
        """Where the last call for this prompt began; if there was none, where one would begin now."""
        with self.lock:
            start = self._starts.get((owner, tuple(prompt)))
            if start is None:
                for end in range((len(prompt) - 1) // self._chunk * self._chunk, 0, -self._chunk):
                    if (source := self._writers.get((owner, _name(prompt[:end])))) is not None:
                        return Start(end, source)
                return Start()
            if start.columns and start.source is None:  # its writer had not said so yet
                start = Start(start.columns, self._writers.get((owner, _name(prompt[: start.columns]))))
            return start

    def forget(self, salt: str | None) -> None:
        """The cache was cleared (of one tenant): nothing is there that anybody wrote."""
        with self.lock:
            self._writers = {key: done for key, done in self._writers.items() if salt not in (None, key[0][0])}
            self._starts = {key: start for key, start in self._starts.items() if salt not in (None, key[0][0])}


def _name(tokens: Sequence[int]) -> bytes:
    """Not the names under test: these must be right even where those are not."""
    return hashlib.sha256(repr(list(tokens)).encode()).digest()
