"""Policies from the literature.

lru     least recently used
lfu     least frequently used with dynamic aging (Arlitt et al. 1999, "LFUDA"), ties by age
s3fifo  small, main and ghost queue (Yang et al., SOSP 2023)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from lmcache.control.eviction.base import Policy, Queue, Recent, Tracked, insert, remove


class Lru(Policy):
    """Least recently used. Stamps are 1 in the queue."""

    def __init__(self, capacity: int) -> None:
        self._queue = Queue()

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(items)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        append = self._queue.append
        for item in reversed(items):
            if item.stamp:
                remove(item)
            item.stamp = 1
            append(item)

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        rest.stamp = 1
        insert(rest, item)

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        item = self._queue.pop()
        if item is not None:
            item.stamp = 0
        return item

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        item.stamp = 1
        self._queue.prepend(item)

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        if item.stamp:
            item.stamp = 0
            remove(item)

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        return iter(self._queue)


class Lfu(Policy):
    """Least frequently used with dynamic aging: an item's priority is its use count plus the priority of the last item
    evicted when it was used, so that what was popular long ago does not stay for ever. Ties: oldest first. Stamps are
    priorities.
    """

    def __init__(self, capacity: int) -> None:
        self._buckets: dict[int, Queue] = {}
        self._keys: list[int] = []  # heap of the bucket keys
        self._age = 0

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(items)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        for item in reversed(items):
            if item.stamp:
                remove(item)
            item.freq += 1
            item.stamp = key = self._age + item.freq
            self._bucket(key).append(item)

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        rest.stamp = item.stamp
        insert(rest, item)

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        while self._keys:
            key = self._keys[0]
            item = self._buckets[key].pop()
            if item is not None:
                item.stamp = 0
                self._age = key
                return item
            heapq.heappop(self._keys)
            del self._buckets[key]
        return None

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        item.stamp = key = max(self._age, 1)
        self._bucket(key).prepend(item)

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        if item.stamp:
            item.stamp = 0
            remove(item)

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for bucket in self._buckets.values():
            yield from bucket

    def _bucket(self, key: int) -> Queue:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = Queue()
            heapq.heappush(self._keys, key)
        return bucket


class S3Fifo(Policy):
    """Newcomers wait in a small queue and reach the main one only if they are used again, or if they had been evicted
    not long ago; the main queue gives each use (up to three) another round. Stamps name the queue.
    """

    _SMALL, _MAIN = 1, 2
    _MAX_FREQ = 3

    def __init__(self, capacity: int) -> None:
        self._queues = {self._SMALL: Queue(), self._MAIN: Queue()}
        self._small = 0  # objects in the small queue
        self._small_target = max(1, capacity // 10)
        self._ghosts: Recent[str] = Recent(max(16, capacity))
        self._popped: tuple[Tracked | None, int] = None, 0  # the last one, and from which queue

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Policy.cuts`."""
        ghosts = [self._ghosts.get(digest) is not None for digest in digests]
        return [i for i in range(1, len(ghosts)) if ghosts[i] != ghosts[i - 1]]

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        for item in reversed(items):
            self._push(item, self._SMALL if self._ghosts.get(item.digest) is None else self._MAIN)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        for item in items:
            if item.freq < self._MAX_FREQ:
                item.freq += 1

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        rest.stamp = item.stamp
        insert(rest, item)

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        while True:
            small, main = (self._queues[queue].coldest() for queue in (self._SMALL, self._MAIN))
            from_small = small is not None and (self._small > self._small_target or main is None)
            item = small if from_small else main
            if item is None:
                return None
            queue = item.stamp
            self.discard(item)
            if from_small and item.freq > 1:
                item.freq = 0
                self._push(item, self._MAIN)
            elif not from_small and item.freq > 0:
                item.freq -= 1
                self._push(item, self._MAIN)
            else:
                self._popped = item, queue
                return item

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        """See `Policy.evicted`."""
        if self._popped == (item, self._SMALL):
            self._ghosts.put_all(digests, "")

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        last, queue = self._popped
        self._push(item, queue if item is last else self._SMALL, coldest=True)

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        if item.stamp:
            if item.stamp == self._SMALL:
                self._small -= item.size
            item.stamp = 0
            remove(item)

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for queue in self._queues.values():
            yield from queue

    def _push(self, item: Tracked, queue: int, *, coldest: bool = False) -> None:
        item.stamp = queue
        if queue == self._SMALL:
            self._small += item.size
        (self._queues[queue].prepend if coldest else self._queues[queue].append)(item)
