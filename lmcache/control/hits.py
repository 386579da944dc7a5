"""Which chunk boundaries are legal hits: one rule per layer group, and the fixpoint over all groups.

Positions are chunk indices, boundaries count chunks: a hit of `n` chunks ends before chunk n. Boundary 0 (no hit) is
always legal. Everything here is a pure function of which objects are present.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lmcache.spec import HitRule

Longest = Callable[[int], int]
"""Largest boundary ≤ the given one that is legal for one group."""


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
