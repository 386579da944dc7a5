"""Building jobs: which ops a load, a prefetch or a store of a chain needs, and which slots they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lmcache.index.finder import Found, find
from lmcache.index.jobs import Wanted, Work
from lmcache.index.messages import Owner
from lmcache.index.pool import Entry
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
    _pin(state, work, found)
    targets: list[tuple[int, int, int]] = []
    for i in range(skip // chunk, found.chunks):
        for group, pool in enumerate(state.pools):
            if i not in found.needs[group]:
                continue
            source = found.sources[group][i]
            name = state.name(chain.namespace, chain.digests[i], group, chain.depth(i))
            entry = source if isinstance(source, Entry) else _fill(state, work, chain, group, i, source)
            if entry is None:  # straight into the engine: no slot can be freed, or another job is filling one
                assert isinstance(source, int)
                work.ops.append(Copy(name, Tier(source), ENGINE, i * chunk))
            else:
                work.reads[len(work.ops)] = pool, entry
                work.ops.append(Copy(name, Slot(entry.slot, entry.generation), ENGINE, i * chunk))
            targets.append((len(work.ops) - 1, group, i))
    work.wanted = Wanted(found.chunks, skip, targets)
    return work


def prefetch(state: State, owner: Owner, chain: Chain, limit: int, skip: int = 0) -> Work:
    """A job that brings what the hit needs from tiers into DRAM, as far as slots can be freed; maybe without ops."""
    found = find(state, chain, limit)
    work = Work("prefetch", owner, chain.namespace)
    _pin(state, work, found)
    for i in range(skip // state.chunk_tokens, found.chunks):
        for group in range(len(state.pools)):
            if i in found.needs[group] and isinstance(source := found.sources[group][i], int):
                _fill(state, work, chain, group, i, source)
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
    touched: list[list[Entry]] = [[] for _ in state.pools]
    # Groups of rule `all` first: where they have a gap, nobody can reach what lies behind it.
    order = sorted(range(len(state.pools)), key=lambda g: not state.pools[g].chained)
    for i in range(first, last):
        digest = chain.digests[i]
        gap = False
        for group in order:
            pool = state.pools[group]
            if state.rules[group].kind == "whole" and i:
                continue
            entry = pool.find(chain.namespace, digest)
            if entry is not None:
                skipped["present"] += 1
                touched[group].append(entry)
                continue
            if gap or (pool.chained and chain.parent(i) and not _reachable(state, chain, group, i - 1)):
                skipped["parent"] += 1
            elif resident is not None and not resident[group][i]:
                skipped["resident"] += 1
            else:
                entry = pool.insert(chain.namespace, digest, chain.parent(i), chain.depth(i))
                if entry is None:
                    skipped["full"] += 1
            if entry is None:
                gap = gap or (pool.chained and chain.linked and state.tier_with(chain.namespace, digest, group) is None)
                continue
            name = state.name(chain.namespace, digest, group, chain.depth(i))
            work.writes[len(work.ops)] = pool, entry
            work.ops.append(Copy(name, ENGINE, Slot(entry.slot, entry.generation), i * state.chunk_tokens))
            work.pins.append((pool, [entry]))
            taken.add(i)
    for pool, run in zip(state.pools, touched, strict=True):
        pool.touch(run)
    return work, taken, skipped


def _reachable(state: State, chain: Chain, group: int, i: int) -> bool:
    digest = chain.digests[i]
    if state.pools[group].find(chain.namespace, digest) is not None:
        return True
    return state.tier_with(chain.namespace, digest, group) is not None


def _pin(state: State, work: Work, found: Found) -> None:
    """Hold what is in DRAM, before a slot for anything else is taken from there."""
    for group, pool in enumerate(state.pools):
        entries = found.entries(group)
        pool.pin(entries)
        work.pins.append((pool, entries))


def _fill(state: State, work: Work, chain: Chain, group: int, i: int, tier: int) -> Entry | None:
    """Add a hop from a tier into a fresh slot, if there is one."""
    pool = state.pools[group]
    digest = chain.digests[i]
    if pool.find(chain.namespace, digest) is not None:  # being written by another job
        return None
    entry = pool.insert(chain.namespace, digest, chain.parent(i), chain.depth(i))
    if entry is None:
        return None
    name = state.name(chain.namespace, digest, group, chain.depth(i))
    work.writes[len(work.ops)] = pool, entry
    work.ops.append(Copy(name, Tier(tier), Slot(entry.slot, entry.generation)))
    work.pins.append((pool, [entry]))
    return entry
