"""Building jobs: which ops a load, a prefetch or a store of a chain needs, and which slots they get."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from lmcache.control.extents import Extent, ExtentPin, pieces
from lmcache.control.jobs import LoadTarget, TrackedJob
from lmcache.control.lookup import Found, stretches
from lmcache.control.outcomes import Owner
from lmcache.control.slot_pool import SlotPool
from lmcache.control.state import State
from lmcache.plan import ArenaSlot, Chain, Copy, Engine, Name, Place, Tier

ENGINE = Engine()


def load(state: State, work: TrackedJob, chain: Chain, found: Found, skip: int) -> None:
    """Fills `work`, which holds `found`, with the ops that bring chunks [skip, hit) into the engine."""
    chunk, namespace, digests = state.chunk_tokens, chain.namespace, chain.digests
    near = _resident(work, found)
    hops = _hops(state, work, chain, found, skip // chunk)
    targets: list[tuple[int, int, int]] = []
    ops = work.ops
    for i in range(skip // chunk, found.chunks):
        depth = i if chain.linked else 0
        for group, need in enumerate(found.needs):
            if i not in need:
                continue
            name = Name(namespace, digests[i], group, chunk, depth)
            source: Place | None = near[group].get(i)
            if source is None:  # straight into the engine if no slot can be freed, or another job is filling one
                source = Tier(found.below[group][i])
                if i in hops[group]:
                    ops.append(Copy(name, source, hops[group][i]))
                    source = hops[group][i]
            ops.append(Copy(name, source, ENGINE, i * chunk))
            targets.append((len(ops) - 1, group, i))
    work.wanted = LoadTarget(found.chunks, skip, targets)


def prefetch(state: State, work: TrackedJob, chain: Chain, found: Found, skip: int) -> None:
    """Fills `work`, which holds `found`, with the ops that copy what the hit needs from tiers into DRAM, as far as slots
    can be freed; possibly none.
    """
    first = skip // state.chunk_tokens
    hops = _hops(state, work, chain, found, first)
    for i in range(first, found.chunks):
        for group, slots in enumerate(hops):
            if i in slots:
                name = state.name(chain.namespace, chain.digests[i], group, chain.depth(i))
                work.ops.append(Copy(name, Tier(found.below[group][i]), slots[i]))


def pins_of(state: State, found: Found) -> list[tuple[SlotPool, list[ExtentPin]]]:
    """Pins what is in DRAM of a hit, one entry for each group; must happen before a slot for anything else is taken."""
    pins = []
    for group, pool in enumerate(state.pools):
        pins.append((pool, pool.pin(pool.carve(found.slices(group)))))
    return pins


def store(
    state: State,
    owner: Owner,
    chain: Chain,
    first: int,
    last: int,
    resident: Sequence[Sequence[bool]] | None,
) -> tuple[TrackedJob, set[int], Counter[str]]:
    """A job that copies chunks [first, last) into DRAM; the positions it copies something of; skipped objects by reason."""
    work = TrackedJob("store", owner, chain.namespace)
    skipped: Counter[str] = Counter()
    ops: list[tuple[int, Copy]] = []
    gaps: set[int] = set()  # positions of which a group of rule `all` has nothing: nobody can reach what lies behind it
    digests = list(chain.digests[:last])
    for group in sorted(range(len(state.pools)), key=lambda g: not state.pools[g].chained):
        pool = state.pools[group]
        end = min(last, 1) if state.rules[group].kind == "whole" else last
        barred = [i for i in range(first, end) if i in gaps or (resident is not None and not resident[group][i])]
        barred.append(end)
        touched: list[bytes] = []
        i = first
        while i < end:
            ready = next(pool.walk(chain.namespace, digests, i, end), None)
            if ready is not None or pool.find(chain.namespace, digests[i], chain.depth(i)) is not None:
                there = ready.size if ready else 1
                skipped["present"] += there
                touched += digests[i : i + there]
                i += there
                continue
            if i in gaps or (pool.chained and chain.parent(i) and not _reachable(state, chain, group, i - 1)):
                skipped["parent"] += 1
            elif resident is not None and not resident[group][i]:
                skipped["resident"] += 1
            else:
                stop = barred[bisect_left(barred, i)]
                slots = _take(state, work, chain, group, i, pool.absent(chain, i, stop))
                for slot in slots:
                    name = state.name(chain.namespace, digests[i], group, chain.depth(i))
                    ops.append((i, Copy(name, ENGINE, slot, i * state.chunk_tokens)))
                    i += 1
                if slots:
                    continue
                skipped["full"] += 1
            if pool.chained and chain.linked and state.tier_with(chain.namespace, digests[i], group) is None:
                gaps.add(i)
            i += 1
        pool.touch(pool.carve(pool.present(chain.namespace, touched, 0, len(touched))))
    ops.sort(key=itemgetter(0))
    work.ops.extend(op for _, op in ops)
    return work, {i for i, _ in ops}, skipped


def _reachable(state: State, chain: Chain, group: int, i: int) -> bool:
    digest = chain.digests[i]
    if state.pools[group].find(chain.namespace, digest, chain.depth(i)) is not None:
        return True
    return state.tier_with(chain.namespace, digest, group) is not None


def _resident(work: TrackedJob, found: Found) -> list[dict[int, ArenaSlot]]:
    """Per group, the arena slot of each position of the hit that is in DRAM, from the first pins that the job holds."""
    resident = []
    for (_, pins), need, below in zip(work.pins, found.needs, found.below, strict=False):
        positions = [i for i in need if i not in below] if below else need
        resident.append(dict(zip(positions, _slots(pieces(pins)), strict=True)))
    return resident


def _hops(state: State, work: TrackedJob, chain: Chain, found: Found, first: int) -> list[dict[int, ArenaSlot]]:
    """Per group, slots for what lies in tiers from chunk `first` on, as far as there are any and no other job fills one."""
    hops: list[dict[int, ArenaSlot]] = []
    for group, pool in enumerate(state.pools):
        slots: dict[int, ArenaSlot] = {}
        for start, stop in stretches(sorted(i for i in found.below[group] if i >= first)):
            while start < stop:
                end = pool.absent(chain, start, stop)
                slots.update(enumerate(_take(state, work, chain, group, start, end), start))
                start = end + 1
        hops.append(slots)
    return hops


def _take(state: State, work: TrackedJob, chain: Chain, group: int, first: int, last: int) -> list[ArenaSlot]:
    """Slots that the job fills with as much of the beginning of chunks [first, last), which are absent, as can be freed."""
    pool = state.pools[group]
    spans = pool.insert(chain, first, last)
    work.inserted.setdefault(group, []).extend(spans)
    work.pins.append((pool, spans))
    return list(_slots(pieces(spans)))


def _slots(extents: Iterable[Extent]) -> Iterator[ArenaSlot]:
    return (ArenaSlot(slot, generation) for extent in extents for _, slot, generation, _ in extent.objects())
