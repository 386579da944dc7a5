"""Addresses as plain integers: the location of each element, and the bytes that are contiguous on both sides of a copy.

An axis with a regular memory layout is a list of *digits*: position i, written in mixed radix from the major to the minor
digit, is at the sum of digit × stride. A plain axis has one digit; `slot/16 … slot%16` has two, whose strides need not be
ordered. All offsets and strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

Digits = tuple[tuple[int, int], ...]
"""(size, stride in bytes) of each digit of an axis, major first; the extent of the axis is the product of the sizes."""

Dim = tuple[int, int, int]
"""(size, stride in bytes on side A, stride in bytes on side B) of one loop of a copy."""


def table(digits: Digits) -> npt.NDArray[np.int64]:
    """Returns the byte offset of each position of an axis, int64 `(extent,)`."""
    out = np.zeros(1, dtype=np.int64)
    for size, stride in digits:
        out = (out[:, None] + np.arange(size, dtype=np.int64)[None, :] * stride).reshape(-1)
    return out


def extent(digits: Digits) -> int:
    """Number of positions of an axis."""
    out = 1
    for size, _ in digits:
        out *= size
    return out


@dataclass(frozen=True)
class PlaneAddress:
    """Address of one plane of one layer: element (page, head, slot, elem) starts at byte
    `base + page·page_stride + head·head_stride + T[slot] + E[elem]` of storage number `storage`.

    Attributes:
        storage: index into the list of flat storages.
        base: byte offset of element (0, 0, 0, 0) in that storage.
        page: bytes from one page to the next.
        head: bytes from one kv head to the next (0 if there is only one).
        slot: digits of the slot within its page; their extent is the number of tokens per page.
        elem: digits of the element.
        itemsize: bytes per element.
    """

    storage: int
    base: int
    page: int
    head: int
    slot: Digits
    elem: Digits
    itemsize: int

    @cached_property
    def T(self) -> npt.NDArray[np.int64]:  # noqa: N802 - the name in the formula
        """Byte offset of each slot within its page, `(block_tokens,)`."""
        return table(self.slot)

    @cached_property
    def E(self) -> npt.NDArray[np.int64]:  # noqa: N802 - the name in the formula
        """Byte offset of each element, `(elems,)`."""
        return table(self.elem)

    def at(self, page: int, head: int, slot: int, elem: int) -> int:
        """Byte offset of one element in its storage."""
        return int(self.base + page * self.page + head * self.head + int(self.T[slot]) + int(self.E[elem]))


@dataclass(frozen=True)
class Piece:
    """Part of an axis that is regular on both sides: loops `dims`, starting at offsets `a` and `b`."""

    a: int
    b: int
    dims: tuple[Dim, ...]


def refine(a: Digits, b: Digits) -> tuple[Piece, ...]:
    """Expresses two arrangements of one axis as loops that are regular on *both* sides.

    Digits are split where the other side splits them, which yields a single piece if one side's radix divides the other's.
    Where neither divides (pages of 12 and of 16 tokens), the axis is cut into several pieces.

    Raises:
        ValueError: the extents differ.
    """
    if extent(a) != extent(b):
        raise ValueError(f"axes of {extent(a)} and {extent(b)} positions cannot be matched")
    dims: list[Dim] = []
    left, right = [d for d in a if d[0] > 1], [d for d in b if d[0] > 1]
    while left and right:
        (n, s), (m, t) = left.pop(), right.pop()
        step = min(n, m)
        if n % step or m % step:
            return _irregular(table(a), table(b))
        dims.append((step, s, t))
        if n > step:
            left.append((n // step, s * step))
        if m > step:
            right.append((m // step, t * step))
    return (Piece(0, 0, tuple(reversed(dims))),)


def _irregular(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> tuple[Piece, ...]:
    """Cuts an axis into runs with a constant, positive step on both sides (views cannot have negative strides); positions
    that belong to no such run become pieces of their own.
    """
    pieces = []
    start, n = 0, len(a)
    while start < n:
        stop = start + 1
        dims: tuple[Dim, ...] = ()
        step = (int(a[stop] - a[start]), int(b[stop] - b[start])) if stop < n else (0, 0)
        if min(step) > 0:
            while stop < n and (int(a[stop] - a[stop - 1]), int(b[stop] - b[stop - 1])) == step:
                stop += 1
            dims = ((stop - start, *step),)
        pieces.append(Piece(int(a[start]), int(b[start]), dims))
        start = stop
    return tuple(pieces)


def coalesce(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Returns the fewest loops that visit the same (offset A, offset B) pairs, largest stride on side B first.

    The order of loops does not matter to a copy, so they are sorted, and adjacent loops that are contiguous on both sides are
    merged.
    """
    out: list[Dim] = []
    for size, a, b in sorted((d for d in dims if d[0] != 1), key=lambda d: (-d[2], -d[1])):
        if out and out[-1][1] == a * size and out[-1][2] == b * size:
            out[-1] = (out[-1][0] * size, a, b)
        else:
            out.append((size, a, b))
    return tuple(out)


