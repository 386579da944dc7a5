"""Builds jobs: the ops that a load, a prefetch or a store of a chain needs, and their slots."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from lmcache.control.extents import Extent, ExtentPin, extents_of
from lmcache.control.jobs import LoadTarget, TrackedJob
from lmcache.control.lookup import FoundHit, consecutive
from lmcache.control.slot_pool import SlotPool
from lmcache.control.state import State
from lmcache.plan import ArenaSlot, Chain, Copy, Engine, Name, Place, Tier

ENGINE = Engine()


def load(state: State, job: TrackedJob, chain: Chain, hit: FoundHit, skip: int) -> None:
    """Adds the ops that load chunks [skip, hit) into the engine to `job`, which pins `hit`."""
    chunk, namespace, digests = state.chunk_tokens, chain.namespace, chain.digests
    near = _resident(job, hit)
    promoted = _promotion_slots(state, job, chain, hit, skip // chunk)
    targets: list[tuple[int, int, int]] = []
    ops = job.ops
    for i in range(skip // chunk, hit.chunks):
        depth = i if chain.linked else 0
        for group, need in enumerate(hit.needs):
            if i not in need:
                continue
            name = Name(namespace, digests[i], group, chunk, depth)
            source: Place | None = near[group].get(i)
            if source is None:  # directly into the engine if no slot can be freed, or another job promotes the object
                source = Tier(hit.below[group][i])
                if i in promoted[group]:
                    ops.append(Copy(name, source, promoted[group][i]))
                    source = promoted[group][i]
            ops.append(Copy(name, source, ENGINE, i * chunk))
            targets.append((len(ops) - 1, group, i))
    job.target = LoadTarget(hit.chunks, skip, targets)


def prefetch(state: State, job: TrackedJob, chain: Chain, hit: FoundHit, skip: int) -> None:
    """Adds the ops that copy what the hit needs from tiers into DRAM to `job`, which pins `hit`, as far as slots can be
    freed; possibly none.
    """
    first = skip // state.chunk_tokens
    promoted = _promotion_slots(state, job, chain, hit, first)
    for i in range(first, hit.chunks):
        for group, slots in enumerate(promoted):
            if i in slots:
                name = state.name(chain.namespace, chain.digests[i], group, chain.depth(i))
                job.ops.append(Copy(name, Tier(hit.below[group][i]), slots[i]))


def pins_of(state: State, hit: FoundHit) -> list[tuple[SlotPool, list[ExtentPin]]]:
    """Pins the part of a hit that is in DRAM, one entry per group; to be called before any slot is taken."""
    pins = []
    for group, pool in enumerate(state.pools):
        pins.append((pool, pool.pin(hit.extents(group))))
    return pins


def store(
    state: State,
    job: TrackedJob,
    chain: Chain,
    first: int,
    last: int,
    resident: Sequence[Sequence[bool]] | None,
) -> tuple[set[int], Counter[str]]:
    """Adds the ops that copy chunks [first, last) into DRAM to `job`; returns their positions, and skipped objects by reason."""
    skipped: Counter[str] = Counter()
    ops: list[tuple[int, Copy]] = []
    missing: set[int] = set()  # positions that no hit can contain: a group of rule `all` does not have them
    digests, chunk = list(chain.digests[:last]), state.chunk_tokens
    for group in sorted(range(len(state.pools)), key=lambda g: not state.pools[g].chained):
        pool = state.pools[group]
        end = min(last, 1) if state.rules[group].kind == "whole" else last
        stops = [i for i in range(first, end) if i in missing or (resident is not None and not resident[group][i])]
        stops.append(end)
        touched: list[bytes] = []
        i = first
        while i < end:
            ready = next(pool.walk(chain.namespace, digests, i, end), None)
            if ready is not None or pool.find(chain.namespace, digests[i], chain.depth(i)) is not None:
                size = ready.size if ready else 1
                skipped["present"] += size
                touched += digests[i : i + size]
                i += size
                continue
            if i in missing or (pool.chained and chain.parent(i) and not _reachable(state, chain, group, i - 1)):
                skipped["parent"] += 1
            elif resident is not None and not resident[group][i]:
                skipped["resident"] += 1
            else:
                stop = stops[bisect_left(stops, i)]
                slots = _take_slots(state, job, chain, group, i, pool.absent(chain, i, stop))
                for slot in slots:
                    name = Name(chain.namespace, digests[i], group, chunk, i if chain.linked else 0)
                    ops.append((i, Copy(name, ENGINE, slot, i * chunk)))
                    i += 1
                if slots:
                    continue
                skipped["full"] += 1
            if pool.chained and chain.linked and state.tier_with(chain.namespace, digests[i], group) is None:
                missing.add(i)
            i += 1
        pool.touch(pool.carve(pool.present(chain.namespace, touched, 0, len(touched))))
    ops.sort(key=itemgetter(0))
    job.ops.extend(op for _, op in ops)
    return {i for i, _ in ops}, skipped


def _reachable(state: State, chain: Chain, group: int, i: int) -> bool:
    digest = chain.digests[i]
    if state.pools[group].find(chain.namespace, digest, chain.depth(i)) is not None:
        return True
    return state.tier_with(chain.namespace, digest, group) is not None


def _resident(job: TrackedJob, hit: FoundHit) -> list[dict[int, ArenaSlot]]:
    """Per group, the arena slot of each position of the hit that is in DRAM, from the first pins of the job."""
    resident = []
    for (_, pins), need, below in zip(job.pins, hit.needs, hit.below, strict=False):
        positions = [i for i in need if i not in below] if below else need
        resident.append(dict(zip(positions, _slots(extents_of(pins)), strict=True)))
    return resident


def _promotion_slots(
    state: State, job: TrackedJob, chain: Chain, hit: FoundHit, first: int
) -> list[dict[int, ArenaSlot]]:
    """Per group, position → new slot for objects that come from tiers, from chunk `first` on.

    Without objects for which no slot can be freed, or for which another job already fills one.
    """
    promoted: list[dict[int, ArenaSlot]] = []
    for group, pool in enumerate(state.pools):
        slots: dict[int, ArenaSlot] = {}
        for start, stop in consecutive(sorted(i for i in hit.below[group] if i >= first)):
            while start < stop:
                end = pool.absent(chain, start, stop)
                slots.update(enumerate(_take_slots(state, job, chain, group, start, end), start))
                start = end + 1
        promoted.append(slots)
    return promoted


def _take_slots(state: State, job: TrackedJob, chain: Chain, group: int, first: int, last: int) -> list[ArenaSlot]:
    """Takes slots for chunks [first, last), which are absent, or as many of the first ones as can be freed."""
    pool = state.pools[group]
    pins = pool.insert(chain, first, last)
    job.inserted.setdefault(group, []).extend(pins)
    job.pins.append((pool, pins))
    return list(_slots(extents_of(pins)))


def _slots(extents: Iterable[Extent]) -> Iterator[ArenaSlot]:
    return (ArenaSlot(slot, generation) for extent in extents for _, slot, generation, _ in extent.objects())
