"""What an arena and its policy know of each other.

A policy orders *items*: runs of objects of one chain that are used together. The arena hands it several at a time, parents
first; it must treat the last as the coldest, so that children leave before their parents. `pop` gives up the coldest item.
If the arena finds that it may not go now (it is being read, or a child of it is resident), the item stays aside until the
arena calls `restore`; if only some objects off its end have to go, the rest is given back in the same way. Every call
costs O(1) amortised per item, whatever is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Tracked:
    """What a policy may see and set of an item: the `digest` of its first object, and how many it has (`size`).

    `stamp` is 0 exactly while the item is in none of the policy's queues. `place` is for the policy alone, and `colder` and
    `hotter` are for the `Queue` it stands in.
    """

    __slots__ = ("colder", "digest", "freq", "hotter", "place", "stamp")

    colder: Tracked
    hotter: Tracked

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.stamp = 0
        self.freq = 0
        self.place: object = None

    @property
    def names(self) -> list[bytes]:
        """Digests of its objects, parents first."""
        return [self.digest]

    @property
    def size(self) -> int:
        """Objects."""
        return 1


class Policy(Protocol):
    """An order of eviction. The arena guarantees that an item is added once, and discarded or popped before it dies."""

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """A request came for all of `chain` (digests, parents first); its first `hits` objects are resident.

        Once per request, before the touch of what it hit and the adding of what it missed. A policy may ignore it, and
        must do without it.
        """

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Positions, rising, at which a run of newcomers should be cut, because what follows has other prospects."""
        return ()

    def add(self, items: Sequence[Tracked]) -> None:
        """Items that became resident, parents first."""

    def touch(self, items: Sequence[Tracked]) -> None:
        """Resident items that were used, parents first; some may be aside (popped, not restored)."""

    def split(self, item: Tracked, rest: Tracked) -> None:
        """`rest`, till now the end of `item`, is an item of its own. Both stay where they are; `rest` goes first."""

    def pop(self) -> Tracked | None:
        """Take the coldest item out of the queues (its stamp becomes 0), or None if they are empty."""

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        """These objects, off the end of the item that was popped last, have gone."""

    def restore(self, item: Tracked) -> None:
        """Put an item that `pop` gave up, or what is left of it, back as one of the coldest."""

    def discard(self, item: Tracked) -> None:
        """The item is no longer resident; its stamp becomes 0. Also fine for one that is aside."""

    def members(self) -> Iterator[Tracked]:
        """The items in the queues, in no particular order (for integrity checks)."""


class Queue:
    """Items in a row, each in one queue at most. Linked through the items themselves, so that leaving costs O(1)."""

    __slots__ = ("end",)

    def __init__(self) -> None:
        self.end = end = Tracked(b"")  # before the coldest and after the hottest
        end.colder = end.hotter = end

    def append(self, item: Tracked) -> None:
        """As the hottest."""
        insert(item, self.end)

    def prepend(self, item: Tracked) -> None:
        """As the coldest."""
        insert(item, self.end.hotter)

    def coldest(self) -> Tracked | None:
        """The first to go."""
        item = self.end.hotter
        return None if item is self.end else item

    def pop(self) -> Tracked | None:
        """Take out the first to go."""
        item = self.end.hotter
        if item is self.end:
            return None
        remove(item)
        return item

    def __iter__(self) -> Iterator[Tracked]:
        item = self.end.hotter
        while item is not self.end:
            yield item
            item = item.hotter


def insert(item: Tracked, hotter: Tracked) -> None:
    """Put an item that is in no queue into one, just before `hotter`."""
    colder = hotter.colder
    item.colder, item.hotter = colder, hotter
    colder.hotter = hotter.colder = item


def remove(item: Tracked) -> None:
    """Take an item out of its queue."""
    colder, hotter = item.colder, item.hotter
    colder.hotter, hotter.colder = hotter, colder
    del item.colder, item.hotter


class Recent(Generic[T]):
    """A bounded memory of short notes about digests: keeps at least the last `size` of them, at most twice as many. Far more is
    noted than asked for, so notes are sorted in only when somebody asks.
    """

    __slots__ = ("_new", "_old", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._new: _Notes[T] = _Notes()
        self._old: _Notes[T] = _Notes()

    def put(self, digest: bytes, note: T) -> None:
        """Remember `note`, replacing an older one."""
        self.put_all((digest,), note)

    def put_all(self, digests: Sequence[bytes], note: T) -> None:
        """Remember `note` for each of what is not changed any more."""
        while digests:
            new = self._new
            room = self._size - new.count
            part, digests = (digests, ()) if len(digests) < room else (digests[:room], digests[room:])
            new.count += len(part)
            new.unsorted.append((part, note))
            if new.count >= self._size:
                self._old, self._new = new, _Notes()

    def get(self, digest: bytes) -> T | None:
        """The latest note, or None."""
        note = self._new.get(digest)
        return self._old.get(digest) if note is None else note


class _Notes(Generic[T]):
    """One generation of a `Recent`. `count`: notes there are; until they are sorted in, those about the same count twice."""

    __slots__ = ("count", "known", "unsorted")

    def __init__(self) -> None:
        self.count = 0
        self.known: dict[bytes, T] = {}
        self.unsorted: list[tuple[Sequence[bytes], T]] = []

    def get(self, digest: bytes) -> T | None:
        known = self.known
        if self.unsorted:
            for digests, note in self.unsorted:
                for name in digests:
                    known[name] = note
            self.unsorted.clear()
            self.count = len(known)
        return known.get(digest)
