"""What is worth writing to a tier: rules for `Index(admit=…)`. Asked once for each object that became ready in DRAM.

A rule that has a method `asked` is also told of every request, once: see `Learns`.
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
"""Whether a tier can take an object without giving one up."""

MEMORY = 8
"""How many objects a rule remembers to have seen, in multiples of what the tier holds."""

MOST = 1 << 21
"""Objects remembered at most: 8 MiB, and enough for a disk of 250 thousand."""

SAMPLE = 4096
"""Names a shadow holds, at most."""

WARM_UP = 1.5
"""Turnovers of a write-through tier before there is a verdict: once it is full, and what follows has had time to matter."""

_ASKS = 4
"""Requests remembered as told: an engine that asks whether a prompt is there and then loads it has one request."""


class Learns(Protocol):
    """A rule that wants to know what is asked for."""

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """A request for this chain; the first `near` of it are in DRAM, the first `found` in some place."""

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""


class SecondHit:
    """While a tier has room, everything. When it is full, an object whose writing costs another its place: only what became
    ready before and so was evicted from DRAM, and computed again, since. (Most chunks of a prompt never come again.)

    Args:
        has_room: see there.
        capacities: objects that the tiers which have a bound hold; those without one get everything.
    """

    def __init__(self, has_room: HasRoom, capacities: Mapping[int, int]) -> None:
        self._has_room = has_room
        self._seen = {tier: BloomFilter(min(MOST, MEMORY * objects)) for tier, objects in capacities.items()}

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        marks = self._seen.get(tier)
        if marks is None:
            return True
        seen = marks.add(name.chain, name.group)
        return seen or self._has_room(tier)


class Adaptive:
    """Everything, or by the second sight: whichever was measured to find more of late; at equal hits, that which writes less.

    Both are followed by shadows of the tier that see what is really asked for. So a small disk is not washed out by chunks
    that never come again, and a large one, where they do come, takes them in. Until the shadows have been filled and
    turned over by half, it is everything.

    Args:
        has_room: see there.
        capacities: chunks, that is, objects of one group.
        group: the layer group whose objects the shadows follow; all `groups` have the same verdict.
        sample: names a shadow holds, at most.
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
        self._told: dict[tuple[bytes, int], None] = {}

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """See `Learns`."""
        about = digests[-1], len(digests)
        if about in self._told:
            return
        self._told[about] = None
        if len(self._told) > _ASKS:
            del self._told[next(iter(self._told))]
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
        """Whether a full tier takes in only what is seen again, at present."""
        trial = self._trials.get(tier)
        return trial is not None and trial.choosy


class _Trial:
    """The two shadows of one tier."""

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
        hits = [shadow.request(rest) for shadow in both]
        for shadow, first in zip(both, hits, strict=True):  # what is loaded now, a tier without it would see computed
            for digest in rest[first:loaded]:
                shadow.ready(digest)
        common = near * self._share / 65536
        if rest or common:
            self._verdict.see(common + hits[0], common + hits[1])

    def ready(self, digest: bytes) -> None:
        if self._share == 65536 or sampled(digest, self._share):
            self._everything.ready(digest)
            self._some.ready(digest)


class BreakEven:
    """Never what recomputes faster than it loads, at the rates measured so far; `inner` decides about the rest.

    A rate is the median of the last measurements, of which there must be some, so that one slow read changes nothing. What
    begins at `START` times break-even ends at break-even. Of what is refused, now and then the beginning of what is new of a
    prompt is let through all the same: without anything to load, nobody would find out that the tier has become faster.
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
        self._next: dict[tuple[int, int], int] = {}  # depth at which the same stretch of a prompt would go on

    def computed(self, tokens: int, seconds: float) -> None:
        """A prefill of so many tokens took so long."""
        if tokens > 0 and seconds > 0:
            self._compute.append(seconds / tokens)

    def loaded(self, tier: int, nbytes: int, seconds: float) -> None:
        """A load of so many bytes from a tier took so long."""
        if nbytes > 0 and seconds > 0:
            self._load.setdefault(tier, deque(maxlen=self.LAST)).append(seconds / nbytes)

    def asked(self, digests: Sequence[bytes], near: int, found: int) -> None:
        """See `Learns`."""
        inner = getattr(self._inner, "asked", None)
        if inner is not None:
            inner(digests, near, found)

    def __call__(self, tier: int, name: Name) -> bool:
        """See `Admit`."""
        stretch = tier, name.group
        begins = name.depth != self._next.get(stretch)  # not depth 0: what many prompts begin with is never new again
        self._next[stretch] = name.depth + 1
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
