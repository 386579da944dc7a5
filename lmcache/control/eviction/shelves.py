"""Runs of objects sorted by class and age, and found by a changing order of both.

A *run* is what one request used or brought: its objects share their last use, and so their fate. Its age falls into a
bucket; the buckets of `Ages` grow geometrically. The runs of a class stand in a row by age, and a *shelf* is a stretch of it: the
runs of one bucket. Where it begins is found out only when somebody looks, from where it began the last time; so a run
costs a few steps in its life, whatever its length.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from operator import lt, or_
from typing import Generic, TypeVar

T = TypeVar("T")

BUCKETS = 26
PER_OCTAVE = 2
"""Buckets of age: two per doubling, which is finer than what is known of reuse."""


class Ages:
    """Bucket b holds the ages from unit × (2^(b/2) − 1) on."""

    __slots__ = ("edges",)

    def __init__(self, unit: float) -> None:
        self.edges = [unit * (2 ** (b / PER_OCTAVE) - 1) for b in range(BUCKETS + 1)]

    def bucket(self, age: float) -> int:
        """The bucket of an age; everything old is in the last."""
        return bisect_right(self.edges, age, 1, BUCKETS) - 1


class Run(Generic[T]):
    """Objects, parents first, last used at `time`; `number` tells runs apart, `gone` counts the objects that are no longer in
    it. `colder` and `hotter` are its neighbours in the row; of one that is in none, `hotter` is None.
    """

    __slots__ = ("colder", "gone", "hotter", "kind", "members", "number", "time")

    colder: Run[T]

    def __init__(self, time: float, kind: int, members: list[T], number: int = 0) -> None:
        self.time = time
        self.kind = kind
        self.members = members
        self.number = number
        self.gone = 0
        self.hotter: Run[T] | None = None


class Shelves(Generic[T]):
    """A row of runs for each class, divided by bucket of age. Times may not go back."""

    def __init__(self, kinds: int, ages: Ages) -> None:
        self.now = 0.0
        shelves = kinds * BUCKETS
        self._ages = ages
        self._begins = [*ages.edges[:BUCKETS], math.inf]
        # Of each row: before the coldest, after the hottest.
        self._ends: list[Run[T]] = [Run(math.inf, kind, []) for kind in range(kinds)]
        for end in self._ends:
            end.colder = end.hotter = end
        # By class and bucket the youngest run that is as old as the bucket, or was when somebody looked.
        # Beyond the last bucket there is none, and the end of the row stands for that.
        self._marks = [[end] * (BUCKETS + 1) for end in self._ends]
        self._filled = [True] * shelves  # whether there may be something
        self._due: list[tuple[float, int]] = []  # heap: when there may be something again on a shelf that is empty
        self._oldest_first = [n for b in reversed(range(BUCKETS)) for n in range(b, shelves, BUCKETS)]
        self._rank = list(range(shelves))
        self._at = list(range(shelves))  # rank → shelf
        self._ranks = (1 << shelves) - 1  # bit r is set if there may be something on the shelf of rank r
        self._youngest = [False] * shelves
        self._aged = [-1] * BUCKETS  # bucket → ranks of the shelves that are as old or older

    def put(self, run: Run[T]) -> None:
        """A run that was used just now."""
        end = self._ends[run.kind]
        run.colder, run.hotter = end.colder, end
        end.colder.hotter = end.colder = run
        self._fill(run.kind * BUCKETS)

    def coldest(self, before: float = math.inf) -> Run[T] | None:
        """A run of the first shelf, in the present order, that has members and was used before `before`."""
        while self._due and self._due[0][0] <= self.now:
            self._fill(heapq.heappop(self._due)[1])
        edge = self._ages.bucket(max(0.0, self.now - before))
        ranks = self._ranks & self._aged[edge] if edge else self._ranks
        while ranks:
            bit = ranks & -ranks
            ranks ^= bit
            number = self._at[bit.bit_length() - 1]
            kind, bucket = divmod(number, BUCKETS)
            last = self._mark(kind, bucket)
            older = self._mark(kind, bucket + 1)
            # In the bucket at the edge only the end that is older is sure to be old enough.
            youngest = self._youngest[number] and (bucket > edge or before == math.inf)
            while last is not older:
                run = last if youngest else older.hotter
                assert run is not None
                if run.time >= before:
                    break
                if run.members:
                    return run
                if run is last:
                    last = run.colder
                self.drop(run)
            else:
                self._filled[number] = False
                self._ranks ^= bit
                if bucket:
                    self._expect(last, number)
        return None

    def drop(self, run: Run[T]) -> None:
        """Take it out."""
        colder, hotter = run.colder, run.hotter
        assert hotter is not None
        colder.hotter, hotter.colder = hotter, colder
        run.hotter = None  # whoever has it for a mark finds what is colder

    def arrange(self, worth: Sequence[float]) -> None:
        """Order the shelves by the worth of what they hold, least first; `worth` is indexed by class × BUCKETS + bucket.

        Within a shelf the end goes first that is nearer to the worse neighbour. Equal worth: the older first.
        """
        self._at = sorted(self._oldest_first, key=worth.__getitem__)
        ranks, aged = 0, [0] * BUCKETS
        for rank, number in enumerate(self._at):
            bit = 1 << rank
            aged[number % BUCKETS] |= bit
            self._rank[number] = rank
            if self._filled[number]:
                ranks |= bit
        self._ranks = ranks
        self._aged = list(accumulate(reversed(aged), or_))[::-1]
        self._youngest = [*map(lt, worth, worth[1:]), False]
        self._youngest[BUCKETS - 1 :: BUCKETS] = [False] * len(self._ends)

    def compact(self, live: Callable[[Run[T], T], bool]) -> None:
        """Drop members of which `live(run, member)` is false, and runs that have none left."""
        for run in list(self):
            run.members[:] = [member for member in run.members if live(run, member)]
            if not run.members:
                self.drop(run)

    def __iter__(self) -> Iterator[Run[T]]:
        for end in self._ends:
            run = end.hotter
            while run is not None and run is not end:
                yield run
                run = run.hotter

    def _fill(self, number: int) -> None:
        self._filled[number] = True
        self._ranks |= 1 << self._rank[number]

    def _expect(self, last: Run[T], number: int) -> None:
        """A shelf is empty, and what is older than it ends with `last`: it gets what is next, when that is old enough."""
        kind, bucket = divmod(number, BUCKETS)
        younger = last.hotter
        time = self.now if younger is None or younger is self._ends[kind] else younger.time
        heapq.heappush(self._due, (time + self._ages.edges[bucket], number))

    def _mark(self, kind: int, bucket: int) -> Run[T]:
        """The youngest run of a class that is as old as the bucket."""
        marks, limit = self._marks[kind], self.now - self._begins[bucket]
        run = marks[bucket]
        while (hotter := run.hotter) is None:
            run = run.colder
        while hotter is not None and hotter.time <= limit:
            run, hotter = hotter, hotter.hotter
        marks[bucket] = run
        return run
