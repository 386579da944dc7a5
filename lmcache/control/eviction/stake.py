"""How far an arena may depart from LRU's order, so that what can be lost by it has been earned before.

Beside the arena a list of names is kept, of what it *would* hold under LRU. A name of that list which the arena gave up
is *lent*: its slot went to something that LRU would not hold. Three things follow.

  * Evicting what LRU would not hold costs nothing, whatever comes. As long as something is lent, there is such a thing.
  * A name ceases to be lent when LRU would evict it too (the loan cost nothing), or when it is asked for (it cost one hit).
    So from any moment on, an arena that lends no more loses at most as many hits as it has lent.
  * What was gained and lost so far is known exactly: the hits of the arena against those of the list.

`account` is a share of LRU's hits, plus all that was gained, less all that was lost. With a `price` of 1, that is with no
more lent than there is in the account, the arena *cannot* have fewer hits than LRU less that share, whatever is asked for.
Most of what is lent is never asked for, though, and little could be lent at that price. So when there is experience enough
the price is what earlier loans did cost, and more (`lmcache.control.eviction.price`). From then on the bound is likely and not
proven: a load that for the first time wants at once what it long left alone, just before LRU would have evicted it, costs
more than there is in the account, once; after that the account has to be earned anew. No run of objects has more lent than
is left in the account, since objects of one request are lost together.

In large arenas all of this is done with a sample of the names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lmcache.control.eviction.history import History, Part
from lmcache.control.eviction.price import Price

INCOME = 0.005
"""Share of LRU's hits that may be lost. Where LRU cannot be beaten it is what the attempts cost."""


class Stake:
    """The account, and the names that are lent. LRU's list is `history`, supposing that what is asked for is there soon, as it is
    if each prompt is stored. `asked` first, then `left` and `returned` as the arena makes room.
    """

    __slots__ = ("_history", "_lent", "account", "capacity", "price")

    def __init__(self, history: History, capacity: float) -> None:
        """`capacity`: names that LRU would hold."""
        self.capacity = capacity
        self.account = 0.0
        self.price = Price(capacity)
        self._history = history
        self._lent: set[bytes] = set()

    def asked(self, names: list[bytes], hits: int, held: Sequence[Part], now: float) -> None:
        """A request for all of `names`, of which the arena holds the first `hits`, and LRU held the first, those `held`. They are
        in the history now.
        """
        lru_hits = sum([part.held for part in held])
        gain = hits - lru_hits
        if gain < 0 and names[hits] not in self._lent:  # it was not ready, or not wanted: that is not the order's doing
            gain = 0
        self.account = min(self.account + INCOME * min(hits, lru_hits) + gain, self.capacity)
        self.price.asked(len(names), held, self.capacity, now)
        lost = self._end(names)
        evicted = self._history.shrink(self.capacity)
        self.price.learn(lost, self._end(evicted), lru_hits, len(evicted), self.capacity)

    def affords(self, of_run: float) -> bool:
        """Whether one more may be lent, of a run of which `of_run` are gone already."""
        return self.loans(of_run) > 0

    def loans(self, of_run: float) -> int:
        """How many more may be lent, of a run of which `of_run` are gone already."""
        left = self.account - 1 - of_run - self.price.value * len(self._lent)
        return max(0, math.ceil(left / (1 + self.price.value)))  # each costs its price, and is gone too

    def holds(self, name: bytes) -> bool:
        """Whether LRU would hold it."""
        return self._history.holds(name)

    def left(self, names: list[bytes]) -> None:
        """The arena gave them up."""
        self._lent.update(self._history.held_of(names))

    def returned(self, names: list[bytes]) -> None:
        """The arena could not give them up after all."""
        self._lent.difference_update(names)

    def gone(self, names: list[bytes]) -> None:
        """They were dropped for another reason than room: LRU would not hold them either."""
        self._lent.difference_update(names)
        self._history.drop(names)

    def _end(self, names: list[bytes]) -> int:
        """Those of them that were lent are no longer: how many."""
        if not self._lent:
            return 0
        ended = self._lent.intersection(names)
        self._lent -= ended
        return len(ended)
