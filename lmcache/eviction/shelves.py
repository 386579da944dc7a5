"""Runs of objects sorted by class and age, and found by a changing order of both.

A *run* is what one request used or brought: its objects share their last use, and so their fate. Its age falls into a
bucket; the buckets of `Ages` grow geometrically, so a run changes shelf a few dozen times in its life, whatever its length.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    `turn`: of the conversation (or the number of the run), `end`: length of the request."""

    __slots__ = ("bucket", "end", "kind", "members", "size", "time", "turn")

    def __init__(self, time: float, kind: int, members: list[T], turn: int = 0, end: int = 0) -> None:
        self.time = time
        self.kind = kind
        self.bucket = 0
        self.members = members
        self.size = len(members)
        self.turn = turn
        self.end = end


class Shelves(Generic[T]):
    """One queue of runs per (class, bucket of age), oldest first. Times may not go back."""

    def __init__(self, kinds: int, ages: Ages) -> None:
        self.ages = ages
        self.queues: list[deque[Run[T]]] = [deque() for _ in range(kinds * BUCKETS)]
        self._due: list[tuple[float, int]] = []  # heap: when the first run of a queue becomes too old for it
        self._rank = list(range(kinds * BUCKETS))
        self._at = list(range(kinds * BUCKETS))  # rank → queue
        self._youngest = [False] * (kinds * BUCKETS)
        self._filled = 0  # bit r is set if the queue of rank r may hold something

    def put(self, run: Run[T]) -> None:
        """A run that was used just now."""
        self._append(run, run.kind * BUCKETS)

    def advance(self, now: float) -> Iterator[Run[T]]:
        """Move what has grown older; yields each run that enters the next bucket."""
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

    def coldest(self) -> Run[T] | None:
        """A run of the first queue, in the present order, that has members."""
        while self._filled:
            rank = (self._filled & -self._filled).bit_length() - 1
            number = self._at[rank]
            queue = self.queues[number]
            youngest = self._youngest[number]
            while queue:
                run = queue[-1 if youngest else 0]
                if run.members:
                    return run
                if youngest:
                    queue.pop()
                else:
                    queue.popleft()
            self._filled &= ~(1 << rank)
        return None

    def drop_coldest(self) -> None:
        rank = (self._filled & -self._filled).bit_length() - 1
        number = self._at[rank]
        queue = self.queues[number]
        if self._youngest[number]:
            queue.pop()
        else:
            queue.popleft()

    def coldest_before(self, time: float, now: float) -> Run[T] | None:
        """As `coldest`, among the runs used before `time`."""
        edge = self.ages.bucket(max(0.0, now - time))
        mask = self._filled & self._older[edge]
        while mask:
            bit = mask & -mask
            mask ^= bit
            rank = bit.bit_length() - 1
            number = self._at[rank]
            queue = self.queues[number]
            youngest = self._youngest[number] and number % BUCKETS > edge
            while queue:
                run = queue[-1 if youngest else 0]
                if run.time >= time:
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

    def arrange(self, worth: Sequence[float]) -> None:
        """Order the queues by the worth of what they hold, least first; `worth` is indexed by class × BUCKETS + bucket.

        Within a queue the end goes first that is nearer to the worse neighbour. Equal worth: the older first.
        """
        self._at = sorted(range(len(worth)), key=lambda n: (worth[n], -(n % BUCKETS), n))
        self._filled = 0
        self._older = [0] * BUCKETS
        for rank, number in enumerate(self._at):
            for b in range(number % BUCKETS + 1):
                self._older[b] |= 1 << rank
            self._rank[number] = rank
            if self.queues[number]:
                self._filled |= 1 << rank
            last = number % BUCKETS == BUCKETS - 1
            self._youngest[number] = not last and worth[number + 1] > worth[number]

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
