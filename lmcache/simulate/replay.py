"""Replays requests against an `Index` without plans and reports, as if copies took no time.

Lookup, eviction order and admission are the index's own (`find`, `SlotPool`, `State`); everything about copies under way is
left out. For simulations, at a million chunks per second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

from lmcache.control.eviction import hears
from lmcache.control.extents import ExtentPin
from lmcache.control.index import Index
from lmcache.control.lookup import consecutive, find
from lmcache.control.outcomes import StopReason
from lmcache.plan import Chain, Name

Written = Callable[[int, Name], None]
"""Called with (tier, object)."""


class Served(NamedTuple):
    """The result of a request.

    Attributes:
        dram: leading chunks found in DRAM.
        tiers: tier → leading chunks found in it.
        stored: chunks newly stored in DRAM.
    """

    dram: int
    tiers: dict[int, int]
    stored: int

    @property
    def chunks(self) -> int:
        """Leading chunks found."""
        return self.dram + sum(self.tiers.values())


class Replay:
    """Drives an index of one group, of rule `all`, on one rank. Nothing else may use the index.

    Args:
        index: the index.
        written: called for each object that was written to a tier; may call `lost`.
        used: called for each object that was read from a tier.
    """

    def __init__(self, index: Index, *, written: Written | None = None, used: Written | None = None) -> None:
        state = index.state
        if len(state.pools) != 1 or state.rules[0].kind != "all" or state.jobs.ranks != 1:
            raise ValueError("a replay needs an index of one group, of rule `all`, on one rank")
        self._state = state
        self._pool = state.pools[0]
        self._policy_learns = hears(self._pool.policy)
        self._learner = index.learner
        self._written = written
        self._used = used

    def request(self, chain: Chain) -> Served:
        """Looks up a chain, loads the hit and stores the rest, as an engine does for a prompt."""
        pool, digests = self._pool, chain.digests
        if not digests:  # a prompt shorter than a chunk
            return Served(0, {}, 0)
        hit = find(self._state, chain, len(digests))
        chunks, below = hit.chunks, hit.below[0]
        if self._policy_learns:
            pool.policy.asked(digests, hit.resident(0))
        near = pool.carve(hit.slices(0))
        if self._learner is not None:
            self._learner(digests, hit.resident(0), chunks)
        pins = pool.pin(near)
        pool.touch(near)
        for first, last in consecutive(below):
            for tier, positions in groupby(range(first, last), below.__getitem__):
                self._promote(chain, list(positions), tier)
        fresh, present = self._store(chain, chunks)
        if below or present:
            names = [*digests[:chunks], *present]
            near = pool.carve(pool.present(chain.namespace, names, 0, len(names)))
        pool.touch(near)  # a store counts as a use of the objects already present
        stored = self._publish(chain.namespace, fresh, len(self._state.tiers))
        pool.unpin(pins)
        return Served(chunks - len(below), dict(Counter(below.values())) if below else {}, stored)

    def lost(self, tier: int, name: Name) -> None:
        """Records that a tier no longer has an object, see `Index.announce`."""
        if self._state.directories[tier].remove(name, 0):
            self._pool.gone.put(name.chain, StopReason.EVICTED)

    def _promote(self, chain: Chain, positions: list[int], tier: int) -> None:
        """Promotes consecutive chunks from a tier, as far as slots can be freed."""
        if self._used is not None:
            for i in positions:
                self._used(tier, self._state.name(chain.namespace, chain.digests[i], 0, chain.depth(i)))
        self._publish(chain.namespace, self._pool.insert(chain, positions[0], positions[-1] + 1), tier)

    def _store(self, chain: Chain, first: int) -> tuple[list[ExtentPin], list[bytes]]:
        """Inserts the chunks from `first` on that are absent, until no slot can be freed; returns (those, present digests)."""
        pins: list[ExtentPin] = []
        present: list[bytes] = []
        digests = chain.digests
        while first < len(digests):
            last = self._pool.absent(chain, first, len(digests))  # usually all of the rest
            present += digests[last : last + 1]
            inserted = self._pool.insert(chain, first, last)
            pins += inserted
            if last == len(digests) or sum(size for _, size in inserted) < last - first:
                break
            first = last + 1
        return pins, present

    def _publish(self, namespace: bytes, pins: list[ExtentPin], below: int) -> int:
        """Makes objects ready and writes those that are admitted to the first `below` tiers; returns their number."""
        state, pool = self._state, self._pool
        ready = pool.publish(pins)
        for tier in range(below):
            for _, name, _ in state.to_write_back(namespace, 0, ready, tier):
                state.directories[tier].add(name, 0)
                if self._written is not None:
                    self._written(tier, name)
        pool.unpin(pins)
        return sum(size for _, size in pins)
