"""Runs: stretches of consecutive objects of one chain that arrived together, are used together and leave together.

An arena keeps its books by run, not by object, so that what it does for a prompt costs as much as the prompt has runs. A
run is *split* where a part of it goes its own way: a request uses only its beginning, another chain branches off, one of
its objects fails. Runs are never joined, and the first part stays the old object, so whoever holds a run finds all that
came of it by following `rest` (see `Span`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import count, repeat
from typing import NamedTuple

from lmcache.control.eviction import Tracked

WRITING, READY, EVICTING = 1, 2, 3
LONGEST = 256
"""Objects of a run, at most: what a split, or the search for one object in its run, may cost."""


class Run(Tracked):
    """Objects in slots of an arena, parents first; object i has generation `generation + i`, depth `depth + step * i`.

    Attributes:
        parent: digest without which the first one is of no use. In a `tied` run each of the others has the one before.
        refs: leases and jobs that hold the run, always all of it.
        children: runs whose parent is the *last* object of this one. Nothing hangs off the others.
        rest: what was split off this run while somebody held it.
    """

    __slots__ = (
        "children",
        "depth",
        "digests",
        "generation",
        "parent",
        "refs",
        "rest",
        "slots",
        "space",
        "state",
        "step",
    )

    def __init__(
        self,
        space: Space,
        digests: list[bytes],
        slots: array[int],
        generation: int,
        parent: bytes | None,
        depth: int,
        step: int,
    ) -> None:
        super().__init__(digests[0])
        self.space = space
        self.digests = digests
        self.slots = slots
        self.generation = generation
        self.parent = parent
        self.depth = depth
        self.step = step
        self.state = WRITING
        self.refs = 1  # whoever writes it
        self.children = 0
        self.rest: Run | None = None

    @property
    def tied(self) -> bool:
        """Whether each object needs the one before it."""
        return self.space.chained and self.step == 1

    @property
    def names(self) -> list[bytes]:
        """See `Tracked`."""
        return self.digests

    @property
    def size(self) -> int:
        """Objects."""
        return len(self.digests)

    def find(self, digest: bytes, depth: int) -> int:
        """Where an object of this run is in it."""
        at = depth - self.depth
        if 0 <= at < len(self.digests) and self.digests[at] == digest:
            return at
        return self.digests.index(digest)

    def objects(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Digest, slot, generation and depth of each."""
        depths = range(self.depth, self.depth + len(self.digests)) if self.step else repeat(self.depth)
        return zip(self.digests, self.slots, count(self.generation), depths)

    def split(self, at: int) -> Run:
        """Cut off the objects from `at` on; returns them as a run that is held by the same and may go no sooner."""
        parent = self.digests[at - 1] if self.tied else None
        generation, depth = self.generation + at, self.depth + self.step * at
        rest = Run(self.space, self.digests[at:], self.slots[at:], generation, parent, depth, self.step)
        del self.digests[at:], self.slots[at:]
        rest.state, rest.refs = self.state, self.refs
        rest.freq, rest.place = self.freq, self.place  # what the policy knows of it
        rest.children, self.children = self.children, 1 if parent is not None else 0
        if self.refs:
            rest.rest, self.rest = self.rest, rest
        self.space.held.update(dict.fromkeys(rest.digests, rest))
        return rest


class Space:
    """The objects of one namespace: `held`, ready or being written. `chained`: objects need their parents.

    `orphans`: parent digest → runs that are resident, for parents that are not.
    """

    __slots__ = ("chained", "held", "namespace", "orphans")

    def __init__(self, namespace: bytes, *, chained: bool) -> None:
        self.namespace = namespace
        self.chained = chained
        self.held: dict[bytes, Run] = {}
        self.orphans: dict[bytes, int] = {}

    def walk(self, digests: list[bytes], start: int, stop: int) -> Iterator[Part]:
        """Where `digests[start:stop]` lie, up to the first that is not ready. One dict lookup per run.

        What the walk has yielded may be split before it goes on.
        """
        get = self.held.get
        while start < stop:
            run = get(digests[start])
            if run is None or run.state != READY:
                return
            mine = run.digests
            at = 0 if mine[0] == digests[start] else mine.index(digests[start])
            length = min(len(mine) - at, stop - start)
            if mine[at : at + length] != digests[start : start + length]:
                length = next(i for i in range(1, length) if mine[at + i] != digests[start + i])
            yield Part(start, run, at, length)
            start += length


class Part(NamedTuple):
    """Objects [at, at + size) of a run, found at `start` in a chain. Good until the run is split."""

    start: int
    run: Run
    at: int
    size: int


class Object(NamedTuple):
    """One object: number `at` of its run. Good until the run is split."""

    run: Run
    at: int

    @property
    def digest(self) -> bytes:
        """Its name."""
        return self.run.digests[self.at]

    @property
    def part(self) -> Part:
        """Just this one."""
        return Part(0, self.run, self.at, 1)

    @property
    def namespace(self) -> bytes:
        """Whose name it is."""
        return self.run.space.namespace

    @property
    def depth(self) -> int:
        """The depth in its name."""
        return self.run.depth + self.run.step * self.at

    @property
    def slot(self) -> int:
        """Where it lies."""
        return self.run.slots[self.at]

    @property
    def generation(self) -> int:
        """The how-manieth assignment of a slot this one is."""
        return self.run.generation + self.at

    @property
    def ready(self) -> bool:
        """Whether every rank has acknowledged it."""
        return self.run.state == READY


Span = tuple[Run, int]
"""What a lease or a job holds: so many objects, those of the run as it was and of what was split off it since."""


def pieces(spans: Iterable[Span]) -> Iterator[Run]:
    """The runs that the objects of spans are in now. A run may be split or let go of before the next is asked for."""
    for first, left in spans:
        run: Run | None = first
        while run is not None and left > 0:
            left -= len(run.digests)
            rest = run.rest
            yield run
            run = rest
