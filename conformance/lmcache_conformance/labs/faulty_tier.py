"""A tier with injectable faults, and helpers for tests of a cache above it: bounded waits, damage, a stored prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import pytest
import torch

from lmcache import CacheEngine
from lmcache.keys import ObjectId
from lmcache.tiers.base import Read, Result, Write
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.labs.kv_pool import CHUNK, Pool, scattered, tiny_config, tiny_spec
from lmcache_conformance.suites.cache_factory import CacheFactory

T = TypeVar("T")
CHUNKS = 4
TOKENS = torch.arange(CHUNKS * CHUNK)
Reads = Callable[[Sequence[Read]], list[Result]]
Writes = Callable[[Sequence[Write]], list[Result]]


class FaultyTier(MemoryTier):
    """An in-memory stand-in for a remote store, with faults that a real store has but cannot produce on demand.

    Attributes:
        answers: while cleared, every call blocks.
        reads: replaces `read_into` if set.
        writes: replaces `write` if set.
    """

    name = "remote"

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.answers = threading.Event()
        self.answers.set()
        self.reads: Reads | None = None
        self.writes: Writes | None = None

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Blocks while `answers` is cleared."""
        self.answers.wait()
        return super().contains(ids, deadline=deadline)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """Ignores the deadline, so that buffers may be filled long after it."""
        self.answers.wait()
        return self.reads(reads) if self.reads else super().read_into(reads)

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """Blocks while `answers` is cleared; calls `writes` if set."""
        self.answers.wait()
        return self.writes(writes) if self.writes else super().write(writes)

    def close(self) -> None:
        """Does nothing: a remote store outlives its clients."""

    def contents(self) -> dict[ObjectId, bytes]:
        """Returns the stored bytes themselves, for damaging them."""
        return self._objects


class Case:
    """A prompt stored only in the remote tier, a fresh cache above it, and a pool to load into."""

    def __init__(
        self, tier: FaultyTier, cache: CacheEngine, source: Pool, slots: torch.Tensor, patience: float
    ) -> None:
        self.tier, self.cache, self.source, self.slots = tier, cache, source, slots
        self.patience = patience
        self.target = Pool("packed", 40, seed=2)

    def load(self) -> int:
        """Looks up and loads the prompt; returns the number of tokens loaded, after checking their bytes."""

        def call() -> int:
            with self.cache.lookup(TOKENS) as hit:
                loaded = self.cache.retrieve(hit, self.target.kv, self.slots)
            assert loaded <= hit.tokens
            return loaded

        loaded = within(self.patience, call)
        got, want = self.target.sequence(self.slots[:loaded]), self.source.sequence(self.slots[:loaded])
        assert got == want, f"{loaded} tokens were reported as loaded, but their bytes are not those stored"
        return loaded

    def load_with_retries(self) -> int:
        """Repeats `load` until it loads everything: for caches with deadlines so short that a busy machine may miss them."""
        until = time.monotonic() + self.patience
        while (loaded := self.load()) < len(TOKENS) and time.monotonic() < until:
            pass
        return loaded

    def assert_idle(self) -> None:
        """Asserts that the cache holds no lease, job or slot."""
        assert_idle(self.cache, self.patience)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Returns what `call` returns; fails an assertion if it raises or takes longer than `seconds`."""
    done: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"the call hangs: it has not returned after {seconds:g} s"
    if errors and isinstance(errors[0], AssertionError):
        raise errors[0]
    assert not errors, f"a failure of the cache must be a miss, but it raised {type(errors[0]).__name__}: {errors[0]}"
    return done[0]


def assert_idle(cache: CacheEngine, patience: float) -> None:
    """Asserts that no lease, job or leaving slot remains, waiting up to `patience` seconds for it."""
    until = time.monotonic() + patience
    while True:
        cache.flush(timeout=patience)
        stats = cache.stats()
        held = {name: stats[name] for name in ("index_leases", "index_jobs", "index_slots_leaving") if stats[name]}
        if not held:
            return
        assert time.monotonic() < until, f"all requests have ended, but the cache still holds {held}"
        time.sleep(0.01)


assert tiny_spec().object_bytes(0, CHUNK) == 3072  # the offsets below depend on this size
DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "truncated by a few bytes of payload": lambda c: c.__delitem__(slice(len(c) - 1024 - 64, None)),
    "a bit of the payload's first byte": lambda c: c.__setitem__(-4096, c[-4096] ^ 1),
    "a bit of the payload's last byte": lambda c: c.__setitem__(-1025, c[-1025] ^ 1),
    "a bit of the payload": lambda c: c.__setitem__(-2000, c[-2000] ^ 1),  # the last 1024 bytes are padding
    "a bit of the header": lambda c: c.__setitem__(100, c[100] ^ 4),
    "truncated by half": lambda c: c.__delitem__(slice(len(c) // 2, None)),
    "truncated in the header": lambda c: c.__delitem__(slice(1000, None)),
    "empty": lambda c: c.clear(),
    "a header of 1 GiB": lambda c: c.__setitem__(slice(0, 8), (1 << 30).to_bytes(8, "little")),
    "something else": lambda c: c.__setitem__(slice(None), b"hello"),
}


class FaultyTierFactory(CacheFactory):
    """Opens a cache above a faulty tier."""

    @pytest.fixture
    def case(self) -> Iterator[Case]:
        """Yields a case with four chunks in the remote tier and nothing in DRAM."""
        tier = FaultyTier()
        source = Pool("packed", 40, seed=1)
        slots = scattered(len(TOKENS), source, seed=3)
        filler = self.open_cache(tiny_config(), tiny_spec(), [tier])
        filler.store(TOKENS, source.kv, slots)
        assert filler.flush()
        filler.close()
        case = Case(tier, self.reopen(tier), source, slots, self.patience)
        yield case
        tier.answers.set()
        case.cache.close()

    def reopen(self, tier: FaultyTier, **settings: float) -> CacheEngine:
        """Opens a fresh cache above this tier, with long timeouts unless `settings` override them."""
        return self.open_cache(tiny_config(**settings), tiny_spec(), [tier])
