"""One group's arena in DRAM: which object is in which slot, and which slots are free.

    absent → WRITING → READY → EVICTING → absent

Objects are stored, used and evicted in extents (`lmcache.control.extents`). An object that leaves is no longer found by any
lookup; its slot becomes free when it is no longer pinned. Leases and jobs pin; a job unpins only when every rank has reported
it final. So a slot is never reassigned while a call, however slow, may read or write it. In groups of rule `all` an object
with a resident child is not evicted: extents shrink from the end, and children leave before their parents.
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
    extents_of,
)
from lmcache.control.outcomes import StopReason
from lmcache.plan import Chain

REMEMBERED = 16_384
"""Least number of departed objects whose reason is remembered."""


class SlotPool:
    """The arena of one group.

    Args:
        slots: number of slots; slot i holds the same object on every rank.
        policy: eviction order.
        chained: whether objects need their parents (rule `all`).

    Attributes:
        spaces: namespace → its resident objects.
        gone: digest → why the object left.
        evictions: objects evicted since the start.
        changes: grows whenever an object arrives, becomes ready or leaves.
        writing: number of objects in state WRITING.
        leaving: extents in state EVICTING: removed, but still pinned.
        notice: called with (True, namespace, digest) when an object becomes ready, with False when a ready one leaves.
        free: slots that were used and are free again.
    """

    def __init__(self, slots: int, policy: Policy, *, chained: bool) -> None:
        self.slots = slots
        self.chained = chained
        self.spaces: dict[bytes, NamespaceTable] = {}
        self.gone: Recent[StopReason] = Recent(REMEMBERED)
        self.policy = policy
        self.evictions = 0
        self.changes = 0
        self.writing = 0
        self.leaving: set[Extent] = set()
        self.notice: Callable[[bool, bytes, bytes], None] | None = None
        self.free: array[int] = array("I")
        self._first_unused = 0  # slots from this one on were never used
        self._generation = 0

    # ---------------------------------------------------------------- finding

    def find(self, namespace: bytes, digest: bytes, depth: int = 0) -> ResidentObject | None:
        """Returns the object, ready or being written. The right `depth` makes the search faster."""
        space = self.spaces.get(namespace)
        extent = space.held.get(digest) if space else None
        return ResidentObject(extent, extent.find(digest, depth)) if extent else None

    def walk(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Yields the slices that hold `digests[start:stop]`, up to the first that is not ready."""
        space = self.spaces.get(namespace)
        return space.walk(digests, start, stop) if space else iter(())

    def present(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Yields the slices that hold those of `digests[start:stop]` that are ready."""
        while start < stop:
            for part in self.walk(namespace, digests, start, stop):
                yield part
                start += part.size
            start += 1

    def absent(self, chain: Chain, start: int, stop: int) -> int:
        """Returns the largest end ≤ `stop` such that no object of chunks [start, end) is resident, and no name occurs twice.

        Resident: ready or being written.
        """
        digests, space = chain.digests, self.spaces.get(chain.namespace)
        held: Mapping[bytes, Extent] = space.held if space else {}
        if chain.linked and held.keys().isdisjoint(map(digests.__getitem__, range(start, stop))):
            return stop
        seen: set[bytes] = set()
        for i in range(start, stop):
            if digests[i] in held or digests[i] in seen:
                return i
            if not chain.linked:
                seen.add(digests[i])
        return stop

    def residents(self) -> Iterator[ResidentObject]:
        """Yields all resident objects, ready or being written."""
        for space in self.spaces.values():
            for digest, extent in space.held.items():
                yield ResidentObject(extent, extent.find(digest, 0))

    # ---------------------------------------------------------------- arriving

    def insert(self, chain: Chain, start: int, stop: int) -> list[ExtentPin]:
        """Assigns slots to chunks [start, stop), which are `absent`, or to as many of the first ones as slots can be freed for.

        Returns their pins, for `unpin`. The objects are in state WRITING.
        """
        if start >= stop:
            return []
        namespace, parent = chain.namespace, chain.parent(start) if self.chained else None
        above = self._ending_with(namespace, parent, start - 1) if parent is not None else None
        if above:
            above.refs += 1  # so that it is not evicted for its own child
        slots = self._take_slots(stop - start)
        pins: list[ExtentPin] = []
        if slots:
            space = self.spaces.get(namespace)
            if space is None:
                space = self.spaces[namespace] = NamespaceTable(namespace, chained=self.chained)
            self.changes += 1
            pins = self._extents(space, chain, start, slots)
            self._generation += len(slots)
            self.writing += len(slots)
            if above:
                above.children += 1
            elif parent is not None:
                space.orphans[parent] = space.orphans.get(parent, 0) + 1
        if above:
            above.refs -= 1
            self._requeue_or_free(above)
        return pins

    def publish(self, pins: Iterable[ExtentPin]) -> list[Extent]:
        """Makes those of the pinned objects ready that are still being written, parents first; returns their extents."""
        fresh: list[Extent] = []
        for extent in extents_of(pins):
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
                    self._notify(True, extent.space.namespace, extent.digests)
        return fresh

    # ---------------------------------------------------------------- being used

    def carve(self, parts: Iterable[ExtentSlice]) -> list[Extent]:
        """Returns one extent per slice, of exactly its objects; splits extents where necessary."""
        extents = []
        for _, extent, at, size in parts:
            assert at + size <= len(extent.digests), "the slice is stale: its extent was split or evicted"
            if at + size < len(extent.digests):
                self._split(extent, at + size)
            extents.append(self._split(extent, at) if at else extent)
        return extents

    def pin(self, extents: Sequence[Extent]) -> list[ExtentPin]:
        """Protects the extents from eviction and their slots from reuse; returns the pins, for `unpin`."""
        for extent in extents:
            extent.refs += 1
        return [(extent, len(extent.digests)) for extent in extents]

    def unpin(self, pins: Iterable[ExtentPin]) -> None:
        """Releases pins, also where the extents have been split since."""
        for extent in extents_of(pins):
            extent.refs -= 1
            if not extent.refs:
                extent.rest = None
                if not extent.stamp:
                    self._requeue_or_free(extent)

    def touch(self, extents: Sequence[Extent]) -> None:
        """Records a use of ready objects, parents first."""
        if extents:
            self.policy.touch(extents)

    # ---------------------------------------------------------------- leaving

    def drop(self, namespace: bytes, digest: bytes, depth: int, generation: int, reason: StopReason) -> None:
        """Removes an object, if this generation of it is resident. Its slot becomes free when it is no longer pinned.

        `reason` is remembered as the reason of later misses.
        """
        found = self.find(namespace, digest, depth)
        if found is not None and found.generation == generation:
            [extent] = self.carve([found.part])
            self._remove(extent)
            self.gone.put(digest, reason)

    def discard(self, pins: Iterable[ExtentPin]) -> None:
        """Removes pinned objects that are still being written, without a reason: they will never be."""
        for extent in reversed(list(extents_of(pins))):
            if extent.state == WRITING:
                self._remove(extent)

    def clear(self, namespace: bytes | None) -> int:
        """Removes everything (of one namespace), without a reason; returns the number of objects."""
        spaces = [space for space in self.spaces.values() if namespace in (None, space.namespace)]
        extents = [extent for space in spaces for extent in dict.fromkeys(space.held.values())]
        for extent in reversed(extents):
            self._remove(extent)
        return sum(len(extent.digests) for extent in extents)

    def reset(self) -> None:
        """Frees every slot. The caller has released all pins. Generations continue."""
        self.clear(None)
        assert not self.leaving, "a reset must be preceded by releasing all pins"

    @property
    def unused(self) -> int:
        """Number of free slots."""
        return len(self.free) + self.slots - self._first_unused

    def _remove(self, extent: Extent) -> None:
        space = extent.space
        self.changes += 1
        if extent.state == READY:
            if self.notice is not None:
                self._notify(False, space.namespace, extent.digests)
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
        self._unlink(extent)

    def _unlink(self, extent: Extent) -> None:
        """Updates the parent of an extent that was removed, and removes its namespace if that is empty."""
        space, parent = extent.space, extent.parent
        if parent is not None:
            above = space.held.get(parent)
            if above is not None:
                above.children -= 1
                self._requeue_or_free(above)
            elif space.orphans[parent] == 1:
                del space.orphans[parent]
            else:
                space.orphans[parent] -= 1
        if not space.held:
            del self.spaces[space.namespace]

    def _requeue_or_free(self, extent: Extent) -> None:
        """Once an extent has no pin and no child: returns it to the policy's queues, or frees its slots if it was removed.

        An extent that is still in a queue (stamp ≠ 0) stays there: `_evict` looks at pins and children when it pops one.
        """
        if extent.refs or extent.stamp or extent.children:
            return
        if extent.state == READY:
            self.policy.restore(extent)
        elif extent.state == EVICTING:
            self.leaving.discard(extent)
            self.free.extend(extent.slots)

    # ---------------------------------------------------------------- slots

    def _take_slots(self, count: int) -> array[int]:
        """Returns up to `count` slots: free ones, ones that were never used, then those of evicted objects."""
        slots = self.free[-count:]
        del self.free[-count:]
        fresh = min(count - len(slots), self.slots - self._first_unused)
        slots.extend(range(self._first_unused, self._first_unused + fresh))
        self._first_unused += fresh
        if len(slots) < count:
            self._evict(slots, count)
        return slots

    def _evict(self, slots: array[int], count: int) -> None:
        """Evicts the coldest unpinned objects until `slots` has `count` slots, if possible. The hot path of a full arena."""
        pop: Callable[[], Extent | None] = self.policy.pop  # type: ignore[assignment]  # the policy has extents only
        before = len(slots)
        while len(slots) < count and (extent := pop()) is not None:
            if extent.refs or extent.children:
                continue  # out of the queues (stamp 0) until `_requeue_or_free` restores it
            want = count - len(slots)
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
                self._notify(False, extent.space.namespace, last)
            self.changes += 1
            self.gone.put_all(last, StopReason.EVICTED)
            self.policy.evicted(extent, last)
            if extent.state == READY:
                self.policy.restore(extent)
            else:
                self._unlink(extent)
        self.evictions += len(slots) - before

    # ---------------------------------------------------------------- extents

    def _extents(self, space: NamespaceTable, chain: Chain, start: int, slots: array[int]) -> list[ExtentPin]:
        """Creates extents for as many objects from `start` on as there are slots; each ends where an object has children."""
        digests, held, orphans = chain.digests, space.held, space.orphans
        stop = start + len(slots)
        ends = [*range(start + LONGEST, stop, LONGEST), stop]
        if orphans:
            ends = sorted({*ends, *(i for i in range(start + 1, stop) if digests[i - 1] in orphans)})
        pins: list[ExtentPin] = []
        first, generation = start, self._generation + 1
        for end in ends:
            names, own_slots = list(digests[start:end]), slots[start - first : end - first]
            parent = chain.parent(start) if self.chained else None
            extent = Extent(
                space, names, own_slots, generation + start - first, parent, chain.depth(start), int(chain.linked)
            )
            for digest in names:
                held[digest] = extent
            extent.children = int(extent.tied and end < stop)
            if orphans:
                extent.children += orphans.pop(names[-1], 0)
            pins.append((extent, end - start))
            start = end
        return pins

    def _split(self, extent: Extent, at: int) -> Extent:
        rest = extent.split(at)
        if extent.stamp:
            self.policy.split(extent, rest)
        return rest

    def _ending_with(self, namespace: bytes, digest: bytes, depth: int) -> Extent | None:
        """Returns the extent whose last object this is, after a split if necessary, so that it can have child extents."""
        space = self.spaces.get(namespace)
        extent = space.held.get(digest) if space else None
        if extent is not None and extent.digests[-1] != digest:
            self._split(extent, extent.find(digest, depth) + 1)
        return extent

    def _notify(self, usable: bool, namespace: bytes, digests: Iterable[bytes]) -> None:
        assert self.notice is not None
        for digest in digests:
            self.notice(usable, namespace, digest)
