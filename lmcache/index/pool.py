"""One group's arena in DRAM: which object is in which slot, and which slot may be used anew.

    absent → WRITING → READY → EVICTING → absent

An object *leaves* (nobody finds it any more) at once; its slot follows when the last reference is gone. References are
leases and jobs; a job lets go only when every rank called it final. So a slot is never handed out under a reader or a
hung writer. In groups of rule `all` an object with a resident child stays: children leave before their parents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from lmcache.eviction import Policy, Recent, Tracked

WRITING, READY, EVICTING = 1, 2, 3
REMEMBERED = 16_384
"""How many vanished objects are remembered with the reason, at least."""


class Entry(Tracked):
    """One object that occupies a slot. `refs` = leases + jobs; `children` = resident objects whose parent this is."""

    __slots__ = ("children", "depth", "generation", "parent", "refs", "slot", "space", "state")

    def __init__(
        self, space: Space, digest: bytes, parent: bytes | None, depth: int, slot: int, generation: int
    ) -> None:
        self.digest = digest
        self.stamp = self.freq = 0
        self.space = space
        self.parent = parent
        self.depth = depth
        self.slot = slot
        self.generation = generation
        self.state = WRITING
        self.refs = 1  # whoever writes it
        self.children = 0

    @property
    def ready(self) -> bool:
        """Whether every rank has acknowledged it."""
        return self.state == READY


class Space:
    """The objects of one namespace. `orphans`: parent digest → resident children, for parents that are not resident."""

    __slots__ = ("namespace", "orphans", "ready", "writing")

    def __init__(self, namespace: bytes) -> None:
        self.namespace = namespace
        self.ready: dict[bytes, Entry] = {}
        self.writing: dict[bytes, Entry] = {}
        self.orphans: dict[bytes, int] = {}

    def get(self, digest: bytes) -> Entry | None:
        """The object, ready or being written."""
        return self.ready.get(digest) or self.writing.get(digest)


class Pool:
    """The arena of one group: `slots` equal slots, numbered alike on every rank."""

    def __init__(self, slots: int, policy: Policy, *, chained: bool) -> None:
        self.slots = slots
        self.chained = chained
        self.spaces: dict[bytes, Space] = {}
        self.gone = Recent(REMEMBERED)
        self.policy = policy
        self.evictions = 0
        self.leaving: set[Entry] = set()  # EVICTING, still referenced
        self.notice: Callable[[bool, Entry], None] | None = (
            None  # called with what becomes ready, and what was and leaves
        )
        self.free: list[int] = []
        self._fresh = 0  # slots from here on were never used
        self._generation = 0

    def find(self, namespace: bytes, digest: bytes) -> Entry | None:
        """The object, ready or being written."""
        space = self.spaces.get(namespace)
        return space.get(digest) if space else None

    def insert(self, namespace: bytes, digest: bytes, parent: bytes | None, depth: int) -> Entry | None:
        """Assign a slot to an object that is not resident (state WRITING, one reference), or None if no slot can be freed."""
        run = self.insert_run(namespace, (digest,), parent, depth)
        return run[0] if run else None

    def insert_run(
        self, namespace: bytes, digests: Sequence[bytes], parent: bytes | None, depth: int, *, linked: bool = True
    ) -> list[Entry]:
        """`insert` for a stretch of a chain of which nothing is resident: as much of its beginning as slots can be freed.

        `parent` and `depth` are those of the first; of all of them if they are not `linked`.
        """
        above = self.find(namespace, parent) if self.chained and parent is not None else None
        if above:
            above.refs += 1  # its slot must not be the one that is freed for its child
        slots = self._take_slots(len(digests))
        run: list[Entry] = []
        if slots:
            space = self.spaces.get(namespace)
            if space is None:
                space = self.spaces[namespace] = Space(namespace)
            generation = self._generation
            link = self.chained and linked
            before = parent if self.chained else None
            add = run.append
            for digest, slot in zip(digests, slots, strict=False):
                generation += 1
                add(Entry(space, digest, before, depth, slot, generation))
                if link:
                    before = digest
                depth += linked
            self._generation = generation
            space.writing.update(zip(digests, run, strict=False))
            if above:
                above.children += 1
            elif run[0].parent is not None:
                space.orphans[run[0].parent] = space.orphans.get(run[0].parent, 0) + 1
            if link:
                for entry in run[:-1]:
                    entry.children = 1
            if space.orphans:
                for entry in run:
                    entry.children += space.orphans.pop(entry.digest, 0)
        if above:
            self.unpin((above,))
        return run

    def publish(self, run: Iterable[Entry]) -> list[Entry]:
        """Make those objects ready that are still being written; returns them. Parents first."""
        fresh = [entry for entry in run if entry.state == WRITING]
        for entry in fresh:
            entry.state = READY
            space, digest = entry.space, entry.digest
            del space.writing[digest]
            space.ready[digest] = entry
        if fresh:
            self.policy.add(fresh)
        if self.notice is not None:
            for entry in fresh:
                self.notice(True, entry)
        return fresh

    def pin(self, run: Iterable[Entry]) -> None:
        """One more reference each."""
        for entry in run:
            entry.refs += 1

    def unpin(self, run: Iterable[Entry]) -> None:
        """One reference less each."""
        for entry in run:
            entry.refs -= 1
            if not entry.refs and not entry.stamp:
                self._settle(entry)

    def drop(self, entry: Entry, reason: str | None) -> None:
        """Nobody finds the object from now on; its slot is free once nothing refers to it. Idempotent.

        `reason` is remembered as to why a later lookup misses it.
        """
        if entry.state == EVICTING:
            return
        if self.notice is not None and entry.state == READY:
            self.notice(False, entry)
        space = entry.space
        del (space.ready if entry.state == READY else space.writing)[entry.digest]
        self.policy.discard(entry)
        entry.state = EVICTING
        if reason:
            self.gone.put(entry.digest, reason)
        if entry.children:
            space.orphans[entry.digest] = entry.children
            entry.children = 0
        if entry.parent is not None:
            self._abandon(space, entry.parent)
        if not space.ready and not space.writing:
            del self.spaces[space.namespace]
        if entry.refs:
            self.leaving.add(entry)
        else:
            self.free.append(entry.slot)

    def touch(self, run: list[Entry]) -> None:
        """Those objects were used. Parents first; objects still being written are passed over."""
        if run:
            self.policy.touch([entry for entry in run if entry.state == READY])

    def clear(self, namespace: bytes | None) -> int:
        """Drop everything (of one namespace) without a trace; returns how many objects left."""
        doomed = [entry for entry in self.residents() if namespace is None or entry.space.namespace == namespace]
        for entry in reversed(doomed):
            self.drop(entry, None)
        return len(doomed)

    def reset(self) -> None:
        """Every slot is free at once, whoever used it. Generations go on."""
        self.clear(None)
        assert not self.leaving, "a reset releases all references first"

    def residents(self) -> Iterator[Entry]:
        """All objects that can be found, ready or being written."""
        for space in self.spaces.values():
            yield from space.ready.values()
            yield from space.writing.values()

    @property
    def unused(self) -> int:
        """Slots that hold nothing."""
        return len(self.free) + self.slots - self._fresh

    def _take_slots(self, count: int) -> list[int]:
        """Up to `count` slots: free ones, ones that were never used, those of the coldest objects that may go."""
        free = self.free
        slots = [free.pop() for _ in range(min(count, len(free)))]
        fresh = min(count - len(slots), self.slots - self._fresh)
        slots.extend(range(self._fresh, self._fresh + fresh))
        self._fresh += fresh
        if len(slots) < count:
            slots.extend(self._evict(count - len(slots)))
        return slots

    def _evict(self, count: int) -> list[int]:
        """The slots of up to `count` of the coldest ready objects that nothing holds. This is what a full arena does all day:
        `drop`, for what the policy has given up already.
        """
        pop: Callable[[], Entry | None] = self.policy.pop  # type: ignore[assignment]  # it holds what it was given
        remember, notice = self.gone.put, self.notice
        slots: list[int] = []
        while len(slots) < count and (entry := pop()) is not None:
            if entry.refs or entry.children:
                continue  # it stays aside (stamp 0) until `_settle` finds that nothing holds it any more
            if notice is not None:
                notice(False, entry)
            slots.append(entry.slot)
            entry.state = EVICTING
            space, digest, parent = entry.space, entry.digest, entry.parent
            del space.ready[digest]
            remember(digest, "evicted")
            if parent is not None:
                above = space.ready.get(parent)
                if above is not None and above.stamp:  # in the policy's queues: nothing to settle
                    above.children -= 1
                else:
                    self._abandon(space, parent)
            if not space.ready and not space.writing:
                del self.spaces[space.namespace]
        self.evictions += len(slots)
        return slots

    def _settle(self, entry: Entry) -> None:
        """An object outside of the policy's queues lost a reference or a child: it may be evictable, or its slot free."""
        if entry.refs or entry.stamp or entry.children:
            return
        if entry.state == READY:
            self.policy.restore(entry)
        elif entry.state == EVICTING:
            self.leaving.discard(entry)
            self.free.append(entry.slot)

    def _abandon(self, space: Space, parent: bytes) -> None:
        above = space.get(parent)
        if above:
            above.children -= 1
            self._settle(above)
        elif space.orphans[parent] == 1:
            del space.orphans[parent]
        else:
            space.orphans[parent] -= 1
