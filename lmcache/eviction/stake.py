"""How far another order than LRU's may be followed, so that little can be lost by it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

INCOME = 0.005
CREDIT = 0.7
PRIOR = 50.0
CAUTION = 2.0
CLUMP = 1.0
FLOOR = 0.02


class Stake:
    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.names: OrderedDict[Hashable, float] = OrderedDict()
        self.lent: set[Hashable] = set()
        self.account = 0.0
        self.room = 0.0
        self.since = -1.0
        self._lost = 0.0
        self.q = 1.0
        self._ended = 0.0
        self._kept = 0.0
        self._gone = 0.0
        self._forget = 0.5 ** (1 / max(1000, capacity))
        self.log = None

    def ask(self, keys: Sequence[Hashable], hits: int, now: float) -> None:
        names, lent = self.names, self.lent
        would = 0
        for key in keys:
            if key not in names:
                break
            would += 1
        gain = hits - would
        self.account = min(self.account + INCOME * would + (gain * CREDIT if gain > 0 else gain), self.capacity)
        lost = 0
        for key in reversed(keys):
            if key in lent:
                lent.remove(key)
                lost += 1
            names[key] = now
            names.move_to_end(key)
        gone = back = 0
        capacity = self.capacity
        while len(names) > capacity:
            key, _ = names.popitem(last=False)
            gone += 1
            if key in lent:
                lent.remove(key)
                back += 1
        if len(names) + 1 > capacity:
            self.since = names[next(iter(names))]
        n = back + lost
        if n:
            keep = self._forget ** n
            self._lost = self._lost * keep + lost
            self._ended = self._ended * keep + n
        keep = self._forget ** (gone + would)
        self._kept = self._kept * keep + would
        self._gone = self._gone * keep + gone + would
        self.price()

    def price(self) -> None:
        general = (self._kept + 1) / (self._gone + 1)
        rate = (self._lost + PRIOR * general) / (self._ended + PRIOR)
        self.q = q = min(1.0, CAUTION * rate + FLOOR)
        self.room = 0.0

    def affords(self, size: int) -> bool:
        return self.q * len(self.lent) + CLUMP * size < self.account

    def left(self, key: Hashable) -> None:
        if key in self.names:
            self.lent.add(key)

    def back(self, key: Hashable) -> None:
        self.lent.discard(key)
