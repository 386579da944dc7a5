"""Extents: consecutive objects of one chain that are stored, used and evicted together.

An arena does its bookkeeping per extent, not per object, so the cost of a prompt is proportional to the number of its
extents. An extent is *split* where its parts are treated differently: a request uses only its beginning, another chain
branches off, or one of its objects fails. Extents are never joined. After a split, the first part is the same `Extent`, and
`rest` links to the other, so a pin of the extent still reaches all of its objects (see `ExtentPin`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from itertools import count, repeat
from typing import NamedTuple

from lmcache.control.eviction import Tracked

WRITING, READY, EVICTING = 1, 2, 3
LONGEST = 256
"""Most objects of an extent; bounds the cost of a split and of finding an object in its extent."""


class Extent(Tracked):
    """Objects in slots of an arena, parents first; object i has generation `generation + i`, depth `depth + step * i`.

    Attributes:
        parent: digest of the object that the first one needs. In a `tied` extent each other object needs the one before it.
        refs: number of pins; a pin covers the whole extent.
        children: number of extents whose parent is the *last* object of this one. Its other objects have no child extents.
        rest: the extent that was split off this one while it was pinned.
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
        self.refs = 1  # the job that writes it
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
        """Number of objects."""
        return len(self.digests)

    def find(self, digest: bytes, depth: int) -> int:
        """Returns the position of an object in this extent."""
        at = depth - self.depth
        if 0 <= at < len(self.digests) and self.digests[at] == digest:
            return at
        return self.digests.index(digest)

    def objects(self) -> Iterator[tuple[bytes, int, int, int]]:
        """Yields digest, slot, generation and depth of each object."""
        depths = range(self.depth, self.depth + len(self.digests)) if self.step else repeat(self.depth)
        return zip(self.digests, self.slots, count(self.generation), depths)

    def split(self, at: int) -> Extent:
        """Splits off the objects from `at` on; returns them as an extent with the same pins and the same eviction state."""
        parent = self.digests[at - 1] if self.tied else None
        generation, depth = self.generation + at, self.depth + self.step * at
        rest = Extent(self.space, self.digests[at:], self.slots[at:], generation, parent, depth, self.step)
        del self.digests[at:], self.slots[at:]
        rest.state, rest.refs = self.state, self.refs
        rest.freq, rest.place = self.freq, self.place  # the policy's own state
        rest.children, self.children = self.children, 1 if parent is not None else 0
        if self.refs:
            rest.rest, self.rest = self.rest, rest
        self.space.held.update(dict.fromkeys(rest.digests, rest))
        return rest


class NamespaceTable:
    """The resident objects of one namespace.

    Attributes:
        chained: whether objects need their parents.
        held: digest → extent, of objects that are ready or being written.
        orphans: digest of a parent that is not resident → number of its child extents that are.
    """

    __slots__ = ("chained", "held", "namespace", "orphans")

    def __init__(self, namespace: bytes, *, chained: bool) -> None:
        self.namespace = namespace
        self.chained = chained
        self.held: dict[bytes, Extent] = {}
        self.orphans: dict[bytes, int] = {}

    def walk(self, digests: list[bytes], start: int, stop: int) -> Iterator[ExtentSlice]:
        """Yields the slices that hold `digests[start:stop]`, up to the first that is not ready. One dict lookup per extent.

        The caller may split a yielded extent before it continues the iteration.
        """
        get = self.held.get
        while start < stop:
            extent = get(digests[start])
            if extent is None or extent.state != READY:
                return
            own = extent.digests
            at = 0 if own[0] == digests[start] else own.index(digests[start])
            length = min(len(own) - at, stop - start)
            if own[at : at + length] != digests[start : start + length]:
                length = next(i for i in range(1, length) if own[at + i] != digests[start + i])
            yield ExtentSlice(start, extent, at, length)
            start += length


class ExtentSlice(NamedTuple):
    """Objects [at, at + size) of an extent, at position `start` of a chain. Valid until the extent is split."""

    start: int
    extent: Extent
    at: int
    size: int


class ResidentObject(NamedTuple):
    """The object at position `at` of its extent. Valid until the extent is split."""

    extent: Extent
    at: int

    @property
    def digest(self) -> bytes:
        """Its digest."""
        return self.extent.digests[self.at]

    @property
    def part(self) -> ExtentSlice:
        """The slice of this object alone."""
        return ExtentSlice(0, self.extent, self.at, 1)

    @property
    def namespace(self) -> bytes:
        """The namespace of its name."""
        return self.extent.space.namespace

    @property
    def depth(self) -> int:
        """The depth in its name."""
        return self.extent.depth + self.extent.step * self.at

    @property
    def slot(self) -> int:
        """Its arena slot."""
        return self.extent.slots[self.at]

    @property
    def generation(self) -> int:
        """Generation of its slot assignment (grows with each assignment of any slot)."""
        return self.extent.generation + self.at

    @property
    def ready(self) -> bool:
        """Whether every rank has acknowledged it."""
        return self.extent.state == READY


ExtentPin = tuple[Extent, int]
"""A reference of a lease or a job: (extent, number of its objects when it was pinned). Covers what was split off it since."""


def extents_of(pins: Iterable[ExtentPin]) -> Iterator[Extent]:
    """Yields the extents that the pinned objects are in now. The caller may split or unpin each before it goes on."""
    for first, left in pins:
        extent: Extent | None = first
        while extent is not None and left > 0:
            left -= len(extent.digests)
            rest = extent.rest
            yield extent
            extent = rest
