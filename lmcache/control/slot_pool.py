"""One group's arena in DRAM: which object is in which slot, and which slot may be used anew.

    absent → WRITING → READY → EVICTING → absent

Objects come, are used and go in extents (`lmcache.control.extents`). One that *leaves* is found by nobody any more, at once; its
slot follows when the last reference is gone. References are leases and jobs; a job lets go only when every rank called it
final. So a slot is never handed out under a reader or a hung writer. In groups of rule `all` an object with a resident
child stays: extents lose their objects from the end, and children leave before their parents.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lmcache.control.eviction import Policy, Recent
from lmcache.control.extents import (
    EVICTING,
    LONGEST,
    READY,
    WRITING,
    Extent,
    ExtentPin,
    ExtentSlice,
    NamespaceTable,
    ResidentObject,
    pieces,
)
from lmcache.control.outcomes import StopReason
from lmcache.plan import Chain

REMEMBERED = 16_384
"""How many vanished objects are remembered with the reason, at least."""


class SlotPool:
    """The arena of one group: `slots` equal slots, numbered alike on every rank."""

    def __init__(self, slots: int, policy: Policy, *, chained: bool) -> None:
        self.slots = slots
        self.chained = chained
        self.spaces: dict[bytes, NamespaceTable] = {}
        self.gone: Recent[StopReason] = Recent(REMEMBERED)
        self.policy = policy
        self.evictions = 0
        self.changes = 0  # grows whenever an object arrives, becomes ready or leaves
        self.writing = 0  # objects in state WRITING
        self.leaving: set[Extent] = set()  # EVICTING, still referenced
        # Called with (there, namespace, digest) for what becomes ready, and for what was and leaves.
        self.notice: Callable[[bool, bytes, bytes], None] | None = None
        self.free: array[int] = array("I")
        self._fresh = 0  # slots from here on were never used
        self._generation = 0

    # ---------------------------------------------------------------- finding

    def find(self, namespace: bytes, digest: bytes, depth: int = 0) -> ResidentObject | None:
        """The object, ready or being written. `depth` only makes it faster."""
        space = self.spaces.get(namespace)
        extent = space.held.get(digest) if space else None
        return ResidentObject(extent, extent.find(digest, depth)) if extent else None

    def walk(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Where `digests[start:stop]` lie, up to the first that is not ready."""
        space = self.spaces.get(namespace)
        return space.walk(digests, start, stop) if space else iter(())

    def present(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Where those of `digests[start:stop]` lie that are ready."""
        while start < stop:
            for part in self.walk(namespace, digests, start, stop):
                yield part
                start += part.size
            start += 1

    def absent(self, chain: Chain, start: int, stop: int) -> int:
        """Where the stretch of a chain ends that begins at `start` and is not resident, neither ready nor being written; at
        `stop` at the latest. No name is in it twice.
        """
        digests, space = chain.digests, self.spaces.get(chain.namespace)
        held: Mapping[bytes, Extent] = space.held if space else {}
        if chain.linked and held.keys().isdisjoint(map(digests.__getitem__, range(start, stop))):
            return stop
        met: set[bytes] = set()
        for i in range(start, stop):
            if digests[i] in held or digests[i] in met:
                return i
            if not chain.linked:
                met.add(digests[i])
        return stop

    def residents(self) -> Iterator[ResidentObject]:
        """All objects that can be found, ready or being written."""
        for space in self.spaces.values():
            for digest, extent in space.held.items():
                yield ResidentObject(extent, extent.find(digest, 0))

    # ---------------------------------------------------------------- arriving

    def insert(self, chain: Chain, start: int, stop: int) -> list[ExtentPin]:
        """Assign slots to a stretch of a chain, which is `absent`: to as much of its beginning as slots can be freed.

        The objects are in state WRITING, and held once: what this returns is to be given to `unpin`.
        """
        if start >= stop:
            return []
        namespace, parent = chain.namespace, chain.parent(start) if self.chained else None
        above = self._ending_with(namespace, parent, start - 1) if parent is not None else None
        if above:
            above.refs += 1  # its slot must not be the one that is freed for its child
        slots = self._take_slots(stop - start)
        spans: list[ExtentPin] = []
        if slots:
            space = self.spaces.get(namespace)
            if space is None:
                space = self.spaces[namespace] = NamespaceTable(namespace, chained=self.chained)
            self.changes += 1
            spans = self._extents(space, chain, start, slots)
            self._generation += len(slots)
            self.writing += len(slots)
            if above:
                above.children += 1
            elif parent is not None:
                space.orphans[parent] = space.orphans.get(parent, 0) + 1
        if above:
            above.refs -= 1
            self._settle(above)
        return spans

    def publish(self, spans: Iterable[ExtentPin]) -> list[Extent]:
        """Make ready what of it is still being written, parents first; returns that."""
        fresh: list[Extent] = []
        for extent in pieces(spans):
            if extent.state == WRITING:
                extent.state = READY
                self.writing -= len(extent.digests)
                fresh.append(extent)
                cuts = self.policy.cuts(extent.digests)
                if cuts:
                    fresh += reversed([extent.split(at) for at in reversed(cuts)])
        if fresh:
            self.changes += 1
            self.policy.add(fresh)
            if self.notice is not None:
                for extent in fresh:
                    self._tell(True, extent.space.namespace, extent.digests)
        return fresh

    # ---------------------------------------------------------------- being used

    def carve(self, parts: Iterable[ExtentSlice]) -> list[Extent]:
        """Extents of exactly these objects, each part one; splits where it has to."""
        extents = []
        for _, extent, at, size in parts:
            assert at + size <= len(extent.digests), "a part that is no longer good"
            if at + size < len(extent.digests):
                self._split(extent, at + size)
            extents.append(self._split(extent, at) if at else extent)
        return extents

    def pin(self, extents: Sequence[Extent]) -> list[ExtentPin]:
        """One more reference each; to be given to `unpin`."""
        for extent in extents:
            extent.refs += 1
        return [(extent, len(extent.digests)) for extent in extents]

    def unpin(self, spans: Iterable[ExtentPin]) -> None:
        """One reference less each, to whatever parts they are in by now."""
        for extent in pieces(spans):
            extent.refs -= 1
            if not extent.refs:
                extent.rest = None
                if not extent.stamp:
                    self._settle(extent)

    def touch(self, extents: Sequence[Extent]) -> None:
        """Those ready objects were used. Parents first."""
        if extents:
            self.policy.touch(extents)

    # ---------------------------------------------------------------- leaving

    def drop(self, namespace: bytes, digest: bytes, depth: int, generation: int, reason: StopReason) -> None:
        """Nobody finds this object from now on; its slot is free once nothing refers to it.

        Nothing happens if that generation of it is not there (any more). `reason` is remembered as to why a later lookup
        misses it.
        """
        found = self.find(namespace, digest, depth)
        if found is not None and found.generation == generation:
            [extent] = self.carve([found.part])
            self._leave(extent)
            self.gone.put(digest, reason)

    def clear(self, namespace: bytes | None) -> int:
        """Drop everything (of one namespace) without a trace; returns how many objects left."""
        spaces = [space for space in self.spaces.values() if namespace in (None, space.namespace)]
        doomed = [extent for space in spaces for extent in dict.fromkeys(space.held.values())]
        for extent in reversed(doomed):
            self._leave(extent)
        return sum(len(extent.digests) for extent in doomed)

    def reset(self) -> None:
        """Every slot is free at once, whoever used it. Generations go on."""
        self.clear(None)
        assert not self.leaving, "a reset releases all references first"

    @property
    def unused(self) -> int:
        """Slots that hold nothing."""
        return len(self.free) + self.slots - self._fresh

    def _leave(self, extent: Extent) -> None:
        space = extent.space
        self.changes += 1
        if extent.state == READY:
            if self.notice is not None:
                self._tell(False, space.namespace, extent.digests)
            self.policy.discard(extent)
        else:
            self.writing -= len(extent.digests)
        extent.state = EVICTING
        for digest in extent.digests:
            del space.held[digest]
        if extent.children:
            space.orphans[extent.digests[-1]] = extent.children
            extent.children = 0
        if extent.refs:
            self.leaving.add(extent)
        else:
            self.free.extend(extent.slots)
        self._left(extent)

    def _left(self, extent: Extent) -> None:
        """It is found no more: so much for its parent, and for a space that was all its own."""
        space, parent = extent.space, extent.parent
        if parent is not None:
            above = space.held.get(parent)
            if above is not None:
                above.children -= 1
                self._settle(above)
            elif space.orphans[parent] == 1:
                del space.orphans[parent]
            else:
                space.orphans[parent] -= 1
        if not space.held:
            del self.spaces[space.namespace]

    def _settle(self, extent: Extent) -> None:
        """It lost a reference or a child: if it is in none of the policy's queues, it may be evictable, or its slots free."""
        if extent.refs or extent.stamp or extent.children:
            return
        if extent.state == READY:
            self.policy.restore(extent)
        elif extent.state == EVICTING:
            self.leaving.discard(extent)
            self.free.extend(extent.slots)

    # ---------------------------------------------------------------- slots

    def _take_slots(self, count: int) -> array[int]:
        """Up to `count` slots: free ones, ones that were never used, those of the coldest objects that may go."""
        slots = self.free[-count:]
        del self.free[-count:]
        fresh = min(count - len(slots), self.slots - self._fresh)
        slots.extend(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        if len(slots) < count:
            self._evict(slots, count)
        return slots

    def _evict(self, slots: array[int], count: int) -> None:
        """Bring `slots` to `count` with those of the coldest ready objects that nothing holds, as far as there are any. This
        is what a full arena does all day.
        """
        pop: Callable[[], Extent | None] = self.policy.pop  # type: ignore[assignment]  # it holds what it was given
        before = len(slots)
        while len(slots) < count and (extent := pop()) is not None:
            if extent.refs or extent.children:
                continue  # it stays aside (stamp 0) until `_settle` finds that nothing holds it any more
            want = min(count - len(slots), self.policy.most(extent))
            digests = extent.digests
            if want < len(digests):
                last = digests[-want:]
                slots.extend(extent.slots[-want:])
                del digests[-want:], extent.slots[-want:]
            else:
                last = digests
                slots.extend(extent.slots)
                extent.state = EVICTING
            held = extent.space.held
            for digest in last:
                del held[digest]
            if self.notice is not None:
                self._tell(False, extent.space.namespace, last)
            self.changes += 1
            self.gone.put_all(last, StopReason.EVICTED)
            self.policy.evicted(extent, last)
            if extent.state == READY:
                self.policy.restore(extent)
            else:
                self._left(extent)
        self.evictions += len(slots) - before

    # ---------------------------------------------------------------- extents

    def _extents(self, space: NamespaceTable, chain: Chain, start: int, slots: array[int]) -> list[ExtentPin]:
        """New extents for as many objects from `start` on as there are slots, cut where one has children already."""
        digests, held, orphans = chain.digests, space.held, space.orphans
        stop = start + len(slots)
        ends = [*range(start + LONGEST, stop, LONGEST), stop]
        if orphans:
            ends = sorted({*ends, *(i for i in range(start + 1, stop) if digests[i - 1] in orphans)})
        spans: list[ExtentPin] = []
        first, generation = start, self._generation + 1
        for end in ends:
            names, mine = list(digests[start:end]), slots[start - first : end - first]
            parent = chain.parent(start) if self.chained else None
            extent = Extent(
                space, names, mine, generation + start - first, parent, chain.depth(start), int(chain.linked)
            )
            for digest in names:
                held[digest] = extent
            extent.children = int(extent.tied and end < stop)
            if orphans:
                extent.children += orphans.pop(names[-1], 0)
            spans.append((extent, end - start))
            start = end
        return spans

    def _split(self, extent: Extent, at: int) -> Extent:
        rest = extent.split(at)
        if extent.stamp:
            self.policy.split(extent, rest)
        return rest

    def _ending_with(self, namespace: bytes, digest: bytes, depth: int) -> Extent | None:
        """The extent whose last object this is, split if need be, so that something can hang off it."""
        space = self.spaces.get(namespace)
        extent = space.held.get(digest) if space else None
        if extent is not None and extent.digests[-1] != digest:
            self._split(extent, extent.find(digest, depth) + 1)
        return extent

    def _tell(self, there: bool, namespace: bytes, digests: Iterable[bytes]) -> None:
        assert self.notice is not None
        for digest in digests:
            self.notice(there, namespace, digest)
