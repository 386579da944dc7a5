"""What a loan is reckoned to cost (see `lmcache.control.eviction.stake`): one hit, until it is known better.

Two things are learnt. How many of the earlier loans were asked for, in the mean; and how bad it can get at once, for what
is lent together may be lost together. That shows without any loans: it is how much of what was asked for within a short
time LRU had long held.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from lmcache.control.eviction.history import Part

EXPERIENCE = 1500
"""Requests until what was learnt is believed. With none, traces are known that lose 3 % by it."""
GENERATIONS = 5
"""How often LRU has to have given up as much as it holds, too: how a loan ends is known when LRU's turn has come, and the
fewer times it came, the more there is to lose, measured by all that was hit."""
LEAST = 0.1
"""Share of what is lent that is reckoned to be lost if none ever was."""
CAUTION = 2.0
"""What more is reckoned to be lost, in multiples of the share of earlier loans that was."""
PRIOR = 200.0
"""Loans for which the chance to be asked for of all that LRU holds stands in, while there are few."""
WINDOW = 0.25
"""A short time: until that share of what LRU holds has been asked for. What is older has been held for long."""
WINDOWS = 32
"""How many of these times are remembered."""
SURGE = 0.75
"""What is reckoned to be lost at least, in multiples of the greatest share that what was long held had in any of them."""


class Price:
    """`value`: of each loan, in hits."""

    __slots__ = (
        "_asked_for",
        "_evicted",
        "_forget",
        "_loans",
        "_long",
        "_lost",
        "_number",
        "_old",
        "_seen",
        "_since",
        "_surges",
        "_uses",
        "value",
    )

    def __init__(self, capacity: float) -> None:
        """`capacity`: names that LRU would hold."""
        self.value = 1.0
        self._number = 0  # of requests
        self._evicted = 0  # by LRU, ever
        self._forget = 0.5 ** (1 / max(1000.0, capacity))
        self._loans = self._lost = 0.0  # that ended, and of these that were asked for; slowly forgotten
        self._uses = self._asked_for = 0.0  # the same for all that LRU held
        self._seen = self._old = 0  # names of this window, and those of them that LRU had held since before the last
        self._since = self._long = -math.inf  # when the last window began, and the one before
        self._surges: deque[float] = deque([0.0], WINDOWS)

    def asked(self, size: int, held: Sequence[Part], capacity: float, now: float) -> None:
        """A request for `size` names, which LRU held in part."""
        self._number += 1
        self._seen += size
        for part in held:
            if part.stretch.time <= self._long:
                self._old += part.held
        if self._seen >= WINDOW * capacity:
            self._surges.append(self._old / self._seen)
            self._seen = self._old = 0
            self._long, self._since = self._since, now

    def learn(self, lost: int, ended: int, used: int, evicted: int, capacity: float) -> None:
        """Of the loans `lost` were asked for and `ended` were not; of all that LRU held `used` and `evicted`."""
        keep = self._forget ** (used + evicted)
        self._uses = self._uses * keep + used + evicted
        self._asked_for = self._asked_for * keep + used
        keep = self._forget ** (lost + ended)
        self._loans = self._loans * keep + lost + ended
        self._lost = self._lost * keep + lost
        self._evicted += evicted
        if self._number <= EXPERIENCE or self._evicted < GENERATIONS * capacity:
            return
        general = (self._asked_for + 1) / (self._uses + 1)
        rate = (self._lost + PRIOR * general) / (self._loans + PRIOR)
        self.value = min(1.0, max(LEAST + CAUTION * rate, SURGE * max(self._surges)))
