"""Building jobs: which ops a load, a prefetch or a store of a chain needs, and which slots they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmcache.index.finder import Found, find
from lmcache.index.jobs import Wanted, Work
from lmcache.index.messages import Owner
from lmcache.index.runs import Run, spans_of
from lmcache.index.state import State
from lmcache.plan import Chain, Copy, Engine, Slot, Tier

ENGINE = Engine()


def load(state: State, owner: Owner, chain: Chain, limit: int, skip: int) -> Work | None:
    """A job that brings chunks [skip, longest hit ≤ limit) into the engine, or None if that is nothing."""
    found = find(state, chain, limit)
    chunk = state.chunk_tokens
    if found.chunks * chunk <= skip:
        return None
    work = Work("load", owner, chain.namespace)
    slots = _pin(state, work, found)
    targets: list[tuple[int, int, int]] = []
    filling = Filling(state, work, chain)
    for i in range(skip // chunk, found.chunks):
        for group in range(len(state.pools)):
            if i not in found.needs[group]:
                continue
            name = state.name(chain.namespace, chain.digests[i], group, chain.depth(i))
            slot, tier = slots[group].get(i), found.below[group].get(i)
            if slot is None and tier is not None:
                slot = filling.hop(group, i, tier)
            # Straight into the engine if no slot can be freed, or another job is filling one.
            source = Tier(tier) if slot is None and tier is not None else slot
            assert source is not None
            work.ops.append(Copy(name, source, ENGINE, i * chunk))
            targets.append((len(work.ops) - 1, group, i))
    filling.end()
    work.wanted = Wanted(found.chunks, skip, targets)
    return work


def prefetch(state: State, owner: Owner, chain: Chain, limit: int, skip: int = 0) -> Work:
    """A job that brings what the hit needs from tiers into DRAM, as far as slots can be freed; maybe without ops."""
    found = find(state, chain, limit)
    work = Work("prefetch", owner, chain.namespace)
    _pin(state, work, found)
    filling = Filling(state, work, chain)
    for i in range(skip // state.chunk_tokens, found.chunks):
        for group in range(len(state.pools)):
            tier = found.below[group].get(i)
            if tier is not None:
                filling.hop(group, i, tier)
    filling.end()
    return work


def store(
    state: State,
    owner: Owner,
    chain: Chain,
    first: int,
    last: int,
    resident: Sequence[Sequence[bool]] | None,
) -> tuple[Work, set[int], Counter[str]]:
    """A job that copies chunks [first, last) into DRAM; the positions it copies something of; skipped objects by reason."""
    work = Work("store", owner, chain.namespace)
    skipped: Counter[str] = Counter()
    taken: set[int] = set()
    touched: list[list[bytes]] = [[] for _ in state.pools]
    filling = Filling(state, work, chain)
    # Groups of rule `all` first: where they have a gap, nobody can reach what lies behind it.
    order = sorted(range(len(state.pools)), key=lambda g: not state.pools[g].chained)
    for i in range(first, last):
        digest = chain.digests[i]
        gap = False
        for group in order:
            pool = state.pools[group]
            if state.rules[group].kind == "whole" and i:
                continue
            if pool.find(chain.namespace, digest, chain.depth(i)) is not None:
                skipped["present"] += 1
                touched[group].append(digest)
                continue
            slot = None
            if gap or (pool.chained and chain.parent(i) and not _reachable(state, chain, group, i - 1)):
                skipped["parent"] += 1
            elif resident is not None and not resident[group][i]:
                skipped["resident"] += 1
            else:
                slot = filling.slot(group, i)
                if slot is None:
                    skipped["full"] += 1
            if slot is None:
                gap = gap or (pool.chained and chain.linked and state.tier_with(chain.namespace, digest, group) is None)
                continue
            name = state.name(chain.namespace, digest, group, chain.depth(i))
            work.ops.append(Copy(name, ENGINE, slot, i * state.chunk_tokens))
            taken.add(i)
    filling.end()
    for pool, digests in zip(state.pools, touched, strict=True):
        pool.touch(pool.carve(pool.present(chain.namespace, digests, 0, len(digests))))
    return work, taken, skipped


def _reachable(state: State, chain: Chain, group: int, i: int) -> bool:
    digest = chain.digests[i]
    if state.pools[group].find(chain.namespace, digest, chain.depth(i)) is not None:
        return True
    return state.tier_with(chain.namespace, digest, group) is not None


def _pin(state: State, work: Work, found: Found) -> list[dict[int, Slot]]:
    """Hold what is in DRAM, before a slot for anything else is taken from there; per group, where each position of it lies."""
    slots: list[dict[int, Slot]] = []
    for group, pool in enumerate(state.pools):
        runs = pool.carve(found.parts(group))
        work.pins.append((pool, pool.pin(runs)))
        positions = (i for i in found.needs[group] if i not in found.below[group])
        objects = (Slot(slot, generation) for run in runs for _, slot, generation, _ in run.objects())
        slots.append(dict(zip(positions, objects, strict=True)))
    return slots


class Filling:
    """Takes slots for the objects that a job copies into DRAM. Neighbours in the chain become one run."""

    def __init__(self, state: State, work: Work, chain: Chain) -> None:
        self._state = state
        self._work = work
        self._chain = chain
        self._runs: list[list[Run]] = [[] for _ in state.pools]
        self._next = [-1] * len(state.pools)  # the position that the last run of each group may grow by

    def slot(self, group: int, i: int) -> Slot | None:
        """A slot for chunk `i`, which is not resident, or None if none can be freed."""
        chain, runs = self._chain, self._runs[group]
        last = runs[-1] if self._next[group] == i else None
        names = chain.digests[i : i + 1]
        inserted = self._state.pools[group].insert(
            chain.namespace, names, chain.parent(i), chain.depth(i), linked=chain.linked, onto=last
        )
        if not inserted:
            return None
        [run] = inserted
        if run is not last:
            runs.append(run)
        self._next[group] = i + 1
        return Slot(run.slots[-1], run.generation + len(run.slots) - 1)

    def hop(self, group: int, i: int, tier: int) -> Slot | None:
        """A slot for chunk `i` that the job fills from a tier, if there is one and no other job is filling one."""
        chain, state = self._chain, self._state
        if state.pools[group].find(chain.namespace, chain.digests[i], chain.depth(i)) is not None:
            return None
        slot = self.slot(group, i)
        if slot is not None:
            name = state.name(chain.namespace, chain.digests[i], group, chain.depth(i))
            self._work.ops.append(Copy(name, Tier(tier), slot))
        return slot

    def end(self) -> None:
        """The job holds what it has taken."""
        for group, runs in enumerate(self._runs):
            if runs:
                spans = spans_of(runs)
                self._work.fills.append((group, spans))
                self._work.pins.append((self._state.pools[group], spans))
