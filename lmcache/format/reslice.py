"""Assembles objects from those of other ranks: KV written with another tensor-parallel size, re-sliced by heads.

Chain digests do not depend on the rank (the rect is part of the object's id, not of the chain), so an object of heads [a, b)
can be cut from, or assembled from, the objects of any other split of the same heads. An assembled object is not bit for bit
what *this* split would have computed, so this is done only where sharing is semantic, and only for objects that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout
from lmcache.layout.objects import canonical_views
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Result, Tier


class Piece(NamedTuple):
    """An object of another rank, whose heads `take` become heads `put` of the assembled object."""

    rect: Rect
    take: slice
    put: slice


Load = Callable[[KVSpec, Tier, ObjectId, torch.Tensor, float | None], Result]
"""(spec of the other rank, tier, id, buffer, deadline): reads and verifies an object in canonical order into the buffer."""


def splits(spec: KVSpec, group: int) -> Iterator[list[Piece]]:
    """Yields every other even split of a group's heads, as the pieces that cover this rank's heads; fewest pieces first."""
    mine = spec.rects[group]
    low, high = mine.heads
    total = spec.groups[group].kv_heads
    for parts in (n for n in range(1, total + 1) if total % n == 0):
        size = total // parts
        pieces = []
        for first in range(low // size * size, high, size):
            rect = Rect(mine.layers, (first, first + size))
            begin, end = max(low, first), min(high, first + size)
            pieces.append(Piece(rect, slice(begin - first, end - first), slice(begin - low, end - low)))
        if pieces[0].rect != mine:
            yield pieces


def contains(
    spec: KVSpec, tier: Tier, ids: Sequence[ObjectId], results: list[Result], deadline: float | None
) -> list[Result]:
    """Returns `results` of `tier.contains(ids)`, with missing objects marked `OK` if another split has all pieces."""
    found = list(results)
    for i, (id, result) in enumerate(zip(ids, results, strict=True)):
        if result.status is not Status.MISSING:
            continue
        for pieces in splits(spec, id.group):
            parts = tier.contains([id._replace(rect=piece.rect) for piece in pieces], deadline=deadline)
            if all(part.status is Status.OK for part in parts):
                found[i] = Result(Status.OK)
                break
    return found


def assemble(spec: KVSpec, tier: Tier, id: ObjectId, out: torch.Tensor, load: Load, deadline: float | None) -> Result:
    """Fills `out` (uint8, canonical order) from other ranks' objects.

    Returns:
        `OK`; `MISSING` if no split is complete; or the result of the last piece that failed to load.
    """
    last = Result(Status.MISSING)
    for pieces in splits(spec, id.group):
        parts = tier.contains([id._replace(rect=piece.rect) for piece in pieces], deadline=deadline)
        if any(part.status is not Status.OK for part in parts):
            continue
        moved = 0
        for piece in pieces:
            rects = (*spec.rects[: id.group], piece.rect, *spec.rects[id.group + 1 :])
            other = KVSpec(spec.model, spec.groups, rects, spec.numerics)
            theirs = ObjectLayout.canonical(other, id.group, id.tokens)
            buffer = torch.empty(theirs.nbytes, dtype=torch.uint8)
            last = load(other, tier, id._replace(rect=piece.rect), buffer, deadline)
            if last.status is not Status.OK:
                break
            moved += last.nbytes
            _copy_heads(buffer, theirs, piece.take, out, ObjectLayout.canonical(spec, id.group, id.tokens), piece.put)
        else:
            return Result(Status.OK, moved)
    return last


def _copy_heads(
    src: torch.Tensor, theirs: ObjectLayout, take: slice, dst: torch.Tensor, ours: ObjectLayout, put: slice
) -> None:
    target = canonical_views(dst, ours)
    for name, source in canonical_views(src, theirs).items():
        target[name][:, :, put].copy_(source[:, :, take])
