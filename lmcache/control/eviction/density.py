"""`density`: keep what promises most hits per unit of time, as far as what that may cost was earned; otherwise exact LRU.

`forecast` learns from `asked` what is worth keeping, `stake` says how far that may be followed; here is the order of what is
really resident, by both. Who never calls `asked` has LRU. Its clock counts the
objects asked for.
"""

from __future__ import annotations

import heapq
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby

from lmcache.control.eviction.base import Policy, Recent, Tracked
from lmcache.control.eviction.forecast import HORIZON, KINDS, NEW, Forecast
from lmcache.control.eviction.shelves import Ages, Run, Shelves
from lmcache.control.eviction.stake import Stake

SAMPLE = 16384
"""Resident objects that are learnt from, about: in larger arenas a sample of the names stands for all. With 4096 the hits
of the Mooncake conversation trace at 5 % fall by a twentieth: accounts of few names are poorer."""


class Density(Policy):
    """Items used together stand in a log (by last use) and on a shelf (by class and age), with one list of members for both.
    An item belongs to the shelf's run whose number is its stamp; what was restored has a negative stamp.
    `freq` is how many of its objects were to go when it was popped.
    """

    def __init__(self, capacity: int, sample: int = SAMPLE) -> None:
        self._capacity = capacity
        self._bound = 256 if capacity <= sample else max(1, 256 * sample // capacity)
        unit = max(4.0, capacity / 64)
        size = max(1, round(capacity * self._bound / 256))
        self.forecast = Forecast(size, HORIZON * max(1, capacity), unit)
        self.stake = Stake(self.forecast.history, size)
        self._clock = 0.0
        self._stamp = 0
        self._log: deque[Run[Tracked]] = deque()
        self._shelves: Shelves[Tracked] = Shelves(KINDS, Ages(unit))
        self._spent: list[tuple[float, int, Run[Tracked]]] = []  # heap: runs that have no more to lend, by last use
        self._restored: list[tuple[float, int, Tracked]] = []  # heap, by last use
        self._partly: Tracked | None = None  # of which objects were evicted since the last `pop`
        self._shelved = False  # whether what was popped last came from a shelf
        self._most = sys.maxsize
        self._version = -1
        self._entries = 0
        self._limit = 2 * capacity + 1024
        self._resident = self._sampled = 0  # objects, and those of the sample
        # Where there is a sample, the classes of everything that was asked for lately: it is touched or added soon.
        self._lately: Recent[int] = Recent(max(1024, min(capacity // 4, 65_536)))

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """See `Policy.asked`."""
        if not chain:
            return
        self._clock += len(chain)
        if len(once := dict.fromkeys(chain)) < len(chain):  # names that mean something each on their own may repeat
            hits = len(dict.fromkeys(chain[:hits]))
        self._learn(list(once), hits)
        self._shelves.now = self._clock
        if self._version != self.forecast.version:
            self._version = self.forecast.version
            self._shelves.arrange(self.forecast.worth)

    def _learn(self, names: list[bytes], hits: int) -> None:
        now, bound, stake = self._clock, self._bound, self.stake
        if bound == 256:
            stake.asked(names, hits, self.forecast.ask(names, now).held, now)
            return
        if self._resident:  # as large a share of LRU's objects as of ours
            stake.capacity = self._capacity * self._sampled / self._resident
        picked = [i for i, digest in enumerate(names) if digest[0] < bound]
        sample = [names[i] for i in picked]
        kinds = self.forecast.ask(sample, now)
        if sample:
            stake.asked(sample, bisect_left(picked, hits), kinds.held, now)
        known = max(hits, picked[kinds.known - 1] + 1 if kinds.known else 0)
        self._lately.put_all(names[:known], kinds.again)
        self._lately.put_all(names[known:], kinds.new)

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Policy.cuts`."""
        if not digests or self._kind(digests[0]) == self._kind(digests[-1]):  # it changes once in a request, if at all
            return ()
        last = self._kind(digests[-1])
        return [bisect_left(digests, True, key=lambda digest: self._kind(digest) == last)]

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        if self._bound < 256:
            for item in items:
                self._count(item.names, 1)
        self.touch(items)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        now = self._clock
        if now and all(item.stamp > 0 and item.place.time == now for item in items):  # type: ignore[attr-defined]
            return  # a store of what was just loaded
        for kind, alike in groupby(items, self._kind_of):
            self._push(list(alike), kind)
        if self._entries > self._limit:
            self._compact()

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        run = item.place
        assert isinstance(run, Run)
        rest.place = run
        if item.stamp < 0:
            self._give_back(rest, run)
            return
        rest.stamp = item.stamp
        run.members.insert(run.members.index(item) + 1, rest)
        self._entries += 1

    def pop(self) -> Tracked | None:
        """See `Policy.pop`. All of it counts as lent until it is restored."""
        self._partly, self._shelved, self._most = None, False, sys.maxsize
        item = (self._returned() if self._restored else None) or self._choose()
        if item is not None:
            item.stamp, item.freq = 0, self._most
            self.stake.left(item.names)
        return item

    def most(self, item: Tracked) -> int:
        """See `Policy.most`."""
        return self._most

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        """See `Policy.evicted`."""
        self._partly = item
        self._count(digests, -1)
        item.freq = max(0, item.freq - len(digests))

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        self.stake.returned(item.names)
        run = item.place
        assert isinstance(run, Run)
        if item is self._partly and self._shelved:  # just popped: the run is still where it was
            item.stamp = run.number
            run.members.append(item)
            run.gone -= item.size
        else:
            self._give_back(item, run)

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        item.stamp = 0
        self._count(item.names, -1)
        self.stake.gone(item.names)

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        yield from (item for run in self._log for item in run.members if item.stamp == run.number)
        yield from (item for _, stamp, item in self._restored if item.stamp == stamp)

    def _give_back(self, item: Tracked, run: Run[Tracked]) -> None:
        self._stamp += 1
        item.stamp = -self._stamp
        heapq.heappush(self._restored, (run.time, item.stamp, item))
        self._entries += 1
        if self._entries > self._limit:
            self._compact()

    def _first(self) -> Tracked | None:
        """Of what was restored the oldest."""
        restored = self._restored
        while restored:
            _, stamp, item = restored[0]
            if item.stamp == stamp:
                return item
            heapq.heappop(restored)
        return None

    def _returned(self) -> Tracked | None:
        """Take out the oldest of what was restored, if it was to go before, LRU does not hold it, or it may be lent."""
        item = self._first()
        if item is None:
            return None
        run = item.place
        assert isinstance(run, Run)
        if item.freq:
            self._most = item.freq
        elif self.stake.holds(item.names[-1]) and not self._allow(run):
            return None
        heapq.heappop(self._restored)
        return item

    def _allow(self, run: Run[Tracked]) -> bool:
        """Whether some of a run that LRU would hold may go; sets how many."""
        share = self._bound / 256
        loans = self.stake.loans(share * run.gone)
        if loans > 0:
            self._most = max(1, int(loans / share))
        return loans > 0

    def _count(self, digests: Sequence[bytes], sign: int) -> None:
        """Objects that became resident or ceased to be. Of use only where there is a sample."""
        bound = self._bound
        if bound < 256:
            self._resident += sign * len(digests)
            self._sampled += sign * sum(digest[0] < bound for digest in digests)

    def _kind_of(self, item: Tracked) -> int:
        return self._kind(item.digest)

    def _kind(self, digest: bytes) -> int:
        stretch = self.forecast.history.find(digest)
        if stretch is not None:
            return stretch.kind
        kind = self._lately.get(digest) if self._bound < 256 else None
        return NEW if kind is None else kind

    def _push(self, members: list[Tracked], kind: int) -> None:
        self._stamp = stamp = self._stamp + 1
        run = Run(self._clock, kind, members, stamp)
        for item in members:
            item.stamp, item.place, item.freq = stamp, run, 0
        self._log.append(run)
        self._shelves.put(run)
        self._entries += len(members)

    def _choose(self) -> Tracked | None:
        """The coldest by worth, where that is affordable; otherwise the coldest of what LRU would not hold."""
        self._shelved = True
        if not self.forecast.version:
            return self._oldest()
        since, stake, shelves = self.forecast.history.since, self.stake, self._shelves
        while self._spent and self._spent[0][0] < since:
            item = _last(self._spent[0][2])
            if item is not None:
                return item
            heapq.heappop(self._spent)
        while (run := shelves.coldest()) is not None:
            if run.time >= since:
                if not stake.affords(0):
                    break
                if not self._allow(run):
                    heapq.heappush(self._spent, (run.time, run.number, run))
                    shelves.drop(run)
                    continue
            item = _last(run)
            if item is not None:
                return item
        self._most = sys.maxsize
        while (run := shelves.coldest(since)) is not None:
            item = _last(run)
            if item is not None:
                return item
        return self._oldest()

    def _oldest(self) -> Tracked | None:
        """What was used longest ago."""
        restored, log = self._first(), self._log
        while log:
            run = log[0]
            if restored is not None and self._restored[0][0] <= run.time:
                break
            item = _last(run)
            if item is not None:
                return item
            log.popleft()
        if restored is not None:
            heapq.heappop(self._restored)
            self._shelved = False
        return restored

    def _compact(self) -> None:
        # Entries are counted as they come and not as they go, so that runs left without members are bounded too. At most
        # `capacity` objects are live: this frees at least half of what there is, O(1) amortised.
        self._shelves.compact(lambda run, item: item.stamp == run.number)
        self._log = deque(run for run in self._log if run.members)
        self._spent = [entry for entry in self._spent if entry[2].members]
        heapq.heapify(self._spent)
        self._restored = [entry for entry in self._restored if entry[2].stamp == entry[1]]
        heapq.heapify(self._restored)
        self._entries = sum(len(run.members) for run in self._log) + len(self._restored)


def _last(run: Run[Tracked]) -> Tracked | None:
    """Take the last live item out of a run."""
    members = run.members
    while members:
        item = members.pop()
        run.gone += item.size
        if item.stamp == run.number:
            return item
    return None
