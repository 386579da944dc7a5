"""`density`: keep what promises most hits per unit of time, where that is seen to beat LRU; otherwise exact LRU.

`lmcache.eviction.forecast` learns from `asked` what is worth keeping and says whether it is to be believed; here is the
order of what is really resident, by both. Who never calls `asked` has LRU. Its clock counts the objects asked for.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence

from lmcache.eviction.base import Policy, Tracked
from lmcache.eviction.forecast import HORIZON, KINDS, NEW, Forecast, Kinds
from lmcache.eviction.shelves import Ages, Run, Shelves
from lmcache.eviction.stake import Stake

SAMPLE = 4096
"""Objects of the shadow caches, at most: larger arenas are judged by a sample of their names. With 1024 the hits of the
Mooncake conversation trace at 5 % fall by a tenth, because it takes longer until a gain is beyond chance."""


class Density(Policy):
    """A run stands in a log (by last use) and on a shelf (by class and age), with one list of members for both. An object
    belongs to the run whose number is its stamp; what was restored has a negative stamp and goes before all others.
    """

    def __init__(self, capacity: int, sample: int = SAMPLE) -> None:
        self._bound = 256 if capacity <= sample else max(1, 256 * sample // capacity)
        unit = max(4.0, capacity / 64)
        self.forecast = Forecast(max(1, round(capacity * self._bound / 256)), HORIZON * max(1, capacity), unit)
        self.stake = Stake(max(1.0, capacity * self._bound / 256))
        self._clock = 0.0
        self._stamp = 0
        self._log: deque[Run[Tracked]] = deque()
        self._shelves: Shelves[Tracked] = Shelves(KINDS, Ages(unit))
        self._restored: list[tuple[int, Tracked]] = []
        self._version = -1
        self._spent: list[tuple[float, int, Run[Tracked]]] = []
        self._entries = 0
        self._limit = 2 * capacity + 1024
        # Classes of what was asked for lately, in two generations: it is touched or added soon.
        self._kinds: dict[bytes, int] = {}
        self._older: dict[bytes, int] = {}
        self._lately = max(1024, min(capacity // 4, 65_536))

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """See `Policy.asked`."""
        if not chain:
            return
        self._clock += len(chain)
        bound = self._bound
        if bound == 256:
            picked: Sequence[int] = range(len(chain))
            keys = chain
            found = hits
        else:  # digests are random: their first byte draws the sample
            picked = [i for i, digest in enumerate(chain) if digest[0] < bound]
            keys = [chain[i] for i in picked]
            found = bisect_left(picked, hits)
        known = 0
        kinds = Kinds(0, NEW, NEW)
        if keys:
            self.stake.ask(keys, found, self._clock)
            kinds = self.forecast.ask(keys, self._clock)
            known = picked[kinds.known - 1] + 1 if kinds.known else 0
        known = max(known, hits)
        self._kinds.update(dict.fromkeys(chain[:known], kinds.again))
        self._kinds.update(dict.fromkeys(chain[known:], kinds.new))
        if len(self._kinds) > self._lately:
            self._older, self._kinds = self._kinds, {}

    def add(self, run: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(run)

    def touch(self, run: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        first = 0
        kinds = [self._kind(item.digest) for item in run]
        for i in range(1, len(run) + 1):
            if i == len(run) or kinds[i] != kinds[first]:
                self._push(list(run[first:i]), kinds[first])
                first = i
        if self._entries > self._limit:
            self._compact()

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        while self._restored:
            stamp, item = self._restored.pop()
            if item.stamp == stamp:
                item.stamp = 0
                break
        else:
            item = self._choose()
        if item is not None and item.digest[0] < self._bound:
            self.stake.left(item.digest)
        return item

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        self._stamp += 1
        item.stamp = -self._stamp
        self.stake.back(item.digest)
        self._restored.append((item.stamp, item))
        self._entries += 1
        if self._entries > self._limit:
            self._compact()

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        item.stamp = 0

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        yield from (item for run in self._log for item in run.members if item.stamp == run.turn)
        yield from (item for stamp, item in self._restored if item.stamp == stamp)

    def _kind(self, digest: bytes) -> int:
        kind = self._kinds.get(digest)
        return self._older.get(digest, NEW) if kind is None else kind

    def _push(self, members: list[Tracked], kind: int) -> None:
        self._stamp = stamp = self._stamp + 1
        for item in members:
            item.stamp = stamp
        run = Run(self._clock, kind, members, stamp)
        self._log.append(run)
        self._shelves.put(run)
        self._entries += len(members)

    def _choose(self) -> Tracked | None:
        """The coldest by worth, where that may be risked; otherwise the coldest of what LRU would not hold any more."""
        if not self._learnt:
            return self._pop_by_age()
        shelves, stake = self._shelves, self.stake
        for _ in shelves.advance(self._clock):
            pass
        if self._version != self.forecast.version:
            self._version = self.forecast.version
            shelves.arrange(self.forecast.worth)
        since = stake.since
        spent = self._spent
        while spent and spent[0][0] < since:
            item = _last(spent[0][2])
            if item is not None:
                return item
            heapq.heappop(spent)
        while (run := shelves.coldest()) is not None:
            if run.time >= since:
                if not stake.affords(1):
                    break
                if not stake.affords(run.size - len(run.members) + 1):
                    heapq.heappush(self._spent, (run.time, run.turn, run))
                    shelves.drop_coldest()
                    continue
            item = _last(run)
            if item is not None:
                return item
        while (run := shelves.coldest_before(since, self._clock)) is not None:
            item = _last(run)
            if item is not None:
                return item
        return self._pop_by_age()

    _learnt = True

    def _pop_by_age(self) -> Tracked | None:
        while self._log:
            item = _last(self._log[0])
            if item is not None:
                return item
            self._log.popleft()
        return None

    def _compact(self) -> None:
        # Entries are counted as they come and not as they go, so that runs left without members are bounded too. At most
        # `capacity` objects are live: this frees at least half of what there is, O(1) amortised.
        self._shelves.compact(lambda run, item: item.stamp == run.turn)
        self._log = deque(run for run in self._log if run.members)
        self._restored = [(stamp, item) for stamp, item in self._restored if item.stamp == stamp]
        self._entries = sum(len(run.members) for run in self._log) + len(self._restored)


def _last(run: Run[Tracked]) -> Tracked | None:
    """Take the last live object out of a run."""
    members = run.members
    while members:
        item = members.pop()
        if item.stamp == run.turn:
            item.stamp = 0
            return item
    return None