def coalesce_runs(dims: Sequence[Dim]) -> tuple[Dim, ...]:
    """Like `coalesce`, but the innermost loop is always a contiguous run `(n, 1, 1)`, n ≥ 1."""
    out = coalesce(dims)
    return out if out and out[-1][1:] == (1, 1) else (*out, (1, 1, 1))


def join_digits(digits: Iterable[tuple[int, int]]) -> Digits:
    """Drops digits of size 1 and merges adjacent digits that are contiguous; the offsets of the axis stay the same."""
    out: list[tuple[int, int]] = []
    for size, stride in digits:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out)


@dataclass(frozen=True)
class Strip:
    """One regular copy between side A and side B, repeated for every layer and every unit (a page, or some tokens).

    Attributes:
        sources: (storage, byte offset) on side A per layer, at unit address 0; the layers are `first`, `first + 1`, …
        offset: byte offset on side B of layer `first`, unit 0.
        layer: bytes from one layer to the next on side B.
        units: digits of the unit on side B; on side A the slots determine the address of each unit.
        dims: loops (size, stride on A, stride on B); the innermost is `(n, 1, 1)`: n contiguous bytes on both sides.
        tag: strips are merged only within one tag, i.e. if they share the addresses of their units on side A.
        first: the first layer.
    """

    sources: tuple[tuple[int, int], ...]
    offset: int
    layer: int
    units: Digits
    dims: tuple[Dim, ...]
    tag: int = 0
    first: int = 0

    @property
    def run(self) -> int:
        """Bytes that are contiguous on both sides."""
        return self.dims[-1][0]

    def tidy(self) -> Strip:
        """Returns the same copy with the fewest loops."""
        return replace(self, dims=coalesce_runs(self.dims))


def merge_strips(strips: Sequence[Strip]) -> tuple[Strip, ...]:
    """Merges strips that are adjacent on both sides in every layer (K and V of a packed page), until none are left."""
    work = [s.tidy() for s in strips]
    while True:
        by_start = {(s.offset, s.sources[0]): s for s in work}
        for first in work:
            storage, base = first.sources[0]
            after = by_start.get((first.offset + first.run, (storage, base + first.run)))
            if after is not None and after is not first and _follows(first, after):
                joined = replace(first, dims=(*first.dims[:-1], (first.run + after.run, 1, 1))).tidy()
                work = [joined, *(s for s in work if s is not first and s is not after)]
                break
        else:
            return tuple(sorted(work, key=lambda s: s.offset))


def _follows(a: Strip, b: Strip) -> bool:
    return (
        a.dims[:-1] == b.dims[:-1]
        and (a.tag, a.first, a.layer, a.units) == (b.tag, b.first, b.layer, b.units)
        and len(a.sources) == len(b.sources)
        and all(s == t and y == x + a.run for (s, x), (t, y) in zip(a.sources, b.sources, strict=True))
    )
