"""Policies from the literature.

lru     exact least-recently-used order, kept as a log of touches (one record per run, not per object)
lfu     least frequently used with dynamic aging (Arlitt et al. 1999, "LFUDA"), ties by age
s3fifo  small, main and ghost queue (Yang et al., SOSP 2023)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence

from lmcache.eviction.base import Policy, Recent, Tracked


class Lru(Policy):
    """Least recently used. A touch appends *one* record for a whole run and stamps its objects with the record's number;
    an object belongs to the record whose number it bears, older records of it are stale and skipped.
    """

    def __init__(self, capacity: int) -> None:
        self._log: deque[tuple[int, list[Tracked]]] = deque()
        self._clock = 0
        self._entries = 0
        self._limit = 2 * capacity + 1024

    def add(self, run: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(run)

    def touch(self, run: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        self._clock = stamp = self._clock + 1
        for item in run:
            item.stamp = stamp
        self._log.append((stamp, list(run)))
        self._entries += len(run)
        if self._entries > self._limit:
            self._compact()

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        log = self._log
        while log:
            stamp, run = log[0]
            while run:
                item = run.pop()
                self._entries -= 1
                if item.stamp == stamp:
                    item.stamp = 0
                    return item
            log.popleft()
        return None

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        self._clock = item.stamp = self._clock + 1
        self._log.appendleft((self._clock, [item]))
        self._entries += 1
        if self._entries > self._limit:
            self._compact()

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        item.stamp = 0

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for stamp, run in self._log:
            for item in run:
                if item.stamp == stamp:
                    yield item

    def _compact(self) -> None:
        # At most `capacity` objects are live, so this frees at least half of the log: O(1) amortised.
        live = ((stamp, [item for item in run if item.stamp == stamp]) for stamp, run in self._log)
        self._log = deque((stamp, run) for stamp, run in live if run)
        self._entries = sum(len(run) for _, run in self._log)


class Lfu(Policy):
    """Least frequently used with dynamic aging: an object's priority is its use count plus the priority of the last
    object evicted when it was used, so that what was popular long ago does not stay for ever. Ties: oldest first.
    """

    def __init__(self, capacity: int) -> None:
        self._buckets: dict[int, deque[Tracked]] = {}
        self._keys: list[int] = []  # heap of the bucket keys
        self._age = 0
        self._entries = 0
        self._limit = 2 * capacity + 1024

    def add(self, run: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(run)

    def touch(self, run: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        # Each use gives a strictly higher key, so an object stands at most once in a bucket, and is live in the one
        # whose key is its stamp.
        age = self._age
        for item in reversed(run):
            item.freq = freq = item.freq + 1
            item.stamp = key = age + freq
            self._bucket(key).append(item)
        self._entries += len(run)
        if self._entries > self._limit:
            self._compact()

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        while self._keys:
            key = self._keys[0]
            bucket = self._buckets[key]
            while bucket:
                item = bucket.popleft()
                self._entries -= 1
                if item.stamp == key:
                    item.stamp = 0
                    self._age = key
                    return item
            heapq.heappop(self._keys)
            del self._buckets[key]
        return None

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        key = max(self._age, 1)
        item.stamp = key
        self._bucket(key).appendleft(item)
        self._entries += 1
        if self._entries > self._limit:
            self._compact()

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        item.stamp = 0

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for key, bucket in self._buckets.items():
            for item in bucket:
                if item.stamp == key:
                    yield item

    def _bucket(self, key: int) -> deque[Tracked]:
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = deque()
            heapq.heappush(self._keys, key)
        return bucket

    def _compact(self) -> None:
        live = {key: deque(i for i in bucket if i.stamp == key) for key, bucket in self._buckets.items()}
        self._buckets = {key: bucket for key, bucket in live.items() if bucket}
        self._keys = sorted(self._buckets)
        self._entries = sum(map(len, self._buckets.values()))


class S3Fifo(Policy):
    """Newcomers wait in a small queue and reach the main one only if they are used again, or if they had been evicted
    not long ago; the main queue gives each use (up to three) another round.
    """

    _SMALL, _MAIN = 1, 2
    _MAX_FREQ = 3

    def __init__(self, capacity: int) -> None:
        self._queues: dict[int, deque[Tracked]] = {self._SMALL: deque(), self._MAIN: deque()}
        self._small_target = max(1, capacity // 10)
        self._ghosts = Recent(max(16, capacity))
        self._dead = 0
        self._limit = capacity + 1024

    def add(self, run: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        for item in reversed(run):
            self._push(item, self._SMALL if self._ghosts.get(item.digest) is None else self._MAIN)

    def touch(self, run: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        for item in run:
            if item.freq < self._MAX_FREQ:
                item.freq += 1

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        small, main = self._queues[self._SMALL], self._queues[self._MAIN]
        while small or main:
            from_small = len(small) > self._small_target or not main
            item = (small if from_small else main).popleft()
            if item.stamp == 0:
                self._dead -= 1
            elif from_small and item.freq > 1:
                item.freq = 0
                self._push(item, self._MAIN)
            elif not from_small and item.freq > 0:
                item.freq -= 1
                self._push(item, self._MAIN)
            else:
                if from_small:
                    self._ghosts.put(item.digest, "")
                item.stamp = 0
                return item
        return None

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        item.stamp = self._SMALL
        self._queues[self._SMALL].appendleft(item)

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        if item.stamp:
            item.stamp = 0
            self._dead += 1
            if self._dead > self._limit:
                for key, queue in self._queues.items():
                    self._queues[key] = deque(i for i in queue if i.stamp)
                self._dead = 0

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for queue in self._queues.values():
            yield from (item for item in queue if item.stamp)

    def _push(self, item: Tracked, queue: int) -> None:
        item.stamp = queue
        self._queues[queue].append(item)
