"""The longest hit of a chain: which chunk boundaries are legal, where each object lies, and why the hit ends.

Positions are chunk indices, boundaries count chunks: a hit of `n` chunks ends before chunk n. Boundary 0 (no hit) is always
legal. Which boundaries are legal is a pure function of which objects are present: one rule per layer group, and the fixpoint
over all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lmcache.control.extents import ExtentSlice
from lmcache.control.outcomes import StopReason
from lmcache.control.state import DRAM, State
from lmcache.plan import Chain
from lmcache.spec import HitRule

Longest = Callable[[int], int]
"""Largest boundary ≤ the given one that is legal for one group."""


class Found:
    """A hit of `chunks` chunks. `below[group]`: position → tier, for those objects in `needs[group]` that are not in DRAM."""

    __slots__ = ("_chain", "_state", "_walked", "below", "chunks", "limiter", "needs")

    def __init__(
        self,
        state: State,
        chain: Chain,
        chunks: int,
        limiter: int,
        below: list[dict[int, int]],
        walked: list[list[ExtentSlice] | None],
    ) -> None:
        self.chunks = chunks
        self.limiter = limiter
        self.needs = [needed(rule, chunks, state.chunk_tokens) for rule in state.rules]
        self.below = below
        self._state = state
        self._chain = chain
        self._walked = walked

    def slices(self, group: int) -> Iterable[ExtentSlice]:
        """Where the needed objects of a group that are in DRAM lie, parents first; to be used before the arena changes."""
        walked, stop = self._walked[group], self.chunks
        if walked is None:
            need, chain = self.needs[group], self._chain
            return self._state.pools[group].present(chain.namespace, listed(chain), need.start, need.stop)
        if walked and walked[-1].start + walked[-1].size > stop:
            walked = [part._replace(size=min(part.size, stop - part.start)) for part in walked if part.start < stop]
        return walked

    def resident(self, group: int) -> int:
        """How many objects from the first one of the chain on are in DRAM, in a row; 0 if the first is not needed."""
        need = self.needs[group]
        return min(self.below[group], default=need.stop) if 0 in need else 0


def find(state: State, chain: Chain, limit: int, *, near: int | None = None) -> Found:
    """The longest hit of at most `limit` chunks that is legal for every group. Changes nothing.

    With `near`, chunks from this position on count only if they are in DRAM.
    """
    distant = limit if near is None else near
    longests: list[Longest] = []
    below: list[dict[int, int]] = []
    walked: list[list[ExtentSlice] | None] = []
    for group, rule in enumerate(state.rules):
        places: dict[int, int] = {}
        below.append(places)
        if rule.kind == "all":
            parts, count = _prefix(state, chain, limit, group, distant, places)
            longests.append(partial(min, count))
            # Names that mean something each on their own may repeat or come in any order: they are looked up anew.
            walked.append(parts if chain.linked else None)
        else:
            longests.append(_seeker(state, chain, group, places, distant))
            walked.append(None)
    chunks, limiter = fixpoint(longests, limit)
    found = Found(state, chain, chunks, limiter, below, walked)
    for group, places in enumerate(below):
        if places:
            need = found.needs[group]
            below[group] = {i: place for i, place in places.items() if place != DRAM and i in need}
    return found


def listed(chain: Chain) -> list[bytes]:
    """Its digests as a list, which slices of lists compare with."""
    return chain.digests if isinstance(chain.digests, list) else list(chain.digests)


def _prefix(
    state: State, chain: Chain, limit: int, group: int, distant: int, below: dict[int, int]
) -> tuple[list[ExtentSlice], int]:
    """Where the first objects of a chain lie in DRAM, and how many there are up to the first that cannot be had. Notes in
    `below` which come from a tier. A few steps per extent where all is in DRAM.
    """
    pool, digests = state.pools[group], listed(chain)
    parts = list(pool.walk(chain.namespace, digests, 0, limit))
    count = parts[-1].start + parts[-1].size if parts else 0
    if count < min(limit, distant) and state.directories:
        full = state.jobs.everyone
        tiers = [known.masks(chain.namespace, group) for known in state.directories]
        while count < min(limit, distant):
            source = next((t for t, masks in enumerate(tiers) if masks.get(digests[count]) == full), None)
            if source is None:
                break
            below[count] = source
            count += 1
            for part in pool.walk(chain.namespace, digests, count, limit):
                parts.append(part)
                count += part.size
    return parts, count


def _seeker(state: State, chain: Chain, group: int, seen: dict[int, int], distant: int) -> Longest:
    rule = state.rules[group]

    def present(i: int) -> bool:
        if i in seen:
            return True
        source = state.source(chain.namespace, chain.digests[i], group, chain.depth(i))
        if source is None or (source != DRAM and i >= distant):
            return False
        seen[i] = source
        return True

    return lambda n: longest(rule, n, state.chunk_tokens, present)


def stretches(positions: Iterable[int]) -> list[tuple[int, int]]:
    """[first, last) of each stretch of neighbours among rising positions."""
    found: list[tuple[int, int]] = []
    for i in positions:
        if found and found[-1][1] == i:
            found[-1] = found[-1][0], i + 1
        else:
            found.append((i, i + 1))
    return found


def by_tier(state: State, found: Found) -> dict[str, int]:
    """Tokens of a hit per source. A chunk counts for the farthest place that one of its objects comes from; chunks of
    which nothing is needed (before the window of sliding layers) count for the farthest place of the whole hit.
    """
    farthest = [-2] * found.chunks
    for need, below in zip(found.needs, found.below, strict=True):
        for i in need:
            farthest[i] = max(farthest[i], below.get(i, DRAM))
    rest = max(farthest, default=DRAM)
    tokens: dict[str, int] = {}
    for place in farthest:
        t = rest if place == -2 else place
        where = "dram" if t < 0 else state.tiers[t].name
        tokens[where] = tokens.get(where, 0) + state.chunk_tokens
    return tokens


def stop_of(
    state: State, chain: Chain, found: Found, limit: int, max_tokens: int, late: bool
) -> tuple[StopReason, str]:
    """Why the hit ends where it ends; for `StopReason.GROUP` also which group ends it."""
    if found.chunks == limit:
        if limit < len(chain.digests):
            return StopReason.MAX_TOKENS, ""
        return (StopReason.END if max_tokens <= limit * state.chunk_tokens else StopReason.TAIL), ""
    group = found.limiter
    if state.rules[group].kind != "all":
        return StopReason.GROUP, state.names[group]
    digest = chain.digests[found.chunks]
    pool = state.pools[group]
    if pool.find(chain.namespace, digest, chain.depth(found.chunks)) is not None:
        return StopReason.WRITING, ""
    return pool.gone.get(digest) or (StopReason.LATE if late else StopReason.ABSENT), ""


# ---------------------------------------------------------------- legal boundaries


def needed(rule: HitRule, chunks: int, chunk_tokens: int) -> range:
    """Positions of the objects that a hit of `chunks` chunks needs of a group."""
    if chunks == 0:
        return range(0)
    if rule.kind == "all":
        return range(chunks)
    if rule.kind == "trailing":
        return range(max(0, chunks - -(-rule.window // chunk_tokens)), chunks)
    if rule.kind == "state_at":
        return range(chunks - 1, chunks)
    return range(1)


def longest(rule: HitRule, chunks: int, chunk_tokens: int, present: Callable[[int], bool]) -> int:
    """Largest boundary ≤ `chunks` for which every needed object is present. O(chunks) calls of `present`."""
    if rule.kind == "all":
        return next((i for i in range(chunks) if not present(i)), chunks)
    while chunks:
        # A missing object rules out every boundary from the one just after it up to this one: each of them needs it.
        # (trailing: windows that end in between all cover it; state_at: there is none in between; whole: always.)
        missing = next((i for i in reversed(needed(rule, chunks, chunk_tokens)) if not present(i)), None)
        if missing is None:
            return chunks
        chunks = missing
    return 0


def fixpoint(groups: Sequence[Longest], chunks: int) -> tuple[int, int]:
    """Largest boundary ≤ `chunks` legal for every group, and the group that lowered it last (−1: none did).

    Each pass can only lower the boundary, and a boundary no group lowers is legal for all; so it ends, at the largest.
    """
    limiter = -1
    while True:
        before = chunks
        for group, shorten in enumerate(groups):
            after = shorten(chunks)
            if after < chunks:
                chunks, limiter = after, group
        if chunks == before:
            return chunks, limiter
