"""What an arena and its policy know of each other.

An arena hands a policy *runs*: objects of one chain, parents first. A policy must treat the last of a run as its coldest,
so that children leave before their parents. `pop` gives up the coldest object; if the arena finds that it may not go now
(it is being read, or a child of it is resident) it keeps it aside and calls `restore` as soon as it may. Every call costs
O(1) amortised per object, whatever is pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Tracked:
    """What a policy may see and set of an object. `stamp` is 0 exactly while the object is in none of its queues."""

    __slots__ = ("digest", "freq", "stamp")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.stamp = 0
        self.freq = 0


class Policy(Protocol):
    """An order of eviction. The arena guarantees that an object is added once, and discarded or popped before it dies."""

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """A request came for all of `chain` (digests, parents first); its first `hits` objects are resident.

        Once per request, before the touch of what it hit and the adding of what it missed. A policy may ignore it, and
        must do without it.
        """

    def add(self, run: Sequence[Tracked]) -> None:
        """Objects that became resident, parents first."""

    def touch(self, run: Sequence[Tracked]) -> None:
        """Resident objects that were used, parents first; some may be aside (popped, not restored)."""

    def pop(self) -> Tracked | None:
        """Take the coldest object out of the queues (its stamp becomes 0), or None if they are empty."""

    def restore(self, item: Tracked) -> None:
        """Put an object that `pop` gave up back as one of the coldest."""

    def discard(self, item: Tracked) -> None:
        """The object is no longer resident; its stamp becomes 0. Also fine for one that is aside."""

    def members(self) -> Iterator[Tracked]:
        """The objects in the queues, in no particular order (for integrity checks)."""


class Recent:
    """A bounded memory of short notes about digests: keeps at least the last `size` of them, at most twice as many."""

    __slots__ = ("_new", "_old", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._new: dict[bytes, str] = {}
        self._old: dict[bytes, str] = {}

    def put(self, digest: bytes, note: str) -> None:
        """Remember `note`, replacing an older one."""
        self._new[digest] = note
        if len(self._new) >= self._size:
            self._old, self._new = self._new, {}

    def get(self, digest: bytes) -> str | None:
        """The latest note, or None."""
        note = self._new.get(digest)
        return self._old.get(digest) if note is None else note
