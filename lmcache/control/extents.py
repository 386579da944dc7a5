"""Extents: stretches of consecutive objects of one chain that arrived together, are used together and leave together.

An arena keeps its books by extent, not by object, so that what it does for a prompt costs as much as the prompt has extents. A
extent is *split* where a part of it goes its own way: a request uses only its beginning, another chain branches off, one of
its objects fails. Extents are never joined, and the first part stays the old object, so whoever holds an extent finds all that
came of it by following `rest` (see `ExtentPin`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import count, repeat
from typing import NamedTuple

from lmcache.control.eviction import Tracked

WRITING, READY, EVICTING = 1, 2, 3
LONGEST = 256
"""Objects of an extent, at most: what a split, or the search for one object in its extent, may cost."""


class Extent(Tracked):
    """Objects in slots of an arena, parents first; object i has generation `generation + i`, depth `depth + step * i`.

    Attributes:
        parent: digest without which the first one is of no use. In a `tied` extent each of the others has the one before.
        refs: leases and jobs that hold the extent, always all of it.
        children: extents whose parent is the *last* object of this one. Nothing hangs off the others.
        rest: what was split off this extent while somebody held it.
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
        space: NamespaceTable,
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
        self.rest: Extent | None = None

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
        """Where an object of this extent is in it."""
        at = depth - self.depth
        if 0 <= at < len(self.digests) and self.digests[at] == digest:
            return at
        return self.digests.index(digest)

    def objects(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Digest, slot, generation and depth of each."""
        depths = range(self.depth, self.depth + len(self.digests)) if self.step else repeat(self.depth)
        return zip(self.digests, self.slots, count(self.generation), depths)

    def split(self, at: int) -> Extent:
        """Cut off the objects from `at` on; returns them as an extent that is held by the same and may go no sooner."""
        parent = self.digests[at - 1] if self.tied else None
        generation, depth = self.generation + at, self.depth + self.step * at
        rest = Extent(self.space, self.digests[at:], self.slots[at:], generation, parent, depth, self.step)
        del self.digests[at:], self.slots[at:]
        rest.state, rest.refs = self.state, self.refs
        rest.freq, rest.place = self.freq, self.place  # what the policy knows of it
        rest.children, self.children = self.children, 1 if parent is not None else 0
        if self.refs:
            rest.rest, self.rest = self.rest, rest
        self.space.held.update(dict.fromkeys(rest.digests, rest))
        return rest


class NamespaceTable:
    """The objects of one namespace: `held`, ready or being written. `chained`: objects need their parents.

    `orphans`: parent digest → extents that are resident, for parents that are not.
    """

    __slots__ = ("chained", "held", "namespace", "orphans")

    def __init__(self, namespace: bytes, *, chained: bool) -> None:
        self.namespace = namespace
        self.chained = chained
        self.held: dict[bytes, Extent] = {}
        self.orphans: dict[bytes, int] = {}

    def walk(self, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Where `digests[start:stop]` lie, up to the first that is not ready. One dict lookup per extent.

        What the walk has yielded may be split before it goes on.
        """
        get = self.held.get
        while start < stop:
            extent = get(digests[start])
            if extent is None or extent.state != READY:
                return
            mine = extent.digests
            at = 0 if mine[0] == digests[start] else mine.index(digests[start])
            length = min(len(mine) - at, stop - start)
            if mine[at : at + length] != digests[start : start + length]:
                length = next(i for i in range(1, length) if mine[at + i] != digests[start + i])
            yield ExtentSlice(start, extent, at, length)
            start += length


class ExtentSlice(NamedTuple):
    """Objects [at, at + size) of an extent, found at `start` in a chain. Good until the extent is split."""

    start: int
    extent: Extent
    at: int
    size: int


class ResidentObject(NamedTuple):
    """One object: number `at` of its extent. Good until the extent is split."""

    extent: Extent
    at: int

    @property
    def digest(self) -> bytes:
        """Its name."""
        return self.extent.digests[self.at]

    @property
    def part(self) -> ExtentSlice:
        """Just this one."""
        return ExtentSlice(0, self.extent, self.at, 1)

    @property
    def namespace(self) -> bytes:
        """Whose name it is."""
        return self.extent.space.namespace

    @property
    def depth(self) -> int:
        """The depth in its name."""
        return self.extent.depth + self.extent.step * self.at

    @property
    def slot(self) -> int:
        """Where it lies."""
        return self.extent.slots[self.at]

    @property
    def generation(self) -> int:
        """The how-manieth assignment of a slot this one is."""
        return self.extent.generation + self.at

    @property
    def ready(self) -> bool:
        """Whether every rank has acknowledged it."""
        return self.extent.state == READY


ExtentPin = tuple[Extent, int]
"""What a lease or a job holds: so many objects, those of the extent as it was and of what was split off it since."""


def pieces(spans: Iterable[ExtentPin]) -> Iterator[Extent]:
    """The extents that the objects of spans are in now. An extent may be split or let go of before the next is asked for."""
    for first, left in spans:
        extent: Extent | None = first
        while extent is not None and left > 0:
            left -= len(extent.digests)
            rest = extent.rest
            yield extent
            extent = rest
