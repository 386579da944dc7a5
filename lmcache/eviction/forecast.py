"""What comes back, and when: learnt from the requests.

Objects fall into classes by what is known of the conversation they belong to. Per class and age it is counted how many
objects reached that age unused and how many were used then (evicted ones are remembered, so that this is known beyond what
fits). The worth of an object is the highest rate of hits per unit of time that keeping it for some time promises:

    worth(class, age) = max over t of  P(used before age + t) / E[time until used, at most t]

which is the Gittins index of a job of unknown length, and Beckmann et al.'s "hit density" (LHD, NSDI 2018) with the best
time to give up. If the rate of hits only falls with age, the order within a class is LRU; if users think before they answer,
what is about to come back stays and what has just begun goes.

How far it is followed, `lmcache.eviction.stake` says. In large arenas it is learnt from a sample of the objects, by their
names (Waldspurger et al., "SHARDS", FAST 2015), so the cost is bounded whatever the arena's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from lmcache.eviction.shelves import BUCKETS, Ages, Run, Shelves

TURNS = 3
NEW, AGAIN, SHARED = 0, TURNS + 1, 2 * (TURNS + 1)
"""First class of: what a request brought, what it used again and continues, what it used again but branches off from."""
KINDS = SHARED + 4
PRIOR = 20.0
"""Weight, in objects, of what is known of all classes together against what is known of one."""
HORIZON = 16
"""How long an object is remembered: until as many times the capacity has been asked for."""


class Kinds(NamedTuple):
    """The classes of a request's objects: of the first `known` names that of `again`, of the others that of `new`."""

    known: int
    again: int
    new: int


class Node:
    """A name in the sample, the run it was used in last, and how often it was used again."""

    __slots__ = ("key", "run", "uses")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.run: Run[Node] | None = None
        self.uses = 0


class Forecast:
    """Learns from `ask`. `worth` is the present order (see `Shelves.arrange`), `version` its number."""

    def __init__(self, capacity: int, horizon: float, unit: float) -> None:
        """`capacity` of the arena, in sampled objects; `horizon` and `unit` in what the clock counts."""
        self.ages = Ages(unit)
        self.worth = [0.0] * (KINDS * BUCKETS)
        self.version = 0
        self._horizon = horizon
        self._nodes: dict[Hashable, Node] = {}
        self._used = [[0.0] * BUCKETS for _ in range(KINDS)]
        self._reached = [[0.0] * BUCKETS for _ in range(KINDS)]
        self._watched: Shelves[Node] = Shelves(KINDS, self.ages)
        self._runs: deque[Run[Node]] = deque()
        self._interval = max(1024.0, capacity / 4)
        self._since = 0.0
        self._keep = 0.5 ** (self._interval / (64 * capacity + 20000))
        self._fit()

    def ask(self, keys: Sequence[Hashable], now: float) -> Kinds:
        """A request for the sampled `keys` of a chain. Returns their classes; `known` counts among `keys`."""
        self._age(now)
        nodes_by_key = self._nodes
        nodes = []
        for key in keys:
            node = nodes_by_key.get(key)
            if node is None:
                node = nodes_by_key[key] = Node(key)
            nodes.append(node)
        known = 0
        for node in nodes:
            if node.run is None:
                break
            known += 1
        kinds = self._classify(nodes, known)
        self._learn(nodes, known, now)
        self._admit(nodes, kinds, now)
        self._since += len(keys)
        if self._since >= self._interval:
            self._since = 0.0
            self._fit()
        return kinds

    def _classify(self, nodes: list[Node], known: int) -> Kinds:
        if not known:
            return Kinds(0, NEW, NEW)
        last = nodes[known - 1]
        run = last.run
        assert run is not None
        if known > 1 and known >= run.end - 1:  # all but a last, partly filled block: the conversation goes on
            turn = min(run.turn + 1, TURNS)
            return Kinds(known, AGAIN + turn, NEW + turn)
        return Kinds(known, SHARED + min(3, last.uses.bit_length()), NEW)

    def _learn(self, nodes: list[Node], known: int, now: float) -> None:
        i = 0
        while i < known:
            run = nodes[i].run
            assert run is not None
            j = i + 1
            while j < known and nodes[j].run is run:
                j += 1
            self._used[run.kind][run.bucket] += j - i
            run.size -= j - i
            i = j
        for node in nodes[:known]:
            node.uses += 1

    def _admit(self, nodes: list[Node], kinds: Kinds, now: float) -> None:
        end = len(nodes)
        turn = kinds.new - NEW
        for first, last, kind in ((0, kinds.known, kinds.again), (kinds.known, end, kinds.new)):
            if first == last:
                continue
            members = nodes[first:last]
            run = Run(now, kind, members, turn, end)
            self._reached[kind][0] += run.size
            self._watched.put(run)
            self._runs.append(run)
            for node in members:
                node.run = run

    def _age(self, now: float) -> None:
        for run in self._watched.advance(now):
            self._reached[run.kind][run.bucket] += run.size
        runs = self._runs
        while runs and now - runs[0].time > self._horizon:
            run = runs.popleft()
            for node in run.members:
                if node.run is run:
                    del self._nodes[node.key]
            run.members = []
            run.size = 0

    def _fit(self) -> None:
        used, reached, edges = self._used, self._reached, self.ages.edges
        overall = [
            (sum(u) + 1.0) / (sum(r) + PRIOR)
            for u, r in zip(zip(*used, strict=True), zip(*reached, strict=True), strict=True)
        ]
        width = [edges[b + 1] - edges[b] for b in range(BUCKETS)]
        for kind in range(KINDS):
            p = [
                min(0.999, (u + PRIOR * o) / (r + PRIOR))
                for u, r, o in zip(used[kind], reached[kind], overall, strict=True)
            ]
            for b in range(BUCKETS):
                best = hits = time = 0.0
                left = 1.0
                for j in range(b, BUCKETS):
                    hits += left * p[j]
                    time += left * width[j] * (1 - p[j] / 2)
                    left *= 1 - p[j]
                    if hits > best * time:
                        best = hits / time
                self.worth[kind * BUCKETS + b] = best
            used[kind] = [v * self._keep for v in used[kind]]
            reached[kind] = [v * self._keep for v in reached[kind]]
        self.version += 1
