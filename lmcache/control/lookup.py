"""Finds the longest hit of a chain: its legal boundary, the place of each object, and why it ends.

Positions are chunk indices; boundaries are numbers of chunks: a hit of `n` chunks ends before chunk n. Boundary 0 (no hit) is
always legal. Legal boundaries depend only on which objects are present: each layer group has a rule, and the hit ends at the
largest boundary that is legal for all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from lmcache.control.extents import Extent, ExtentSlice
from lmcache.control.outcomes import StopReason
from lmcache.control.state import DRAM, State
from lmcache.plan import Chain
from lmcache.spec import HitRule

Longest = Callable[[int], int]
"""Boundary → the largest boundary up to it that is legal for one group."""


class FoundHit:
    """A hit, valid until the index changes.

    Attributes:
        chunks: its length, in chunks.
        limiter: the group that ends it, -1 if none does.
        needs: per group, positions of the objects that are needed.
        below: per group, position → tier of the needed objects that are not in DRAM.
    """

    __slots__ = ("_chain", "_slices_by_group", "_state", "below", "chunks", "limiter", "needs")

    def __init__(
        self,
        state: State,
        chain: Chain,
        chunks: int,
        limiter: int,
        below: list[dict[int, int]],
        slices_by_group: list[list[ExtentSlice] | None],
    ) -> None:
        self.chunks = chunks
        self.limiter = limiter
        self.needs = [needed(rule, chunks, state.chunk_tokens) for rule in state.rules]
        self.below = below
        self._state = state
        self._chain = chain
        self._slices_by_group = slices_by_group

    def extents(self, group: int) -> list[Extent]:
        """Returns extents of exactly the needed objects of a group that are in DRAM, in order; splits extents where it has to."""
        pool = self._state.pools[group]
        if not self._chain.linked:  # a name that occurs twice may split an extent that was returned for an earlier one
            pool.carve(self.slices(group))
        return pool.carve(self.slices(group))

    def slices(self, group: int) -> Iterable[ExtentSlice]:
        """Returns the needed objects of a group that are in DRAM, parents first; valid until the arena changes."""
        slices, stop = self._slices_by_group[group], self.chunks
        if slices is None:
            need, chain = self.needs[group], self._chain
            return self._state.pools[group].present(chain.namespace, as_list(chain), need.start, need.stop)
        if slices and slices[-1].start + slices[-1].size > stop:
            slices = [part._replace(size=min(part.size, stop - part.start)) for part in slices if part.start < stop]
        return slices

    def resident(self, group: int) -> int:
        """Returns how many leading objects of the chain are in DRAM; 0 if the first is not needed."""
        need = self.needs[group]
        return min(self.below[group], default=need.stop) if 0 in need else 0


def find(state: State, chain: Chain, limit: int, *, near: int | None = None) -> FoundHit:
    """Returns the longest hit of at most `limit` chunks that is legal for every group. Does not modify the state.

    With `near`, chunks from this position on count only if they are in DRAM.
    """
    dram_from = limit if near is None else near
    longests: list[Longest] = []
    below: list[dict[int, int]] = []
    slices_by_group: list[list[ExtentSlice] | None] = []
    for group, rule in enumerate(state.rules):
        places: dict[int, int] = {}
        below.append(places)
        if rule.kind == "all":
            slices, count = _prefix(state, chain, limit, group, dram_from, places)
            longests.append(partial(min, count))
            # Unlinked digests may repeat, in any order: their slices are looked up again when they are used.
            slices_by_group.append(slices if chain.linked else None)
        else:
            longests.append(_sparse_longest(state, chain, group, places, dram_from))
            slices_by_group.append(None)
    chunks, limiter = fixpoint(longests, limit)
    hit = FoundHit(state, chain, chunks, limiter, below, slices_by_group)
    for group, places in enumerate(below):
        if places:
            need = hit.needs[group]
            below[group] = {i: place for i, place in places.items() if place != DRAM and i in need}
    return hit


def as_list(chain: Chain) -> list[bytes]:
    """Returns the digests as a list, so that a slice of them compares equal to a slice of another list."""
    return chain.digests if isinstance(chain.digests, list) else list(chain.digests)


def _prefix(
    state: State, chain: Chain, limit: int, group: int, dram_from: int, below: dict[int, int]
) -> tuple[list[ExtentSlice], int]:
    """Returns the slices in DRAM of a chain's prefix, and its length: the number of objects before the first that is absent.

    Adds to `below` the position and tier of those that are not in DRAM. In DRAM, the cost is per extent, not per object.
    """
    pool, digests = state.pools[group], as_list(chain)
    slices = list(pool.walk(chain.namespace, digests, 0, limit))
    count = slices[-1].start + slices[-1].size if slices else 0
    if count < min(limit, dram_from) and state.directories:
        full = state.jobs.everyone
        tiers = [directory.masks(chain.namespace, group) for directory in state.directories]
        while count < min(limit, dram_from):
            source = next((t for t, masks in enumerate(tiers) if masks.get(digests[count]) == full), None)
            if source is None:
                break
            below[count] = source
            count += 1
            for part in pool.walk(chain.namespace, digests, count, limit):
                slices.append(part)
                count += part.size
    return slices, count


def _sparse_longest(state: State, chain: Chain, group: int, seen: dict[int, int], dram_from: int) -> Longest:
    """Returns the `Longest` of a group that needs few objects of a hit.

    It looks up only those, and adds position and place of each one found to `seen`.
    """
    rule = state.rules[group]

    def present(i: int) -> bool:
        if i in seen:
            return True
        source = state.source(chain.namespace, chain.digests[i], group, chain.depth(i))
        if source is None or (source != DRAM and i >= dram_from):
            return False
        seen[i] = source
        return True

    return lambda n: longest(rule, n, state.chunk_tokens, present)


def consecutive(positions: Iterable[int]) -> list[tuple[int, int]]:
    """Returns [first, last) of each run of consecutive numbers among ascending positions."""
    ranges: list[tuple[int, int]] = []
    for i in positions:
        if ranges and ranges[-1][1] == i:
            ranges[-1] = ranges[-1][0], i + 1
        else:
            ranges.append((i, i + 1))
    return ranges


def by_tier(state: State, hit: FoundHit) -> dict[str, int]:
    """Returns the tokens of a hit per source, "dram" or a tier's name.

    A chunk counts for the farthest source of its objects. Chunks of which no object is needed (those before the window of
    sliding layers) count for the farthest source of the whole hit.
    """
    farthest = [-2] * hit.chunks
    for need, below in zip(hit.needs, hit.below, strict=True):
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
    state: State, chain: Chain, hit: FoundHit, limit: int, max_tokens: int, late: bool
) -> tuple[StopReason, str]:
    """Returns why the hit ends, and, for `StopReason.GROUP`, the name of the group that ends it. `late`: a probe was late."""
    if hit.chunks == limit:
        if limit < len(chain.digests):
            return StopReason.MAX_TOKENS, ""
        return (StopReason.END if max_tokens <= limit * state.chunk_tokens else StopReason.TAIL), ""
    group = hit.limiter
    if state.rules[group].kind != "all":
        return StopReason.GROUP, state.names[group]
    digest = chain.digests[hit.chunks]
    pool = state.pools[group]
    if pool.find(chain.namespace, digest, chain.depth(hit.chunks)) is not None:
        return StopReason.WRITING, ""
    return pool.gone.get(digest) or (StopReason.LATE if late else StopReason.ABSENT), ""


# ---------------------------------------------------------------- legal boundaries


def needed(rule: HitRule, chunks: int, chunk_tokens: int) -> range:
    """Returns the positions of the objects that a hit of `chunks` chunks needs from a group."""
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
    """Returns the largest boundary ≤ `chunks` for which every needed object is present. O(chunks) calls of `present`."""
    if rule.kind == "all":
        return next((i for i in range(chunks) if not present(i)), chunks)
    while chunks:
        # A missing object rules out every boundary after it up to this one: each of them needs the object.
        # (trailing: windows that end in between all cover it; state_at: there is none in between; whole: always.)
        missing = next((i for i in reversed(needed(rule, chunks, chunk_tokens)) if not present(i)), None)
        if missing is None:
            return chunks
        chunks = missing
    return 0


def fixpoint(groups: Sequence[Longest], chunks: int) -> tuple[int, int]:
    """Returns the largest boundary ≤ `chunks` legal for every group, and the group that lowered it last (-1: none did).

    Each pass can only lower the boundary, and a boundary that no group lowers is legal for all of them, so this terminates
    with the largest.
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
