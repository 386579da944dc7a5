"""What was asked for lately, and how much of it LRU would hold.

Names are kept in *stretches*, one for what a request used again and one for what it brought. As digests commit to what is
before them, what a later request uses of a stretch is its beginning, and moves on; so nearly all is done by stretch, with slices
and bulk operations, and a few steps per request. Names that come in any other order cost more, and nothing else.

LRU holds the youngest stretches, and of the oldest of these the beginning: the end of a prompt goes first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

_TIME = attrgetter("time")
_OFTEN = 4
_ONCE_MORE = bytes(min(uses + 1, _OFTEN) for uses in range(256))


class Stretch:
    """Names that nobody asked for after one request did, parents first.

    Attributes:
        time: of that request.
        kind: their class.
        turn: of the conversation.
        end: names of that request.
        uses: a byte for each name, how often it was used again; no more than 4 are counted.
        held: how many of them, the first, LRU holds.
    """

    __slots__ = ("end", "held", "kind", "names", "time", "turn", "uses")

    def __init__(self, time: float, kind: int, turn: int, end: int, names: list[bytes], uses: bytes) -> None:
        self.time = time
        self.kind = kind
        self.turn = turn
        self.end = end
        self.names = names
        self.uses = uses
        self.held = len(names)


class Part(NamedTuple):
    """Names that were taken out of a stretch; LRU held the first `held`."""

    stretch: Stretch
    names: list[bytes]
    uses: bytes
    held: int


class History:
    """Stretches by time. They are remembered until `horizon` after their time, and as long as LRU holds some of them."""

    __slots__ = ("_by_name", "_edge", "_first", "_horizon", "_limit", "_stretches", "held", "since")

    def __init__(self, horizon: float) -> None:
        self.held = 0
        """Names that LRU holds."""
        self.since = 0.0
        """LRU holds nothing that was last used before this time."""
        self._horizon = horizon
        self._by_name: dict[bytes, Stretch] = {}
        self._stretches: list[Stretch] = []  # oldest first; some were used up
        self._first = 0  # those before are forgotten
        self._edge = 0  # of those before LRU holds nothing
        self._limit = 1024

    def find(self, name: bytes) -> Stretch | None:
        """Where a name is, if it is known."""
        return self._by_name.get(name)

    def holds(self, name: bytes) -> bool:
        """Whether LRU would hold it."""
        stretch = self._by_name.get(name)
        return stretch is not None and name in stretch.names[: stretch.held]

    def held_of(self, names: list[bytes]) -> list[bytes]:
        """Those of `names` that LRU would hold."""
        found: list[bytes] = []
        for stretch, at, start, size in self._places(names):
            if stretch.held > at:
                found += names[start : start + min(size, stretch.held - at)]
        return found

    def between(self, after: float, until: float) -> list[Stretch]:
        """Those with a time of more than `after`, and no more than `until`."""
        first = bisect_right(self._stretches, after, self._first, key=_TIME)
        return self._stretches[first : bisect_right(self._stretches, until, first, key=_TIME)]

    def take(self, names: list[bytes]) -> list[Part]:
        """Take out the first of `names`, up to one that is not known. All are to be `put` back."""
        parts = []
        start = 0
        while start < len(names) and (stretch := self._by_name.get(names[start])) is not None:
            parts.append(self._cut(stretch, *_match(stretch.names, names, start)))
            start += len(parts[-1].names)
        return parts

    def put(self, stretch: Stretch) -> None:
        """What was asked for just now. Of one request the end goes first."""
        if not stretch.names:
            return
        self._by_name.update(dict.fromkeys(stretch.names, stretch))
        self._stretches.append(stretch)
        self.held += len(stretch.names)

    def drop(self, names: list[bytes]) -> None:
        """Forget those of them that are known."""
        if self._by_name.keys().isdisjoint(names):
            return
        for stretch, at, _, size in self._places(names):
            for name in self._cut(stretch, at, size).names:
                del self._by_name[name]

    def forget(self, now: float) -> Iterator[Stretch]:
        """Drop what is too old; yields each stretch while it is still whole."""
        last = now - self._horizon
        while self._first < self._edge and (stretch := self._stretches[self._first]).time < last:
            yield stretch
            self._first += 1
            for name in stretch.names:
                del self._by_name[name]
            stretch.names, stretch.uses = [], b""
        if len(self._stretches) > self._limit:
            self._stretches = [stretch for stretch in self._stretches if stretch.names]
            self._limit = 2 * len(self._stretches) + 1024
            self._first = self._edge = 0
            self._find_edge()

    def shrink(self, capacity: float) -> list[bytes]:
        """Let LRU evict until it holds no more than `capacity`; returns what went."""
        gone: list[bytes] = []
        while self.held > capacity:
            stretch = self._stretches[self._edge]
            count = min(stretch.held, math.ceil(self.held - capacity))
            stretch.held -= count
            self.held -= count
            gone += stretch.names[stretch.held : stretch.held + count]
            self._find_edge()
        self._find_edge()
        return gone

    def _find_edge(self) -> None:
        """Pass what LRU holds nothing of."""
        stretches = self._stretches
        while self._edge < len(stretches):
            if stretches[self._edge].held:
                self.since = stretches[self._edge].time
                return
            self._edge += 1

    def _places(self, names: list[bytes]) -> Iterator[tuple[Stretch, int, int, int]]:
        """(stretch, position in it, position in `names`, how many) of those that are known."""
        start = 0
        while start < len(names):
            stretch = self._by_name.get(names[start])
            if stretch is None:
                start += 1
                continue
            at, size = _match(stretch.names, names, start)
            yield stretch, at, start, size
            start += size

    def _cut(self, stretch: Stretch, at: int, size: int) -> Part:
        """Take `size` names from `at` on out of a stretch."""
        end = at + size
        held = min(size, max(0, stretch.held - at))
        part = Part(stretch, stretch.names[at:end], stretch.uses[at:end], held)
        del stretch.names[at:end]
        stretch.uses = stretch.uses[:at] + stretch.uses[end:]
        stretch.held -= held
        self.held -= held
        return part


def used_again(parts: Sequence[Part]) -> bytes:
    """How often each name of them was used again, this time included."""
    return b"".join([part.uses for part in parts]).translate(_ONCE_MORE)


def _match(known: list[bytes], names: list[bytes], start: int) -> tuple[int, int]:
    """Where `names[start]` is in `known`, and how many names on from there are the same."""
    at = known.index(names[start])
    low, high = 1, min(len(known) - at, len(names) - start)
    if known[at : at + high] == names[start : start + high]:
        return at, high
    while high - low > 1:  # the first `low` are the same, the first `high` are not
        middle = (low + high) // 2
        if known[at + low : at + middle] == names[start + low : start + middle]:
            low = middle
        else:
            high = middle
    return at, low
