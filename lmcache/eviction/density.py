"""`density`: keep what promises most hits per unit of time, where that is seen to beat LRU; otherwise exact LRU.

`lmcache.eviction.forecast` learns from `asked` what is worth keeping and says whether it is to be believed; here is the
order of what is really resident, by both. Who never calls `asked` has LRU. Its clock counts the objects asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from lmcache.eviction.base import Policy, Tracked
from lmcache.eviction.forecast import HORIZON, KINDS, NEW, Forecast, Kinds
from lmcache.eviction.shelves import Ages, Run, Shelves

SAMPLE = 4096
"""Objects of the shadow caches, at most: larger arenas are judged by a sample of their names. With 1024 the hits of the
Mooncake conversation trace at 5 % fall by a tenth, because it takes longer until a gain is beyond chance."""


class Density(Policy):
    """What was used together stands in a log (by last use) and on a shelf (by class and age), with one list of members for
    both. An item belongs to the `Run` whose number is its stamp, which is its `place`; what was restored has a negative
    stamp and goes before all others.
    """

    def __init__(self, capacity: int, sample: int = SAMPLE) -> None:
        self._bound = 256 if capacity <= sample else max(1, 256 * sample // capacity)
        unit = max(4.0, capacity / 64)
        self.forecast = Forecast(max(1, round(capacity * self._bound / 256)), HORIZON * max(1, capacity), unit)
        self._clock = 0.0
        self._stamp = 0
        self._log: deque[Run[Tracked]] = deque()
        self._shelves: Shelves[Tracked] = Shelves(KINDS, Ages(unit))
        self._restored: list[tuple[int, Tracked]] = []
        self._partly: Tracked | None = None  # of which objects were evicted since the last `pop`
        self._version = -1
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
            kinds = self.forecast.ask(chain, self._clock)
            known = kinds.known
        else:  # digests are random: their first byte draws the sample
            picked = [i for i, digest in enumerate(chain) if digest[0] < bound]
            kinds = self.forecast.ask([chain[i] for i in picked], self._clock) if picked else Kinds(0, NEW, NEW)
            known = picked[kinds.known - 1] + 1 if kinds.known else 0
        known = max(known, hits)
        self._kinds.update(dict.fromkeys(chain[:known], kinds.again))
        self._kinds.update(dict.fromkeys(chain[known:], kinds.new))
        if len(self._kinds) > self._lately:
            self._older, self._kinds = self._kinds, {}

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Policy.cuts`."""
        kinds = [self._kind(digest) for digest in digests]
        return [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        self.touch(items)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        first = 0
        kinds = [self._kind(item.digest) for item in items]
        for i in range(1, len(items) + 1):
            if i == len(items) or kinds[i] != kinds[first]:
                self._push(list(items[first:i]), kinds[first])
                first = i
        if self._entries > self._limit:
            self._compact()

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        if item.stamp < 0:
            self.restore(rest)
            return
        run = item.place
        assert isinstance(run, Run)
        rest.stamp, rest.place = item.stamp, run
        run.members.insert(run.members.index(item) + 1, rest)
        self._entries += 1

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        self._partly = None
        while self._restored:
            stamp, item = self._restored.pop()
            if item.stamp == stamp:
                item.stamp = 0
                return item
        return self._pop_by_worth() if self.forecast.trusted else self._pop_by_age()

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        """See `Policy.evicted`."""
        self._partly = item

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        run = item.place
        if item is self._partly and isinstance(run, Run):  # just popped: the run is still where it was
            item.stamp = run.turn
            run.members.append(item)
            return
        item.place = None
        self._stamp += 1
        item.stamp = -self._stamp
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
        run = Run(self._clock, kind, members, stamp)
        for item in members:
            item.stamp, item.place = stamp, run
        self._log.append(run)
        self._shelves.put(run)
        self._entries += len(members)

    def _pop_by_worth(self) -> Tracked | None:
        shelves = self._shelves
        for _ in shelves.advance(self._clock):
            pass
        if self._version != self.forecast.version:
            self._version = self.forecast.version
            shelves.arrange(self.forecast.worth)
        while (run := shelves.coldest()) is not None:
            item = _last(run)
            if item is not None:
                return item
        return None

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
    """Take the last live item out of a run."""
    members = run.members
    while members:
        item = members.pop()
        if item.stamp == run.turn:
            item.stamp = 0
            return item
    return None
