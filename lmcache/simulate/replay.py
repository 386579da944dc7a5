"""The index without its messages: what it decides for a request whose copies take no time.

Finding, ordering, evicting and what goes to which tier are the index's own (`find`, `Pool`, `State`); left out are the plans
and reports, and with them everything that is about copies under way. For simulations: a million chunks a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from lmcache.control.eviction import hears
from lmcache.control.extents import ExtentPin
from lmcache.control.index import Index
from lmcache.control.lookup import find, stretches
from lmcache.control.outcomes import StopReason
from lmcache.plan import Chain, Name

Written = Callable[[int, Name], None]
"""(tier, object) that was just written to a tier."""


class Served(NamedTuple):
    """What became of a request: leading chunks found in DRAM, and in each tier; chunks newly in DRAM."""

    dram: int
    tiers: dict[int, int]
    stored: int

    @property
    def chunks(self) -> int:
        """Leading chunks found."""
        return self.dram + sum(self.tiers.values())


class Replay:
    """Drives an index of one group, of rule `all`, on one rank, that nobody else uses.

    Args:
        index: the index.
        written: told of each object that a tier now holds; may call `lost`.
        used: told of each object that was read from a tier.
    """

    def __init__(self, index: Index, *, written: Written | None = None, used: Written | None = None) -> None:
        state = index.state
        if len(state.pools) != 1 or state.rules[0].kind != "all" or state.jobs.ranks != 1:
            raise ValueError("a replay needs an index of one group, of rule `all`, on one rank")
        self._state = state
        self._pool = state.pools[0]
        self._curious = hears(self._pool.policy)
        self._learner = index.learner
        self._written = written
        self._used = used

    def request(self, chain: Chain) -> Served:
        """Look up a chain, load what is there, and keep all of it, as an engine does for a prompt."""
        pool, digests = self._pool, chain.digests
        if not digests:  # a prompt of less than a chunk
            return Served(0, {}, 0)
        found = find(self._state, chain, len(digests))
        chunks, below = found.chunks, found.below[0]
        if self._curious:
            pool.policy.asked(digests, found.resident(0))
        near = pool.carve(found.slices(0))
        if self._learner is not None:
            self._learner(digests, found.resident(0), chunks)
        pins = pool.pin(near)
        pool.touch(near)
        for first, last in stretches(below):
            for tier, positions in groupby(range(first, last), below.__getitem__):
                self._promote(chain, list(positions), tier)
        fresh, there = self._take(chain, chunks)
        if below or there:
            names = [*digests[:chunks], *there]
            near = pool.carve(pool.present(chain.namespace, names, 0, len(names)))
        pool.touch(near)  # a store counts as a use of what is there
        stored = self._publish(chain.namespace, fresh, len(self._state.tiers))
        pool.unpin(pins)
        return Served(chunks - len(below), dict(Counter(below.values())) if below else {}, stored)

    def lost(self, tier: int, name: Name) -> None:
        """A tier no longer holds an object, see `Index.announce`."""
        if self._state.directories[tier].remove(name, 0):
            self._pool.gone.put(name.chain, StopReason.EVICTED)

    def _promote(self, chain: Chain, positions: list[int], tier: int) -> None:
        """Bring neighbouring chunks from a tier, as far as slots can be freed."""
        if self._used is not None:
            for i in positions:
                self._used(tier, self._state.name(chain.namespace, chain.digests[i], 0, chain.depth(i)))
        self._publish(chain.namespace, self._pool.insert(chain, positions[0], positions[-1] + 1), tier)

    def _take(self, chain: Chain, first: int) -> tuple[list[ExtentPin], list[bytes]]:
        """Take in the chunks from `first` on that are not there, until no slot can be freed. (Those, what was there.)"""
        spans: list[ExtentPin] = []
        there: list[bytes] = []
        digests = chain.digests
        while first < len(digests):
            last = self._pool.absent(chain, first, len(digests))  # mostly all that is left
            there += digests[last : last + 1]
            news = self._pool.insert(chain, first, last)
            spans += news
            if last == len(digests) or sum(size for _, size in news) < last - first:
                break
            first = last + 1
        return spans, there

    def _publish(self, namespace: bytes, spans: list[ExtentPin], below: int) -> int:
        """They are ready, and what the index wants written to the first `below` tiers is written. Returns how many objects."""
        state, pool = self._state, self._pool
        ready = pool.publish(spans)
        for tier in range(below):
            for _, name, _ in state.to_write_back(namespace, 0, ready, tier):
                state.directories[tier].add(name, 0)
                if self._written is not None:
                    self._written(tier, name)
        pool.unpin(spans)
        return sum(size for _, size in spans)
