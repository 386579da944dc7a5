"""Admission rules: which objects are written to a tier, for `Index(admit=…)`. Called once per object that became ready in DRAM.

If a rule has a method `asked`, that is called once per request: see `Learns`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol

from lmcache.control.admission.ghost import BloomFilter, GhostCache, Verdict, sampled
from lmcache.control.state import Admit
from lmcache.plan import Name

HasRoom = Callable[[int], bool]
"""Tier → whether it can store an object without evicting one."""

MEMORY = 8
"""Number of objects that a rule remembers as seen, in multiples of the tier's capacity."""

MOST = 1 << 21
"""Most objects remembered as seen: 8 MiB, enough for a tier of 250 thousand objects."""

SAMPLE = 4096
"""Most digests of a ghost cache."""

WARM_UP = 1.5
"""Objects written to the write-through ghost cache before the verdict counts, in multiples of its capacity: it has been full
for a while, so that evictions have had an effect."""

_REMEMBERED_REQUESTS = 4
"""Most recent requests, of which repetitions are ignored: a lookup and the load that follows it are one request."""


class Learns(Protocol):
    """A rule that learns from requests."""

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """Called for each request. Of the digests of its chain, the first `near` are in DRAM, the first `found` in some place."""

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""


class SecondHit:
    """Admits everything while a tier has room. When it is full, only objects that became ready before.

    Those were evicted from DRAM and computed again since; most chunks of prompts never recur, and would evict others.

    Args:
        has_room: see `HasRoom`.
        capacities: objects that fit into each tier that has a limit; the other tiers get everything.
    """

    def __init__(self, has_room: HasRoom, capacities: Mapping[int, int]) -> None:
        self._has_room = has_room
        self._seen = {tier: BloomFilter(min(MOST, MEMORY * objects)) for tier, objects in capacities.items()}

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        bloom = self._seen.get(tier)
        if bloom is None:
            return True
        seen = bloom.add(name.chain, name.group)
        return seen or self._has_room(tier)


class Adaptive:
    """Admits everything, or as `SecondHit`: whichever has had more hits lately; at equal hits, `SecondHit`, which writes less.

    The hits of both are measured with ghost caches of the tier that receive the actual requests. So chunks that never recur
    do not flush a small disk, and a large one, on which they recur before they are evicted, stores them. Admits everything
    until the ghost caches are warm (`WARM_UP`).

    Args:
        has_room: see `HasRoom`.
        capacities: chunks (objects of one group) that fit into each tier that has a limit.
        group: the layer group whose objects the ghost caches follow; the verdict holds for all `groups`.
        sample: most digests of a ghost cache.
    """

    def __init__(
        self,
        has_room: HasRoom,
        capacities: Mapping[int, int],
        *,
        group: int = 0,
        groups: int = 1,
        sample: int = SAMPLE,
    ) -> None:
        self._second = SecondHit(has_room, {tier: chunks * groups for tier, chunks in capacities.items()})
        self._group = group
        self._trials = {tier: _Trial(max(1, objects), sample) for tier, objects in capacities.items()}
        self._observed: dict[tuple[bytes, int], None] = {}

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """See `Learns`."""
        request = digests[-1], len(digests)
        if request in self._observed:
            return
        self._observed[request] = None
        if len(self._observed) > _REMEMBERED_REQUESTS:
            del self._observed[next(iter(self._observed))]
        for trial in self._trials.values():
            trial.asked(digests, near, found)

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        trial = self._trials.get(tier)
        if trial is None:
            return True
        if name.group == self._group:
            trial.ready(name.chain)
        return self._second(tier, name) or not trial.choosy

    def choosy(self, tier: int) -> bool:
        """Whether the rule is `SecondHit` for this tier at present."""
        trial = self._trials.get(tier)
        return trial is not None and trial.choosy


