"""Eviction policies that were built to be compared with `adaptive`, and are not part of the product.

duel       LRU or S3-FIFO, whichever found more lately; a ghost cache of each follows all requests
sessions   evicts the object whose conversation is the longest overdue, by the think time of that conversation

Both are made for measurements: they are simple rather than fast.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from lmcache.control import Index
from lmcache.control.eviction import Lru, Policy, PolicyFactory, Recent, S3Fifo, Tracked
from lmcache.plan import Chain
from lmcache.simulate.replay import Replay
from lmcache.spec import ALL

HALF_LIFE = 32
"""A hit of a ghost cache counts half after so many times the capacity has been requested; as in `adaptive`."""
TURNS = 4
"""Return rates are measured for conversations of one, two, three, and more turns."""
PATIENCE = 2.0
"""A conversation is overdue after so many times its think time."""


class _Proxy(Tracked):
    """Stands for an item in the queues of one of the duel's two policies."""

    __slots__ = ("item",)

    def __init__(self, item: Tracked) -> None:
        super().__init__(item.digest)
        self.item = item

    @property
    def names(self) -> list[bytes]:
        return self.item.names

    @property
    def size(self) -> int:
        return self.item.size


class Duel(Policy):
    """LRU or S3-FIFO, whichever has more hits in a ghost cache. Each item is in the queues of both all the time, so a change of
    the leader moves nothing. The `place` of an item is its pair of proxies.
    """

    def __init__(self, capacity: int) -> None:
        self._lru, self._s3fifo = self._sides = Lru(capacity), S3Fifo(capacity)
        self._ghosts = [Replay(Index([("kv", ALL)], 1, [capacity], policy=name)) for name in ("lru", "s3fifo")]
        self._capacity = capacity
        self._hits = [0.0, 0.0]
        self._leader = 0

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        fade = 0.5 ** (len(chain) / (HALF_LIFE * self._capacity))
        for side, ghost in enumerate(self._ghosts):
            found = ghost.request(Chain(b"n" * 32, list(chain))).dram
            self._hits[side] = self._hits[side] * fade + found
        self._leader = int(self._hits[1] > self._hits[0])

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        return self._s3fifo.cuts(digests)

    def add(self, items: Sequence[Tracked]) -> None:
        for item in items:
            item.place = _Proxy(item), _Proxy(item)
            item.stamp = 1
        for side, policy in enumerate(self._sides):
            policy.add([item.place[side] for item in items])  # type: ignore[index]

    def touch(self, items: Sequence[Tracked]) -> None:
        for item in items:
            if not item.stamp:  # aside: in neither policy's queues
                self.restore(item)
        for side, policy in enumerate(self._sides):
            policy.touch([item.place[side] for item in items])  # type: ignore[index]

    def split(self, item: Tracked, rest: Tracked) -> None:
        rest.place, rest.stamp = (_Proxy(rest), _Proxy(rest)), 1
        for side, policy in enumerate(self._sides):
            rest.place[side].freq = item.place[side].freq  # type: ignore[index]
            policy.split(item.place[side], rest.place[side])  # type: ignore[index]

    def pop(self) -> Tracked | None:
        proxy = self._sides[self._leader].pop()
        if proxy is None:
            return None
        item: Tracked = proxy.item  # type: ignore[attr-defined]
        item.stamp = 0
        lru, s3fifo = item.place  # type: ignore[misc]
        if self._leader:
            self._lru.discard(lru)
        else:
            self._s3fifo._popped = s3fifo, s3fifo.stamp
            self._s3fifo.discard(s3fifo)
        return item

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        self._s3fifo.evicted(item.place[1], digests)  # type: ignore[index]

    def restore(self, item: Tracked) -> None:
        if item.place is None or item.place[0].item is not item:  # type: ignore[index]  # split off while aside
            item.place = _Proxy(item), _Proxy(item)
        item.stamp = 1
        for side, policy in enumerate(self._sides):
            policy.restore(item.place[side])  # type: ignore[index]

    def discard(self, item: Tracked) -> None:
        item.stamp = 0
        for side, policy in enumerate(self._sides):
            policy.discard(item.place[side])  # type: ignore[index]

    def members(self) -> Iterator[Tracked]:
        for proxy in self._lru.members():
            yield proxy.item  # type: ignore[attr-defined]


class Sessions(Policy):
    """Evicts the object with the earliest deadline. A request whose prompt extends that of an earlier request is the next turn of
    a conversation. The think time of a conversation is the mean gap between its turns, recent ones counting more, in chunks
    requested; of a new conversation, that of all. With each turn the deadline of the prompt's objects becomes now + `PATIENCE` ×
    think time × the measured share of conversations of that many turns that had another.
    """

    def __init__(self, capacity: int) -> None:
        self._open: Recent[tuple[float, int, float]] = Recent(
            64 * max(16, capacity)
        )  # last digest: time, turns, think time
        self._heap: list[tuple[float, int, Tracked]] = []
        self._started = [1.0] * TURNS
        self._returned = [0.5] * TURNS
        self._think = float(capacity)
        self._now = self._deadline = 0.0
        self._pushes = 0
        self._limit = 1024

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        if not chain:
            return
        self._now += len(chain)
        turn, think = 0, self._think
        for digest in reversed(chain):
            last = self._open.get(digest)
            if last is not None:
                time, turn, own = last
                gap = self._now - time
                self._returned[turn] += 1
                think = gap if turn == 0 else own + 0.5 * (gap - own)
                self._think += 0.01 * (gap - self._think)
                turn = min(turn + 1, TURNS - 1)
                break
        self._started[turn] += 1
        self._open.put_all(
            chain[-2:], (self._now, turn, think)
        )  # the last chunk may be a partial one, which is replaced
        self._deadline = self._now + PATIENCE * think * min(1.0, self._returned[turn] / self._started[turn])

    def add(self, items: Sequence[Tracked]) -> None:
        for item in reversed(items):
            self._push(item, self._deadline)

    def touch(self, items: Sequence[Tracked]) -> None:
        for item in reversed(items):
            self._push(item, max(self._deadline, item.place or 0.0))  # type: ignore[type-var]

    def split(self, item: Tracked, rest: Tracked) -> None:
        self._push(rest, item.place)  # type: ignore[arg-type]
        self._push(item, item.place)  # type: ignore[arg-type]

    def pop(self) -> Tracked | None:
        while self._heap:
            _, stamp, item = heapq.heappop(self._heap)
            if item.stamp == stamp:
                item.stamp = 0
                return item
        return None

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        pass

    def restore(self, item: Tracked) -> None:
        self._push(item, item.place or 0.0)  # type: ignore[arg-type]

    def discard(self, item: Tracked) -> None:
        item.stamp = 0

    def members(self) -> Iterator[Tracked]:
        return (item for _, stamp, item in self._heap if item.stamp == stamp)

    def _push(self, item: Tracked, deadline: float) -> None:
        self._pushes += 1
        item.stamp, item.place = self._pushes, deadline
        heapq.heappush(self._heap, (deadline, self._pushes, item))
        if len(self._heap) > self._limit:  # most entries are outdated
            self._heap = [entry for entry in self._heap if entry[2].stamp == entry[1]]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + 1024


RIVALS: Mapping[str, PolicyFactory] = MappingProxyType({"duel": Duel, "sessions": Sessions})
