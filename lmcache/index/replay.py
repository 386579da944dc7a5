"""The index without its messages: what it decides for a request whose copies take no time.

Finding, ordering, evicting and what goes to which tier are the index's own (`find`, `Pool`, `State`); left out are the plans
and reports, and with them everything that is about copies under way. For simulations: some hundred thousand chunks a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lmcache.eviction import hears
from lmcache.index.core import Index
from lmcache.index.finder import find
from lmcache.index.messages import EVICTED
from lmcache.index.pool import Entry
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
        state, pool = self._state, self._pool
        digests = chain.digests
        found = find(state, chain, len(digests))
        near = found.entries(0)
        if self._curious:
            pool.policy.asked(digests, found.resident(0))
        if self._learner is not None:
            self._learner(digests, len(near), found.chunks)
        pool.pin(near)
        pool.touch(near)
        tiers: dict[int, int] = {}
        present = near
        if len(near) < found.chunks:
            for i in range(found.chunks):
                source = found.sources[0][i]
                if type(source) is int:
                    tiers[source] = tiers.get(source, 0) + 1
                    self._promote(chain, i, source)
            held = (pool.find(chain.namespace, digest) for digest in digests[: found.chunks])
            present = [entry for entry in held if entry is not None]
        stored = self._keep(chain, found.chunks, present)
        pool.unpin(near)
        return Served(len(near), tiers, stored)

    def lost(self, tier: int, name: Name) -> None:
        """A tier no longer holds an object, see `Index.announce`."""
        if self._state.known[tier].remove(name, 0):
            self._pool.gone.put(name.chain, EVICTED)

    def _promote(self, chain: Chain, i: int, tier: int) -> None:
        digest = chain.digests[i]
        if self._used is not None:
            self._used(tier, self._state.name(chain.namespace, digest, 0, chain.depth(i)))
        entry = self._pool.insert(chain.namespace, digest, chain.parent(i), chain.depth(i))
        if entry is not None:
            self._publish(chain.namespace, [entry], tier)

    def _keep(self, chain: Chain, first: int, present: list[Entry]) -> int:
        """Take in the chunks from `first` on that are not there; stops where no slot can be freed. As a store does, it counts
        as a use of those that are there.
        """
        pool, digests, namespace = self._pool, chain.digests, chain.namespace
        space = pool.spaces.get(namespace)
        if space is None or not any(map(space.ready.get, digests[first:])):  # mostly: one stretch of news
            run = pool.insert_run(
                namespace, digests[first:], chain.parent(first), chain.depth(first), linked=chain.linked
            )
        else:
            run = []
            present = list(present)
            for i in range(first, len(digests)):
                entry = pool.find(namespace, digests[i])
                if entry is not None:
                    present.append(entry)
                    continue
                entry = pool.insert(namespace, digests[i], chain.parent(i), chain.depth(i))
                if entry is None:
                    break
                run.append(entry)
        pool.touch(present)
        if run:
            self._publish(namespace, run, len(self._state.tiers))
        return len(run)

    def _publish(self, namespace: bytes, run: list[Entry], below: int) -> None:
        """They are ready, and what the index wants written to the first `below` tiers is written."""
        state, pool = self._state, self._pool
        pool.publish(run)
        for tier in range(below):
            for _, name in state.spillable(namespace, 0, run, tier):
                state.known[tier].add(name, 0)
                if self._written is not None:
                    self._written(tier, name)
        pool.unpin(run)
