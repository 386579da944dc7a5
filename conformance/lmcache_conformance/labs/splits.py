"""Records in which passes a prompt's KV was computed, so that it can be recomputed in the same passes without a cache.

Kernels round differently at different shapes, so the bits of a prompt's KV depend on how it was split: which columns were
computed together in one prefill, and which one by one while decoding. A `Pass` records one request and points to the pass
that computed its cached prefix. `refill` replays passes into the cache of an engine that has one of its own.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmcache_conformance.contract import Request

Owner = tuple[str, str]
"""Tenant's salt, and an identifier of the state of the weights."""


@dataclass(frozen=True, eq=False)
class Start:
    """The cached prefix of a call: the first `columns` columns, as computed by `source`.

    `source` is None with columns > 0 if an earlier process computed them, in passes unknown here.
    """

    columns: int = 0
    source: Pass | None = None


@dataclass(frozen=True, eq=False)
class Pass:
    """One request: starts from the prefix `start`, prefills up to column `prompt`, decodes the rest of `tokens` one by one."""

    tokens: tuple[int, ...]
    prompt: int
    start: Start


class Splits:
    """Records which pass wrote each chunk, and the cached prefix of each prompt's last call. Thread-safe."""

    def __init__(self, chunk_tokens: int) -> None:
        self.lock = threading.RLock()
        self._chunk = chunk_tokens
        self._writers: dict[tuple[Owner, bytes], Pass] = {}
        self._starts: dict[tuple[Owner, tuple[int, ...]], Start] = {}

    def began(self, owner: Owner, prompt: Sequence[int], columns: int) -> Start:
        """Records that a call for this prompt took its first `columns` columns from the cache."""
        with self.lock:
            source = self._writers.get((owner, _name(prompt[:columns]))) if columns else None
            start = Start(columns, source)
            self._starts[owner, tuple(prompt)] = start
            return start

    def wrote(self, owner: Owner, done: Pass, first: int, last: int) -> None:
        """Records that the chunks of columns [first, last) are in the cache, as computed by this pass."""
        with self.lock:
            for end in range(first + self._chunk, last + 1, self._chunk):
                self._writers[owner, _name(done.tokens[:end])] = done

    def start_of(self, owner: Owner, prompt: Sequence[int]) -> Start:
        """Returns the cached prefix of the last call for this prompt; without one, that of a call made now."""
        with self.lock:
            start = self._starts.get((owner, tuple(prompt)))
            if start is None:
                for end in range((len(prompt) - 1) // self._chunk * self._chunk, 0, -self._chunk):
                    if (source := self._writers.get((owner, _name(prompt[:end])))) is not None:
                        return Start(end, source)
                return Start()
            if start.columns and start.source is None:  # its writer had not been recorded yet
                start = Start(start.columns, self._writers.get((owner, _name(prompt[: start.columns]))))
            return start

    def forget(self, salt: str | None) -> None:
        """Drops all records (of one tenant), after the cache was cleared."""
        with self.lock:
            self._writers = {key: done for key, done in self._writers.items() if salt not in (None, key[0][0])}
            self._starts = {key: start for key, start in self._starts.items() if salt not in (None, key[0][0])}


def refill(start: Start, prompt: Sequence[int], salt: str, run: Callable[[Request, int], object]) -> None:
    """Fills an engine's own cache with the first `start.columns` tokens of `prompt`, computed in their original split.

    Args:
        start: the cached prefix to compute again.
        prompt: token ids, at least `start.columns`.
        salt: the tenant's salt.
        run: `run(request, columns)` runs a request that takes its first `columns` tokens from the engine's own cache.
    """
    if start.columns == 0:
        return
    source = start.source
    if source is None:  # computed by an earlier process, in an unknown split
        run(Request(tokens=tuple(prompt[: start.columns]), max_new_tokens=1, salt=salt), 0)
        return
    refill(source.start, source.tokens, salt, run)
    new = max(start.columns - source.prompt, 0) + 1
    run(Request(tokens=source.tokens[: source.prompt], max_new_tokens=new, salt=salt), source.start.columns)


def _name(tokens: Sequence[int]) -> bytes:
    """Returns a digest that is independent of the keys under test, so that it stays correct if those are wrong."""
    return hashlib.sha256(repr(list(tokens)).encode()).digest()
