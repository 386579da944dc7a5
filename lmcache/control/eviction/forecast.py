"""What comes back, and when: learnt from the requests.

Objects fall into classes by what is known of the conversation they belong to. Per class and age it is counted how many
objects reached that age unused and how many were used then (evicted ones are remembered, so that this is known beyond what
fits). The worth of an object is the highest rate of hits per unit of time that keeping it for some time promises:

    worth(class, age) = max over t of  P(used before age + t) / E[time until used, at most t]

which is the Gittins index of a job of unknown length, and Beckmann et al.'s "hit density" (LHD, NSDI 2018) with the best
time to give up. If the rate of hits only falls with age, the order within a class is LRU; if users think before they answer,
what is about to come back stays and what has just begun goes.

How far it is followed, `lmcache.control.eviction.stake` says. In large arenas it is learnt from a sample of the objects, by their
names (Waldspurger et al., "SHARDS", FAST 2015), so the cost is bounded whatever the arena's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmcache.control.eviction.history import History, Part, Stretch, used_again
from lmcache.control.eviction.shelves import BUCKETS, Ages

TURNS = 3
NEW, AGAIN, SHARED = 0, TURNS + 1, 2 * (TURNS + 1)
"""First class of: what a request brought, what it used again and continues, what it used again but branches off from."""
KINDS = SHARED + 4
PRIOR = 20.0
"""Weight, in objects, of what is known of all classes together against what is known of one."""
HORIZON = 16
"""How long an object is remembered at least: until as many times the capacity has been asked for."""


class Kinds(NamedTuple):
    """The classes of a request's objects: of the first `known` names that of `again`, of the others that of `new`. `held`: what
    LRU held, from the first name on.
    """

    known: int
    again: int
    new: int
    held: list[Part]


class Forecast:
    """Learns from `ask`. `worth` is the present order (see `Shelves.arrange`), `version` its number."""

    def __init__(self, capacity: int, horizon: float, unit: float) -> None:
        """`capacity` of the arena, in sampled objects; `horizon` and `unit` in what the clock counts."""
        self.ages = Ages(unit)
        self.history = History(horizon)
        self.worth = [0.0] * (KINDS * BUCKETS)
        self.version = 0
        self._used = [[0.0] * KINDS for _ in range(BUCKETS)]
        self._reached = [[0.0] * KINDS for _ in range(BUCKETS)]
        self._fitted = 0.0  # when; later than that, it is not counted yet which ages were reached
        self._interval = max(1024.0, capacity / 4)
        self._since = 0.0
        self._keep = 0.5 ** (self._interval / (64 * capacity + 20000))
        self._fit(0.0)

    def ask(self, names: list[bytes], now: float) -> Kinds:
        """A request for the sampled `names` of a chain, each of which is in it once. Returns their classes."""
        history = self.history
        for stretch in history.forget(now):
            self._leave(stretch, len(stretch.names), now)
        parts = history.take(names)
        kinds = _classify(parts)
        for stretch, taken, _, _ in parts:
            self._used[self._leave(stretch, len(taken), now)][stretch.kind] += len(taken)
        self._admit(names[kinds.known :], parts, kinds, now)
        self._since += len(names)
        if self._since >= self._interval:
            self._since = 0.0
            self._fit(now)
        return kinds

    def _admit(self, news: list[bytes], parts: list[Part], kinds: Kinds, now: float) -> None:
        history, turn, end = self.history, kinds.new - NEW, kinds.known + len(news)
        history.drop(news)  # nothing, where names commit to what is before them
        olds = [name for part in parts for name in part.names]
        history.put(Stretch(now, kinds.new, turn, end, news, bytes(len(news))))
        history.put(Stretch(now, kinds.again, turn, end, olds, used_again(parts)))
        self._reached[0][kinds.new] += len(news)
        self._reached[0][kinds.again] += len(olds)

    def _leave(self, stretch: Stretch, size: int, now: float) -> int:
        """So many names leave a stretch: count the ages they reached since the last fit. Returns the bucket of their age."""
        age = self.ages.bucket(now - stretch.time)
        if age:
            for b in range(self.ages.bucket(self._fitted - stretch.time) + 1, age + 1):
                self._reached[b][stretch.kind] += size
        return age

    def _fit(self, now: float) -> None:
        used, reached, edges = self._used, self._reached, self.ages.edges
        for b in range(1, BUCKETS):
            row = reached[b]
            for stretch in self.history.between(self._fitted - edges[b], now - edges[b]):
                row[stretch.kind] += len(stretch.names)
        self._fitted = now
        widths = [edges[b + 1] - edges[b] for b in range(BUCKETS)]
        chances = []
        for u, r in zip(used, reached, strict=True):
            general = PRIOR * (sum(u) + 1.0) / (sum(r) + PRIOR)
            chances.append([min(0.999, (v + general) / (w + PRIOR)) for v, w in zip(u, r, strict=True)])
        self.worth = [worth for chances_of in zip(*chances, strict=True) for worth in rates(chances_of, widths)]
        keep = self._keep
        self._used = [[v * keep for v in row] for row in used]
        self._reached = [[v * keep for v in row] for row in reached]
        self.version += 1


def rates(chances: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The worth of each age: `chances` are those to be used within an age of those that reach it, `widths` how long it lasts.

    From the last age to the first: it pays to wait on into what is worth more than what one has. `ahead` are the ages so
    joined, the nearest last: chance of a hit, expected time, chance to be left over.
    """
    worth: list[float] = []
    ahead: list[tuple[float, float, float]] = []
    for chance, width in zip(reversed(chances), reversed(widths), strict=True):
        hits, time, left = chance, width * (1 - chance / 2), 1 - chance
        while ahead and ahead[-1][0] * time > hits * ahead[-1][1]:
            more, longer, fewer = ahead.pop()
            hits, time, left = hits + left * more, time + left * longer, left * fewer
        ahead.append((hits, time, left))
        worth.append(hits / time)
    return worth[::-1]


def _classify(parts: list[Part]) -> Kinds:
    if not parts:
        return Kinds(0, NEW, NEW, [])
    known = 0
    held: list[Part] = []
    whole = True  # LRU held all so far
    for part in parts:
        if whole and part.held:
            held.append(part)
        whole = whole and part.held == len(part.names)
        known += len(part.names)
    last = parts[-1].stretch
    if known > 1 and known >= last.end - 1:  # all but a last, partly filled block: the conversation goes on
        turn = min(last.turn + 1, TURNS)
        return Kinds(known, AGAIN + turn, NEW + turn, held)
    return Kinds(known, SHARED + min(3, parts[-1].uses[-1].bit_length()), NEW, held)
