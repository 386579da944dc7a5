"""`adaptive`: LRU in which objects that were used seldom may age faster, where ghost caches show that this finds more.

The object with the highest age goes first. Age is the time since the last use, times a *weight* that depends on how often the
object was used. With equal weights this is LRU. With a high weight for what was used once, traffic that never comes again passes
through a small part of the arena, as in 2Q and S3-FIFO. With weights that fall with every use, the order approaches LFU.
An object that comes back soon after its eviction keeps its number of uses.

Which weights find most is measured: one ghost cache (names only) for each choice follows all requests. What such a cache holds
depends only on the last use of each object and the number of its uses. So it is no list of names, but a few positions in a
history that all ghost caches share: for each number of uses, the oldest request of which it still holds objects. A request costs
the same few steps for each of them, however long its prompt is and however large the arena.

The order is LRU's for the first `EXPERIENCE` requests. The policy leaves LRU only for weights whose gain is statistically
significant. It returns when that gain is gone, or has significantly fallen from its highest value; all gains are then
counted anew. A change of weights moves nothing: it changes only what is evicted from then on. The policy learns of requests
through `asked`; where nobody calls that, the order is LRU's.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby

from lmcache.control.eviction.base import Policy, Queue, Tracked, insert, remove

KINDS = 4
"""Objects are of the kind of their number of uses: one, two, three, more."""
LRU = (1.0, 1.0, 1.0, 1.0)
RIVALS = ((2.0, 1.0, 1.0, 1.0), (64.0, 1.0, 1.0, 1.0), (512.0, 64.0, 8.0, 1.0))
"""Weights by kind: one use tells little; one use tells nearly everything; each use counts."""
EXPERIENCE = 1000
"""Requests before anything but LRU is followed."""
EVIDENCE = 2.0
"""A gain is significant from so many standard deviations on. The gains of different requests are taken as independent."""
DOUBT = 2.5
"""The same for a loss, counted from the highest gain."""
HALF_LIFE = 32
"""A gain counts half when so many times the capacity has been asked for."""
MEMORY = 4
"""Evicted names that are remembered at least, in multiples of the capacity (at most twice as many)."""
MOST = 1 << 20
"""Evicted names that are remembered at least where `MEMORY` asks for more, and the capacity does not."""


class _Batch:
    """Objects of one kind whose last use was in one request; `names` counts them, evicted ones included."""

    __slots__ = ("kind", "names", "time")

    def __init__(self, time: float, kind: int) -> None:
        self.time = time
        self.kind = kind
        self.names = 0


class _Ghost:
    """What an arena would hold with other weights.

    Attributes:
        first: by kind, the position of the oldest batch that it holds.
        since: by kind, the time of that.
        part: the batch that goes next, of which it holds only the first objects.
        gone: names that left the batches that it holds: the names used, less these, are in it (all of `part` included).
        hits: since the last verdict, at which some ghost had more or fewer than LRU.
        gain: hits beyond LRU's, the past slowly fading; `variance` of that.
        fall: hits lost to LRU since the gain was highest, or was set to zero; `fall_variance` of that.
    """

    __slots__ = ("fall", "fall_variance", "first", "gain", "gone", "hits", "part", "since", "variance", "weights")

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights
        self.first = [0] * KINDS
        self.since = [0.0] * KINDS
        self.part: _Batch | None = None
        self.gone = self.hits = 0
        self.gain = self.variance = self.fall = self.fall_variance = 0.0

    def shrink(self, rows: Sequence[Sequence[_Batch]], excess: int, now: float) -> None:
        """Give up so many names, the coldest."""
        first, weights = self.first, self.weights
        while True:
            highest, coldest = -1.0, rows[0][-1]
            for kind, row in enumerate(rows):
                at, last = first[kind], len(row) - 1
                while at < last and not row[at].names:
                    at += 1
                first[kind] = at
                batch = row[at]
                age = (now - batch.time) * weights[kind]
                if age > highest and batch.names:
                    highest, coldest = age, batch
            self.part = coldest
            if coldest.names > excess or coldest.time == now:
                break
            self.gone += coldest.names
            excess -= coldest.names
            first[coldest.kind] += 1
        self.since = [row[at].time for row, at in zip(rows, first, strict=True)]

    def judge(self, more: int, fade: float) -> None:
        """A request had so many hits more than with LRU."""
        self.gain = self.gain * fade + more
        self.variance = self.variance * fade * fade + more * more
        self.fall -= more
        self.fall_variance += more * more
        if self.fall <= 0:
            self.fall = self.fall_variance = 0.0


class Adaptive(Policy):
    """See the module. The `place` of an item is its batch; stamps are 1 in the queues, of which there is one for each kind."""

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self._full = self._capacity * 65 // 64  # names in a ghost; it need not shrink with every request
        self._queues = [Queue() for _ in range(KINDS)]
        self._ends = [queue.end for queue in self._queues]
        self._memory = max(16, min(MEMORY * capacity, max(capacity, MOST)))
        self._lately: dict[bytes, _Batch] = {}  # evicted names
        self._before: dict[bytes, _Batch] = {}  # those evicted before
        self._rows = [
            [_Batch(0.0, kind)] for kind in range(KINDS)
        ]  # oldest first; the last is that of the latest request
        self._dropped = _Batch(-1.0, 0)  # no ghost holds it
        self._lru = _Ghost(LRU)
        self._rivals = [_Ghost(weights) for weights in RIVALS]
        self._ghosts = [self._lru, *self._rivals]
        self._leader = self._lru
        self._now = 0.0  # objects asked for so far
        self._requests = 0
        self._asked = 0  # objects, since the last request of which some ghost had other hits than LRU
        self._used = 0  # names that were used, ever: counted again with every use
        self._limit = 1024  # of batches in a row

    @property
    def weights(self) -> Sequence[float]:
        """How fast objects of each kind age at present."""
        return self._leader.weights

    def asked(self, chain: Sequence[bytes], hits: int) -> None:
        """See `Policy.asked`."""
        if not chain:
            return
        self._judge(len(chain))
        self._now += len(chain)
        for kind, row in enumerate(self._rows):
            if row[-1].names:
                row.append(_Batch(self._now, kind))
            else:
                row[-1].time = self._now
            if len(row) > self._limit:
                self._compact()

    def cuts(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Policy.cuts`. Children leave first, so it is the beginning of a run that is remembered."""
        if len(digests) < 2 or self._note(digests[0]) is None:
            return ()
        known = bisect_left(digests, True, key=lambda digest: self._note(digest) is None)
        return (known,) if known < len(digests) else ()

    def add(self, items: Sequence[Tracked]) -> None:
        """See `Policy.add`."""
        for item in reversed(items):
            kind = 0
            note = self._note(item.digest) if self._now else None
            if note is not None:
                kind = min(note.kind + 1, KINDS - 1)
                for batch, names in groupby(map(self._note, item.names)):
                    if batch is not None:
                        self._leave(batch, len(list(names)))
            self._push(item, self._enter(kind, item.size))
        for ghost in self._ghosts:
            if self._used - ghost.gone > self._full:
                ghost.shrink(self._rows, self._used - ghost.gone - self._capacity, self._now)

    def touch(self, items: Sequence[Tracked]) -> None:
        """See `Policy.touch`."""
        before: _Batch | None = None
        into = self._rows[0][-1]
        names = 0
        for item in reversed(items):
            batch: _Batch = item.place  # type: ignore[assignment]
            if batch.time < self._now:
                if batch is not before:  # mostly all come from one
                    if before is not None:
                        self._leave(before, names)
                        self._enter(into.kind, names)
                    before, names = batch, 0
                    into = self._rows[min(batch.kind + 1, KINDS - 1)][-1]
                names += item.size
                batch = into
            elif item.stamp and self._now:
                continue  # a store of what was just loaded, or has just come
            if item.stamp:
                remove(item)
            self._push(item, batch)
        if before is not None:
            self._leave(before, names)
            self._enter(into.kind, names)

    def split(self, item: Tracked, rest: Tracked) -> None:
        """See `Policy.split`."""
        rest.stamp, rest.place = 1, item.place
        insert(rest, item)

    def pop(self) -> Tracked | None:
        """See `Policy.pop`."""
        now, weights = self._now, self._leader.weights
        item, highest = None, -1.0
        for kind, end in enumerate(self._ends):
            coldest = end.hotter
            if coldest is not end:
                age = (now - coldest.place.time) * weights[kind]  # type: ignore[attr-defined]
                if age > highest:
                    item, highest = coldest, age
        if item is not None:
            item.stamp = 0
            remove(item)
        return item

    def evicted(self, item: Tracked, digests: Sequence[bytes]) -> None:
        """See `Policy.evicted`."""
        self._remember(digests, item.place)  # type: ignore[arg-type]

    def restore(self, item: Tracked) -> None:
        """See `Policy.restore`."""
        item.stamp = 1
        self._queues[item.place.kind].prepend(item)  # type: ignore[attr-defined]

    def discard(self, item: Tracked) -> None:
        """See `Policy.discard`."""
        if item.stamp:
            item.stamp = 0
            remove(item)
        batch: _Batch = item.place  # type: ignore[assignment]
        for ghost in self._ghosts:
            if batch.time >= ghost.since[batch.kind]:
                ghost.gone += item.size
        batch.names -= item.size
        self._remember(item.names, self._dropped)

    def members(self) -> Iterator[Tracked]:
        """See `Policy.members`."""
        for queue in self._queues:
            yield from queue

    def _note(self, name: bytes) -> _Batch | None:
        """The batch in which an evicted name was, if it is remembered."""
        return self._lately.get(name) or self._before.get(name)

    def _remember(self, names: Sequence[bytes], batch: _Batch) -> None:
        lately = self._lately
        for name in names:
            lately[name] = batch
        if len(lately) >= self._memory:
            self._lately, self._before = {}, lately

    def _push(self, item: Tracked, batch: _Batch) -> None:
        item.stamp, item.place = 1, batch
        self._queues[batch.kind].append(item)

    def _leave(self, batch: _Batch, names: int) -> None:
        """So many names of a batch were asked for: hits for each ghost that holds them."""
        for ghost in self._ghosts:
            if batch.time >= ghost.since[batch.kind]:
                held = names
                if batch is ghost.part:
                    excess = max(0, self._used - ghost.gone - self._capacity)
                    held = max(0, min(names, batch.names - excess))
                ghost.hits += held
                ghost.gone += names
        batch.names -= names

    def _enter(self, kind: int, names: int) -> _Batch:
        """So many names of a kind were used just now."""
        batch = self._rows[kind][-1]
        batch.names += names
        self._used += names
        return batch

    def _judge(self, asked: int) -> None:
        """Decide which weights to follow. `asked`: objects of the next request."""
        base = self._lru.hits
        self._requests += 1
        self._asked += asked
        if all(ghost.hits == base for ghost in self._rivals):
            return  # gains and what is needed of them fade alike
        fade = 0.5 ** (self._asked / (HALF_LIFE * self._capacity))
        self._asked = 0
        for ghost in self._rivals:
            ghost.judge(ghost.hits - base, fade)
        for ghost in self._ghosts:
            ghost.hits = 0
        if self._requests <= EXPERIENCE:
            return
        leader = self._leader
        if leader.fall > DOUBT * math.sqrt(leader.fall_variance):
            for ghost in self._rivals:  # the traffic has changed: what was gained before says nothing any more
                ghost.gain = min(0.0, ghost.gain)
                ghost.fall = ghost.fall_variance = 0.0
        best, most = self._lru, 0.0
        for ghost in self._rivals:
            needed = 0.0 if ghost is leader else EVIDENCE * math.sqrt(ghost.variance)
            if ghost.gain > max(needed, most):
                best, most = ghost, ghost.gain
        self._leader = best

    def _compact(self) -> None:
        """Drop batches that are empty, or too old for every ghost."""
        for kind, row in enumerate(self._rows):
            oldest = min(ghost.first[kind] for ghost in self._ghosts)
            row[:] = [batch for batch in row[oldest:-1] if batch.names] + row[-1:]
            for ghost in self._ghosts:
                ghost.first[kind] = bisect_left(row, ghost.since[kind], 0, len(row) - 1, key=lambda batch: batch.time)
        self._limit = 2 * max(map(len, self._rows)) + 1024
