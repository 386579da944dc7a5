"""A tier in the mind: names only, to find out what another rule of admission would have brought. Bounded and deterministic.

Two shadows of one tier see the same requests. One takes everything in, as write-through does; the other, once it is full, only
what became ready before. Large tiers are judged by a sample of their names, with shadows smaller in the same proportion
(Waldspurger et al., "SHARDS", FAST 2015).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

_BITS = 16
_PROBES = 4
_PRIME = (1 << 61) - 1
_MIX = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd (Knuth's multiplicative hashing)
_WORD = (1 << 64) - 1


def sampled(digest: bytes, share: int) -> bool:
    """Whether it is part of the sample; `share` of 65536 are."""
    return int.from_bytes(digest, "little") % _PRIME * _MIX & _WORD < share << 48


class BloomFilter:
    """Which digests were marked lately: at least the last `size`, at most twice as many. 4 bytes each, once there is one.

    A Bloom filter (Bloom 1970) in two generations. It never forgets one of them, and takes one stranger in 400 for one.
    """

    __slots__ = ("_bits", "_count", "_new", "_old", "_size")

    def __init__(self, size: int) -> None:
        self._size = max(64, size)
        self._bits = _BITS * self._size
        self._new = bytearray()
        self._old = bytearray()
        self._count = 0

    def add(self, digest: bytes, salt: int = 0) -> bool:
        """Mark it; returns whether it was marked. Other `salt`, other thing."""
        word = (int.from_bytes(digest, "little") % _PRIME + salt) * _MIX & _WORD
        at, step = word >> 32, word & 0xFFFF_FFFF | 1
        if not self._new:
            self._new, self._old = bytearray(-(-self._bits // 8)), bytearray(-(-self._bits // 8))
        new, old = self._new, self._old
        fresh, in_old = False, True
        for _ in range(_PROBES):
            at = (at + step) % self._bits
            byte, bit = at >> 3, 1 << (at & 7)
            in_old = in_old and old[byte] & bit != 0
            if not new[byte] & bit:
                fresh = True
                new[byte] |= bit
        if fresh:
            self._count += 1
            if self._count >= self._size:
                self._old, self._new = new, bytearray(len(new))
                self._count = 0
        return in_old or not fresh


class GhostCache:
    """A tier of `capacity` names, the least recently used out first. `memory`: names it remembers to have seen; None: it takes
    everything in.
    """

    __slots__ = ("_capacity", "_names", "_seen", "written")

    def __init__(self, capacity: int, memory: int | None = None) -> None:
        self._capacity = capacity
        self._names: OrderedDict[bytes, None] = OrderedDict()
        self._seen = None if memory is None else BloomFilter(memory)
        self.written = 0

    def __len__(self) -> int:
        return len(self._names)

    def request(self, digests: Sequence[bytes]) -> int:
        """A request for `digests`: how many leading ones are found. A use."""
        names = self._names
        found = 0
        for digest in digests:
            if digest not in names:
                break
            names.move_to_end(digest)
            found += 1
        return found

    def ready(self, digest: bytes) -> None:
        """It was computed, and may be taken in."""
        seen = self._seen is None or self._seen.add(digest)
        if digest in self._names or (not seen and len(self._names) >= self._capacity):
            return
        self._names[digest] = None
        self.written += 1
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)


class Verdict:
    """Whether to be choosy: while that finds at least as much as write-through, as far as is remembered.

    Hits are summed up with a slowly fading past. Being choosy, which costs the device less, is given up when it has found
    less by `MARGIN`, or when it lost beyond chance just now (hits of one request come together, so it is requests that are
    counted, each with its difference as the variance); then what it had gained is forgotten too.
    """

    FADE, RECENT, MARGIN, ALARM = 0.998, 0.95, 0.005, 2.0

    __slots__ = ("_all", "_recent", "_some", "_variance", "choosy")

    def __init__(self) -> None:
        self.choosy = False
        self._all = self._some = 0.0
        self._recent = self._variance = 0.0

    def see(self, everything: float, some: float) -> None:
        """The hits of one request in either shadow."""
        self._all = self._all * self.FADE + everything
        self._some = self._some * self.FADE + some
        difference = some - everything
        if difference:
            self._recent = self._recent * self.RECENT + math.copysign(math.sqrt(abs(difference)), difference)
            self._variance = self._variance * self.RECENT**2 + abs(difference)
        alarm = self._recent < -self.ALARM * math.sqrt(self._variance)
        if alarm:
            self._some = min(self._some, self._all)
        wanted = self._all * (1 - self.MARGIN) if self.choosy else self._all
        self.choosy = self._some >= wanted and not alarm
