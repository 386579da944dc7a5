"""Ghost caches: keys without data, to measure the hit rate that another admission rule would have had. Bounded, deterministic.

Two ghost caches of a tier receive the same requests. One admits everything (write-through); the other, once it is full, only
objects that became ready before. For large tiers, both follow a sample of the digests, with capacities scaled down in the same
proportion (Waldspurger et al., "SHARDS", FAST 2015).
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
    """Whether the digest is in the sample, which has `share` of 65536 digests."""
    return int.from_bytes(digest, "little") % _PRIME * _MIX & _WORD < share << 48


class BloomFilter:
    """The set of the most recently added digests: at least the last `size`, at most twice as many.

    A Bloom filter (Bloom 1970) in two generations: no false negatives, one false positive in 400. Takes 4 bytes per digest,
    allocated when the first one is added.
    """

    __slots__ = ("_bits", "_count", "_new", "_old", "_size")

    def __init__(self, size: int) -> None:
        self._size = max(64, size)
        self._bits = _BITS * self._size
        self._new = bytearray()
        self._old = bytearray()
        self._count = 0

    def add(self, digest: bytes, salt: int = 0) -> bool:
        """Adds a digest; returns whether it was in the set. The same digest with another `salt` is another element."""
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
    """An LRU cache of digests.

    Args:
        capacity: number of digests.
        memory: how many computed digests it remembers; when full, it admits only those of them; None: it admits all.
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
        """Returns how many leading `digests` are in the cache, and marks them as used."""
        names = self._names
        found = 0
        for digest in digests:
            if digest not in names:
                break
            names.move_to_end(digest)
            found += 1
        return found

    def ready(self, digest: bytes) -> None:
        """Offers a digest that was computed, for admission."""
        seen = self._seen is None or self._seen.add(digest)
        if digest in self._names or (not seen and len(self._names) >= self._capacity):
            return
        self._names[digest] = None
        self.written += 1
        if len(self._names) > self._capacity:
            self._names.popitem(last=False)


class Verdict:
    """Whether to be selective (`choosy`): while that has had at least as many hits as write-through.

    Hits are summed with exponential decay `FADE` per request. Being selective, which writes less, ends when it has had fewer
    hits by `MARGIN`, or when it recently lost significantly. For significance, requests are counted, not hits, since the hits
    of one request are not independent: each adds the square root of its difference, so that the variance grows by the
    difference (decay `RECENT`), and a loss beyond `ALARM` standard deviations is significant. Then the hits that being
    selective had gained before are discarded too.
    """

    FADE, RECENT, MARGIN, ALARM = 0.998, 0.95, 0.005, 2.0

    __slots__ = ("_all", "_recent", "_some", "_variance", "choosy")

    def __init__(self) -> None:
        self.choosy = False
        self._all = self._some = 0.0
        self._recent = self._variance = 0.0

    def see(self, everything: float, some: float) -> None:
        """Adds the hits of a request with write-through, and with the selective rule."""
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
