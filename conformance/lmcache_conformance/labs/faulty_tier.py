"""A tier that can be told to misbehave, and what a test of a cache over it needs: bounded waits, damage, a loaded prompt."""

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
    """A remote store that can be told to misbehave in ways that a real one does but cannot be made to on demand."""

    name = "remote"

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.answers = threading.Event()  # set = calls go through
        self.answers.set()
        self.reads: Reads | None = None
        self.writes: Writes | None = None

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """Hangs, or not."""
        self.answers.wait()
        return super().contains(ids, deadline=deadline)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """A careless tier: it does not look at the deadline, and fills the buffers long after it."""
        self.answers.wait()
        return self.reads(reads) if self.reads else super().read_into(reads)

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """Hangs, fails, or not."""
        self.answers.wait()
        return self.writes(writes) if self.writes else super().write(writes)

    def close(self) -> None:
        """A store outlives its clients."""

    def contents(self) -> dict[ObjectId, bytes]:
        """The stored bytes themselves, to be damaged."""
        return self._objects


class Case:
    """A prompt that lies in the remote tier only, a fresh cache over it, and a target to load into."""

    def __init__(
        self, tier: FaultyTier, cache: CacheEngine, source: Pool, slots: torch.Tensor, patience: float
    ) -> None:
        self.tier, self.cache, self.source, self.slots = tier, cache, source, slots
        self.patience = patience
        self.target = Pool("packed", 40, seed=2)

    def load(self) -> int:
        """Tokens loaded; whatever is called loaded must be right."""

        def call() -> int:
            with self.cache.lookup(TOKENS) as hit:
                loaded = self.cache.retrieve(hit, self.target.kv, self.slots)
            assert loaded <= hit.tokens
            return loaded

        loaded = within(self.patience, call)
        got, want = self.target.sequence(self.slots[:loaded]), self.source.sequence(self.slots[:loaded])
        assert got == want, f"{loaded} tokens are called loaded, and are not what was stored"
        return loaded

    def load_with_retries(self) -> int:
        """The same, for a cache whose own deadlines are so short that a busy machine misses one now and then."""
        until = time.monotonic() + self.patience
        while (loaded := self.load()) < len(TOKENS) and time.monotonic() < until:
            pass
        return loaded

    def assert_idle(self) -> None:
        """No lease, no job, no slot in between: everything was given back."""
        assert_idle(self.cache, self.patience)


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; an assertion fails if it raises or hangs."""
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
    assert not thread.is_alive(), f"it hangs: no answer after {seconds:g} s"
    if errors and isinstance(errors[0], AssertionError):
        raise errors[0]
    assert not errors, f"a failure of the cache must be a miss, but it raised {type(errors[0]).__name__}: {errors[0]}"
    return done[0]


def assert_idle(cache: CacheEngine, patience: float) -> None:
    """Nothing is held once all is over."""
    until = time.monotonic() + patience
    while True:
        cache.flush(timeout=patience)
        stats = cache.stats()
        held = {name: stats[name] for name in ("index_leases", "index_jobs", "index_slots_leaving") if stats[name]}
        if not held:
            return
        assert time.monotonic() < until, f"with all requests over, the cache still holds {held}"
        time.sleep(0.01)


assert tiny_spec().object_bytes(0, CHUNK) == 3072  # so that the places below are what they say
DAMAGE: dict[str, Callable[[bytearray], object]] = {
    "truncated by a few bytes of payload": lambda c: c.__delitem__(slice(len(c) - 1024 - 64, None)),
    "a bit of the payload": lambda c: c.__setitem__(-2000, c[-2000] ^ 1),  # the last 1024 bytes are padding
    "a bit of the header": lambda c: c.__setitem__(100, c[100] ^ 4),
    "truncated by half": lambda c: c.__delitem__(slice(len(c) // 2, None)),
    "truncated in the header": lambda c: c.__delitem__(slice(1000, None)),
    "empty": lambda c: c.clear(),
    "a header of 1 GiB": lambda c: c.__setitem__(slice(0, 8), (1 << 30).to_bytes(8, "little")),
    "something else": lambda c: c.__setitem__(slice(None), b"hello"),
}


class FaultyTierFactory(CacheFactory):
    """A cache over a moody tier."""

    @pytest.fixture
    def case(self) -> Iterator[Case]:
        """Four chunks in a remote tier, nothing in DRAM."""
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
        """A fresh cache over this tier, patient unless `settings` say otherwise."""
        return self.open_cache(tiny_config(**settings), tiny_spec(), [tier])
