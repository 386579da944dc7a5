"""`density`: keep what promises most hits per unit of time, where that is seen to beat LRU; otherwise exact LRU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from lmcache.eviction.classic import Tracked
from lmcache.eviction.forecast import HORIZON, KINDS, NEW, Forecast, Kinds
from lmcache.eviction.shelves import Ages, Run, Shelves

SAMPLE = 4096
"""Objects of the shadow caches, at most: larger arenas are judged by a sample of their names."""


class Density:
    """See the module. Without `asked` it is LRU."""

    def __init__(self, capacity: int, sample: int = SAMPLE) -> None:
        self._bound = 256 if capacity <= sample else max(1, 256 * sample // capacity)
        share = self._bound / 256
        unit = max(4.0, capacity / 64)
        self.forecast = Forecast(max(1, round(capacity * share)), HORIZON * capacity, unit)
        self._shelves: Shelves[Tracked] = Shelves(KINDS, Ages(unit))
        self._log: deque[Run[Tracked]] = deque()
        self._stamp = 0
        self._clock = 0.0
        self._version = -1
        self._hints: dict[bytes, int] = {}
        self._older: dict[bytes, int] = {}
        self._few = max(1024, capacity // 4)
        self._last: dict[bytes, int] = {}
        self._back: list[Tracked] = []
        self._cleared = 1024

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """A request for a whole chain, of which the first `hits` objects are resident; before `touch` and `add`."""
        self._clock += len(chain)
        bound = self._bound
        if bound == 256:
            kinds = self.forecast.ask(chain, self._clock)
            known = kinds.known
        else:
            picked = [i for i, name in enumerate(chain) if name[0] < bound]
            kinds = self.forecast.ask([chain[i] for i in picked], self._clock) if picked else Kinds(0, NEW, NEW)
            known = picked[kinds.known - 1] + 1 if kinds.known else 0
        known = max(known, hits)
        hints = self._hints
        if known:
            hints.update(dict.fromkeys(chain[:known], kinds.again))
        hints.update(dict.fromkeys(chain[known:], kinds.new))
        if len(hints) > self._few:
            self._older, self._hints = hints, {}

    def add(self, run: Sequence[Tracked]) -> None:
        self.touch(run)

    def touch(self, run: Sequence[Tracked]) -> None:
        if not run:
            return
        first = 0
        kinds = [self._kind(item.digest) for item in run]
        for i in range(1, len(run) + 1):
            if i == len(run) or kinds[i] != kinds[first]:
                self._push(list(run[first:i]), kinds[first])
                first = i

    def _kind(self, digest: bytes) -> int:
        kind = self._hints.get(digest)
        return self._older.get(digest, NEW) if kind is None else kind

    def _push(self, members: list[Tracked], kind: int) -> None:
        self._stamp = stamp = self._stamp + 1
        for item in members:
            item.stamp = stamp
        run = Run(self._clock, kind, members, stamp)
        self._log.append(run)
        self._shelves.put(run)

    def pop(self) -> Tracked | None:
        while self._back:
            item = self._back.pop()
            if item.stamp == -1:
                item.stamp = 0
                return item
        log = self._log
        if self.forecast.trusted:
            shelves = self._shelves
            for _ in shelves.advance(self._clock):
                pass
            if self._version != self.forecast.version:
                self._version = self.forecast.version
                shelves.arrange(self.forecast.worth)
            while (cold := shelves.coldest()) is not None:
                members = cold.members
                while members:
                    item = members.pop()
                    if item.stamp == cold.turn:
                        item.stamp = 0
                        return item
            return None
        while log:
            members = log[0].members
            stamp = log[0].turn
            while members:
                item = members.pop()
                if item.stamp == stamp:
                    item.stamp = 0
                    return item
            log.popleft()
        return None

    def restore(self, item: Tracked) -> None:
        item.stamp = -1
        self._back.append(item)

    def discard(self, item: Tracked) -> None:
        item.stamp = 0

    def members(self) -> Iterator[Tracked]:
        for run in self._log:
            for item in run.members:
                if item.stamp == run.turn:
                    yield item
        for item in self._back:
            if item.stamp == -1:
                yield item
