"""Runs of objects sorted by class and age, and found by a changing order of both.

A *run* is what one request used or brought: its objects share their last use, and so their fate. Its age falls into a
bucket; the buckets of `Ages` grow geometrically, so a run changes shelf a few dozen times in its life, whatever its length.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import or_
from typing import Generic, TypeVar

T = TypeVar("T")

BUCKETS = 26
PER_OCTAVE = 2
"""Buckets of age: two per doubling, which is finer than what is known of reuse."""


class Ages:
    """Bucket b holds the ages from unit × (2^(b/2) − 1) on."""

    __slots__ = ("edges", "unit")

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.edges = [unit * (2 ** (b / PER_OCTAVE) - 1) for b in range(BUCKETS + 1)]

    def bucket(self, age: float) -> int:
        """The bucket of an age; everything old is in the last."""
        return min(BUCKETS - 1, int(PER_OCTAVE * math.log2(age / self.unit + 1)))


class Run(Generic[T]):
    """Objects, parents first, last used at `time`. `size`: how many of them were not used since, where that is counted;
    `turn`: of the conversation (or the number of the run), `end`: length of the request; `gone`: how many are no longer in it."""

    __slots__ = ("bucket", "end", "gone", "kind", "members", "size", "time", "turn")

    def __init__(self, time: float, kind: int, members: list[T], turn: int = 0, end: int = 0) -> None:
        self.time = time
        self.kind = kind
        self.bucket = 0
        self.members = members
        self.size = len(members)
        self.turn = turn
        self.end = end
        self.gone = 0


class Shelves(Generic[T]):
    """One queue of runs per (class, bucket of age), oldest first. Times may not go back."""

    def __init__(self, kinds: int, ages: Ages) -> None:
        self.ages = ages
        self.queues: list[deque[Run[T]]] = [deque() for _ in range(kinds * BUCKETS)]
        self._due: list[tuple[float, int]] = []  # heap: when the first run of a queue becomes too old for it
        self._rank = list(range(kinds * BUCKETS))
        self._at = list(range(kinds * BUCKETS))  # rank → queue
        self._youngest = [False] * (kinds * BUCKETS)
        self._now = 0.0
        self._aged = [-1] * BUCKETS  # bucket → ranks of the queues that are as old or older
        self._filled = 0  # bit r is set if the queue of rank r may hold something

    def put(self, run: Run[T]) -> None:
        """A run that was used just now."""
        self._append(run, run.kind * BUCKETS)

    def advance(self, now: float) -> Iterator[Run[T]]:
        """Move what has grown older; yields each run that enters the next bucket."""
        self._now = now
        due, edges = self._due, self.ages.edges
        while due and due[0][0] <= now:
            number = heapq.heappop(due)[1]
            queue = self.queues[number]
            bucket = number % BUCKETS
            limit = now - edges[bucket + 1]
            while queue and queue[0].time <= limit:
                run = queue.popleft()
                if run.members:
                    run.bucket = bucket + 1
                    self._append(run, number + 1)
                    yield run
            if queue:
                heapq.heappush(due, (queue[0].time + edges[bucket + 1], number))
            else:
                self._filled &= ~(1 << self._rank[number])

    def coldest(self, before: float = math.inf) -> Run[T] | None:
        """A run of the first queue, in the present order, that has members and was used before `before`."""
        edge = self.ages.bucket(max(0.0, self._now - before))
        mask = self._filled & self._aged[edge] if edge else self._filled
        while mask:
            bit = mask & -mask
            mask ^= bit
            number = self._at[bit.bit_length() - 1]
            queue = self.queues[number]
            # In the bucket at the edge only the end that is older is sure to be old enough.
            youngest = self._youngest[number] and (number % BUCKETS > edge or before == math.inf)
            while queue:
                run = queue[-1 if youngest else 0]
                if run.time >= before:
                    break
                if run.members:
                    return run
                if youngest:
                    queue.pop()
                else:
                    queue.popleft()
            if not queue:
                self._filled &= ~bit
        return None

    def drop(self, run: Run[T]) -> None:
        """Take out what `coldest` found, without moving it any further."""
        queue = self.queues[run.kind * BUCKETS + run.bucket]
        if queue[0] is run:
            queue.popleft()
        else:
            queue.pop()

    def arrange(self, worth: Sequence[float]) -> None:
        """Order the queues by the worth of what they hold, least first; `worth` is indexed by class × BUCKETS + bucket.

        Within a queue the end goes first that is nearer to the worse neighbour. Equal worth: the older first.
        """
        self._at = sorted(range(len(worth)), key=lambda n: (worth[n], -(n % BUCKETS), n))
        self._filled = 0
        aged = [0] * BUCKETS
        for rank, number in enumerate(self._at):
            aged[number % BUCKETS] |= 1 << rank
            self._rank[number] = rank
            if self.queues[number]:
                self._filled |= 1 << rank
            last = number % BUCKETS == BUCKETS - 1
            self._youngest[number] = not last and worth[number + 1] > worth[number]

        self._aged = list(accumulate(reversed(aged), or_))[::-1]

    def compact(self, live: Callable[[Run[T], T], bool]) -> None:
        """Drop members of which `live(run, member)` is false, and runs that have none left."""
        self._due = []
        for number, queue in enumerate(self.queues):
            if not queue:
                continue
            for run in queue:
                run.members[:] = [member for member in run.members if live(run, member)]
            kept = self.queues[number] = deque(run for run in queue if run.members)
            bucket = number % BUCKETS
            if kept and bucket < BUCKETS - 1:
                self._due.append((kept[0].time + self.ages.edges[bucket + 1], number))
        heapq.heapify(self._due)

    def __iter__(self) -> Iterator[Run[T]]:
        for queue in self.queues:
            yield from queue

    def _append(self, run: Run[T], number: int) -> None:
        queue = self.queues[number]
        if not queue:
            self._filled |= 1 << self._rank[number]
            bucket = number % BUCKETS
            if bucket < BUCKETS - 1:
                heapq.heappush(self._due, (run.time + self.ages.edges[bucket + 1], number))
        queue.append(run)
