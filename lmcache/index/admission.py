"""What is worth writing to a tier: rules for `Index(admit=…)`. Asked once for each object that became ready in DRAM."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.eviction import Recent
from lmcache.index.state import Admit
from lmcache.plan import Name

SEEN = "seen"


class SecondSight:
    """While a tier has room, everything. When it is full, an object whose writing costs another its place: only what became
    ready before and so was evicted from DRAM, and computed again, since. (Most chunks of a prompt never come again.)

    Args:
        has_room: whether a tier can take an object without giving one up.
        memory: how many objects that were refused are remembered, at least; some times what the tier holds.
    """

    def __init__(self, has_room: Callable[[int], bool], memory: int) -> None:
        self._has_room = has_room
        self._seen = Recent(memory)

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        if self._has_room(tier) or self._seen.get(name.chain) is not None:
            return True
        self._seen.put(name.chain, SEEN)
        return False


class BreakEven:
    """Never what recomputes faster than it loads, at the rates measured so far; `inner` decides about the rest.

    Until both rates were measured, nothing is refused for their sake.
    """

    def __init__(self, object_bytes: Callable[[int], int], inner: Admit | None = None, *, weight: float = 0.1) -> None:
        self._bytes = object_bytes
        self._inner = inner
        self._weight = weight
        self._compute: float | None = None  # seconds per token
        self._load: dict[int, float] = {}  # tier → seconds per byte

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long."""
        if tokens > 0 and seconds > 0:
            self._compute = self._blend(self._compute, seconds / tokens)

    def loaded(self, tier: int, nbytes: int, seconds: float) -> None:
        """A load of so many bytes from a tier took so long."""
        if nbytes > 0 and seconds > 0:
            self._load[tier] = self._blend(self._load.get(tier), seconds / nbytes)

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        load = self._load.get(tier)
        slower = (
            load is not None
            and self._compute is not None
            and load * self._bytes(name.group) >= self._compute * name.tokens
        )
        if slower:
            return False
        return self._inner is None or self._inner(tier, name)

    def _blend(self, old: float | None, new: float) -> float:
        return new if old is None else old + self._weight * (new - old)
