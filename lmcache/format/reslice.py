"""Objects put together from those of other ranks: KV that was written with another tensor-parallel size, re-sliced by heads.

Names do not depend on the rank (the rectangle is a part of the object's id, not of the chain), so an object of heads [a, b)
can be cut out of, or put together from, the objects of any split of the same heads. What is put together is not what *this*
split would have computed, to the last bit: it is done where sharing is semantic, and only for what is not there as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Result, Tier


class Piece(NamedTuple):
    """An object of another rank, and which of its heads are wanted: `take` of it go to `put` of ours."""

    rect: Rect
    take: slice
    put: slice


Load = Callable[[KVSpec, Tier, ObjectId, torch.Tensor, float | None], Result]
"""Read the object of a rank with this spec, verified and in canonical order, into a buffer."""


def splits(spec: KVSpec, group: int) -> Iterator[list[Piece]]:
    """Every other way in which engines cut a group's heads, as the pieces that cover ours; the fewest pieces first."""
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
    """`results` of `tier.contains(ids)`, with what is missing looked for in other splits."""
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
    """Fill `out` (uint8, canonical order) from other ranks' objects; `MISSING` where no split is there whole."""
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
    for a, b in zip(_planes(src, theirs), _planes(dst, ours), strict=True):
        b[:, :, put].copy_(a[:, :, take])


def _planes(buffer: torch.Tensor, layout: ObjectLayout) -> Iterator[torch.Tensor]:
    """`(layers, tokens, heads, bytes)` of each plane of a canonical object."""
    start = 0
    for plane in layout.planes:
        row = plane.elems * layout.places[plane.name].itemsize
        size = layout.layers * layout.tokens * layout.heads * row
        yield buffer[start : start + size].view(layout.layers, layout.tokens, layout.heads, row)
        start += size
