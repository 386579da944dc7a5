"""One group's arena in DRAM: which object is in which slot, and which slot may be used anew.

    absent → WRITING → READY → EVICTING → absent

Objects come, are used and go in runs (`lmcache.index.runs`). One that *leaves* is found by nobody any more, at once; its slot
follows when the last reference is gone. References are leases and jobs; a job lets go only when every rank called it
final. So a slot is never handed out under a reader or a hung writer. In groups of rule `all` an object with a resident
child stays: runs lose their objects from the end, and children leave before their parents.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from lmcache.eviction import Policy, Recent
from lmcache.index.runs import EVICTING, LONGEST, READY, WRITING, Object, Part, Run, Space, Span, pieces
from lmcache.plan import Chain

REMEMBERED = 16_384
"""How many vanished objects are remembered with the reason, at least."""


class Pool:
    """The arena of one group: `slots` equal slots, numbered alike on every rank."""

    def __init__(self, slots: int, policy: Policy, *, chained: bool) -> None:
        self.slots = slots
        self.chained = chained
        self.spaces: dict[bytes, Space] = {}
        self.gone: Recent[str] = Recent(REMEMBERED)
        self.policy = policy
        self.evictions = 0
        self.writing = 0  # objects in state WRITING
        self.leaving: set[Run] = set()  # EVICTING, still referenced
        # Called with (there, namespace, digest) for what becomes ready, and for what was and leaves.
        self.notice: Callable[[bool, bytes, bytes], None] | None = None
        self.free: array[int] = array("I")
        self._fresh = 0  # slots from here on were never used
        self._generation = 0

    # ---------------------------------------------------------------- finding

    def find(self, namespace: bytes, digest: bytes, depth: int = 0) -> Object | None:
        """The object, ready or being written. `depth` only makes it faster."""
        space = self.spaces.get(namespace)
        run = space.held.get(digest) if space else None
        return Object(run, run.find(digest, depth)) if run else None

    def walk(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[Part]:
        """Where `digests[start:stop]` lie, up to the first that is not ready."""
        space = self.spaces.get(namespace)
        return space.walk(digests, start, stop) if space else iter(())

    def present(self, namespace: bytes, digests: list[bytes], start: int, stop: int) -> Iterator[Part]:
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
        held: Mapping[bytes, Run] = space.held if space else {}
        if chain.linked and held.keys().isdisjoint(map(digests.__getitem__, range(start, stop))):
            return stop
        met: set[bytes] = set()
        for i in range(start, stop):
            if digests[i] in held or digests[i] in met:
                return i
            if not chain.linked:
                met.add(digests[i])
        return stop

    def residents(self) -> Iterator[Object]:
        """All objects that can be found, ready or being written."""
        for space in self.spaces.values():
            for digest, run in space.held.items():
                yield Object(run, run.find(digest, 0))

    # ---------------------------------------------------------------- arriving

    def insert(self, chain: Chain, start: int, stop: int) -> list[Span]:
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
        spans: list[Span] = []
        if slots:
            space = self.spaces.get(namespace)
            if space is None:
                space = self.spaces[namespace] = Space(namespace, chained=self.chained)
            spans = self._runs(space, chain, start, slots)
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

    def publish(self, spans: Iterable[Span]) -> list[Run]:
        """Make ready what of it is still being written, parents first; returns that."""
        fresh: list[Run] = []
        for run in pieces(spans):
            if run.state == WRITING:
                run.state = READY
                self.writing -= len(run.digests)
                fresh.append(run)
                cuts = self.policy.cuts(run.digests)
                if cuts:
                    fresh += reversed([run.split(at) for at in reversed(cuts)])
        if fresh:
            self.policy.add(fresh)
            if self.notice is not None:
                for run in fresh:
                    self._tell(True, run.space.namespace, run.digests)
        return fresh

    # ---------------------------------------------------------------- being used

    def carve(self, parts: Iterable[Part]) -> list[Run]:
        """Runs of exactly these objects, each part one; splits where it has to."""
        runs = []
        for _, run, at, size in parts:
            assert at + size <= len(run.digests), "a part that is no longer good"
            if at + size < len(run.digests):
                self._split(run, at + size)
            runs.append(self._split(run, at) if at else run)
        return runs

    def pin(self, runs: Sequence[Run]) -> list[Span]:
        """One more reference each; to be given to `unpin`."""
        for run in runs:
            run.refs += 1
        return [(run, len(run.digests)) for run in runs]

    def unpin(self, spans: Iterable[Span]) -> None:
        """One reference less each, to whatever parts they are in by now."""
        for run in pieces(spans):
            run.refs -= 1
            if not run.refs:
                run.rest = None
                if not run.stamp:
                    self._settle(run)

    def touch(self, runs: Sequence[Run]) -> None:
        """Those ready objects were used. Parents first."""
        if runs:
            self.policy.touch(runs)

    # ---------------------------------------------------------------- leaving

    def drop(self, namespace: bytes, digest: bytes, depth: int, generation: int, reason: str) -> None:
        """Nobody finds this object from now on; its slot is free once nothing refers to it.

        Nothing happens if that generation of it is not there (any more). `reason` is remembered as to why a later lookup
        misses it.
        """
        found = self.find(namespace, digest, depth)
        if found is not None and found.generation == generation:
            [run] = self.carve([found.part])
            self._leave(run)
            self.gone.put(digest, reason)

    def clear(self, namespace: bytes | None) -> int:
        """Drop everything (of one namespace) without a trace; returns how many objects left."""
        spaces = [space for space in self.spaces.values() if namespace in (None, space.namespace)]
        doomed = [run for space in spaces for run in dict.fromkeys(space.held.values())]
        for run in reversed(doomed):
            self._leave(run)
        return sum(len(run.digests) for run in doomed)

    def reset(self) -> None:
        """Every slot is free at once, whoever used it. Generations go on."""
        self.clear(None)
        assert not self.leaving, "a reset releases all references first"

    @property
    def unused(self) -> int:
        """Slots that hold nothing."""
        return len(self.free) + self.slots - self._fresh

    def _leave(self, run: Run) -> None:
        space = run.space
        if run.state == READY:
            if self.notice is not None:
                self._tell(False, space.namespace, run.digests)
            self.policy.discard(run)
        else:
            self.writing -= len(run.digests)
        run.state = EVICTING
        for digest in run.digests:
            del space.held[digest]
        if run.children:
            space.orphans[run.digests[-1]] = run.children
            run.children = 0
        if run.refs:
            self.leaving.add(run)
        else:
            self.free.extend(run.slots)
        self._left(run)

    def _left(self, run: Run) -> None:
        """It is found no more: so much for its parent, and for a space that was all its own."""
        space, parent = run.space, run.parent
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

    def _settle(self, run: Run) -> None:
        """It lost a reference or a child: if it is in none of the policy's queues, it may be evictable, or its slots free."""
        if run.refs or run.stamp or run.children:
            return
        if run.state == READY:
            self.policy.restore(run)
        elif run.state == EVICTING:
            self.leaving.discard(run)
            self.free.extend(run.slots)

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
        pop: Callable[[], Run | None] = self.policy.pop  # type: ignore[assignment]  # it holds what it was given
        before = len(slots)
        while len(slots) < count and (run := pop()) is not None:
            if run.refs or run.children:
                continue  # it stays aside (stamp 0) until `_settle` finds that nothing holds it any more
            want = count - len(slots)
            digests = run.digests
            if want < len(digests):
                last = digests[-want:]
                slots.extend(run.slots[-want:])
                del digests[-want:], run.slots[-want:]
            else:
                last = digests
                slots.extend(run.slots)
                run.state = EVICTING
            held = run.space.held
            for digest in last:
                del held[digest]
            if self.notice is not None:
                self._tell(False, run.space.namespace, last)
            self.gone.put_all(last, "evicted")
            self.policy.evicted(run, last)
            if run.state == READY:
                self.policy.restore(run)
            else:
                self._left(run)
        self.evictions += len(slots) - before

    # ---------------------------------------------------------------- runs

    def _runs(self, space: Space, chain: Chain, start: int, slots: array[int]) -> list[Span]:
        """New runs for as many objects from `start` on as there are slots, cut where one has children already."""
        digests, held, orphans = chain.digests, space.held, space.orphans
        stop = start + len(slots)
        ends = [*range(start + LONGEST, stop, LONGEST), stop]
        if orphans:
            ends = sorted({*ends, *(i for i in range(start + 1, stop) if digests[i - 1] in orphans)})
        spans: list[Span] = []
        first, generation = start, self._generation + 1
        for end in ends:
            names, mine = list(digests[start:end]), slots[start - first : end - first]
            parent = chain.parent(start) if self.chained else None
            run = Run(space, names, mine, generation + start - first, parent, chain.depth(start), int(chain.linked))
            for digest in names:
                held[digest] = run
            run.children = int(run.tied and end < stop)
            if orphans:
                run.children += orphans.pop(names[-1], 0)
            spans.append((run, end - start))
            start = end
        return spans

    def _split(self, run: Run, at: int) -> Run:
        rest = run.split(at)
        if run.stamp:
            self.policy.split(run, rest)
        return rest

    def _ending_with(self, namespace: bytes, digest: bytes, depth: int) -> Run | None:
        """The run whose last object this is, split if need be, so that something can hang off it."""
        space = self.spaces.get(namespace)
        run = space.held.get(digest) if space else None
        if run is not None and run.digests[-1] != digest:
            self._split(run, run.find(digest, depth) + 1)
        return run

    def _tell(self, there: bool, namespace: bytes, digests: Iterable[bytes]) -> None:
        assert self.notice is not None
        for digest in digests:
            self.notice(there, namespace, digest)