class _Trial:
    """The two ghost caches of one tier."""

    def __init__(self, capacity: int, sample: int) -> None:
        self._share = 65536 if capacity <= sample else max(1, 65536 * sample // capacity)
        size = max(1, capacity * self._share // 65536)
        self._everything = GhostCache(size)
        self._some = GhostCache(size, max(1, min(MEMORY * size, MOST * size // capacity)))
        self._warm = WARM_UP * size
        self._verdict = Verdict()

    @property
    def choosy(self) -> bool:
        return self._verdict.choosy and self._everything.written >= self._warm

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        rest, loaded = digests[near:], max(0, found - near)
        if self._share < 65536:
            picked = [i for i, digest in enumerate(rest) if sampled(digest, self._share)]
            rest, loaded = [rest[i] for i in picked], bisect_left(picked, loaded)
        both = self._everything, self._some
        hits = [ghost.request(rest) for ghost in both]
        for ghost, first in zip(both, hits, strict=True):  # with this rule, the engine would compute these
            for digest in rest[first:loaded]:
                ghost.ready(digest)
        common = near * self._share / 65536
        if rest or common:
            self._verdict.see(common + hits[0], common + hits[1])

    def ready(self, digest: bytes) -> None:
        if self._share == 65536 or sampled(digest, self._share):
            self._everything.ready(digest)
            self._some.ready(digest)


class BreakEven:
    """Refuses objects that are slower to load than to recompute, at the measured rates; `inner` decides about the others.

    A rate is the median of the last `LAST` measurements, of which there must be `FEW`, so that one slow read has no effect.
    Refusal begins when loading takes `START` times as long as recomputing, and ends when loading is faster (hysteresis). After
    `EVERY` refusals, the next `TRIED` objects from the first new chunk of a prompt on are admitted all the same: without
    loads, the rule could not measure that the tier has become faster.
    """

    START = 1.25
    LAST, FEW = 15, 5
    EVERY, TRIED = 1024, 32

    def __init__(self, object_bytes: Callable[[int], int], inner: Admit | None = None) -> None:
        self._bytes = object_bytes
        self._inner = inner
        self._compute: deque[float] = deque(maxlen=self.LAST)  # seconds per token
        self._load: dict[int, deque[float]] = {}  # tier → seconds per byte
        self._slower: dict[tuple[int, int], bool] = {}
        self._refused: dict[int, int] = {}
        self._next: dict[tuple[int, int], int] = {}  # (tier, group) → depth of the next object of the same prompt

    def computed(self, tokens: int, seconds: float) -> None:
        """Adds a measurement: a prefill of `tokens` took `seconds`."""
        if tokens > 0 and seconds > 0:
            self._compute.append(seconds / tokens)

    def loaded(self, tier: int, nbytes: int, seconds: float) -> None:
        """Adds a measurement: a load of `nbytes` from a tier took `seconds`."""
        if nbytes > 0 and seconds > 0:
            self._load.setdefault(tier, deque(maxlen=self.LAST)).append(seconds / nbytes)

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """See `Learns`."""
        inner = getattr(self._inner, "asked", None)
        if inner is not None:
            inner(digests, near, found)

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        key = tier, name.group
        begins = name.depth != self._next.get(key)  # not `depth == 0`: a common prefix is present already
        self._next[key] = name.depth + 1
        wanted = self._inner is None or self._inner(tier, name)
        if not wanted or not self._is_slower(tier, name):
            return wanted
        refused = self._refused.get(tier, 0)
        if refused >= self.EVERY and (refused > self.EVERY or begins):
            refused += 1
            self._refused[tier] = 0 if refused >= self.EVERY + self.TRIED else refused
            return True
        self._refused[tier] = min(refused + 1, self.EVERY)
        return False

    def _is_slower(self, tier: int, name: Name) -> bool:
        load = self._load.get(tier, ())
        if len(load) < self.FEW or not self._compute:
            return False
        ratio = median(load) * self._bytes(name.group) / (median(self._compute) * name.tokens)
        key = tier, name.group
        slower = ratio >= (1.0 if self._slower.get(key, False) else self.START)
        self._slower[key] = slower
        return slower
