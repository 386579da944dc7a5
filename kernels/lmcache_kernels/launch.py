"""What a kernel is compiled for and launched with: decided from a `RowCopy` alone, so that it can be tested, and compiled,
without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from lmcache_kernels.address import Dim, coalesce
from lmcache_kernels.checks import CopyError
from lmcache_kernels.rowcopy import Ints, RowCopy

ACCESS_BYTES = 16
"""The widest load and store of one thread."""

TILE_BYTES = 8 << 10
"""Bytes that one program moves at a time: with 4 warps of 32, four accesses of 16 bytes under way in each thread."""

TILE_ELEMENTS = 2048
"""Narrow elements need as many registers as wide ones: no more than 16 in each thread."""

EDGE_BYTES = 128
"""A tile that changes the order is at least so long along each side's own order: a cache line of a GPU."""


@dataclass(frozen=True)
class Loops:
    """Nested loops, outermost first; sizes and strides in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Specialisation:
    """One compiled kernel. Sizes and strides are in elements of `width` bytes.

    Attributes:
        kind: "run": runs contiguous on both sides move in order; "turn": tiles are read in one side's order and written in
            the other's.
        width: bytes of an element.
        align: bytes that divide the address of every row, on both sides.
        a, b: the loops of a row ("run"), or those around a tile ("turn"), of the same sizes on either side.
        count: elements of a row ("run"), or tiles of a row ("turn").
        rows: rows that one program moves at a time ("run").
        tile: elements of a tile.
        tile_a, tile_b: the elements of a tile in each side's own order, as few loops as possible ("turn").
        shape_a: sizes of the tile's loops in the order of A ("turn").
        to_b: position in A's order of each loop of B's order ("turn").
        far: a row reaches farther than an int32 counts elements.
    """

    kind: Literal["run", "turn"]
    width: int
    align: int
    a: Loops
    b: Loops
    count: int
    rows: int
    tile: int
    tile_a: Loops = Loops((), ())
    tile_b: Loops = Loops((), ())
    shape_a: tuple[int, ...] = ()
    to_b: tuple[int, ...] = ()
    far: bool = False

    @property
    def bytes_at_a_time(self) -> int:
        """Bytes that one program has under way."""
        return self.rows * self.tile * self.width

    def warps(self, lanes: int) -> int:
        """Warps of a program on a device with so many lanes a warp: at most 4, each thread with an access of its own."""
        return min(4, max(1, self.bytes_at_a_time // (ACCESS_BYTES * lanes)))

    def items(self, rows: int) -> int:
        """Pieces of work in so many rows."""
        per_row = -(-self.count // self.tile) if self.kind == "run" else self.count
        return -(-rows // self.rows) * per_row


def specialise(copy: RowCopy) -> Specialisation:
    """The kernel that moves this copy's rows."""
    dims = coalesce(copy.dims)
    if not dims or dims[-1][1:] != (1, 1):
        dims = (*dims, (1, 1, 1))
    run, width = dims[-1][0], min(8, copy.alignment)
    loops = [(size, a // width, b // width) for size, a, b in dims[:-1]] + [(run // width, 1, 1)]
    loops = [loop for loop in loops if loop[0] > 1] or [(1, 1, 1)]
    if run < ACCESS_BYTES:
        tile = _tile(loops, width)
        if prod(tile) * width > run:
            return _turn(loops, tile, width, copy.row_alignment)
    count = prod(size for size, _, _ in loops)
    most = min(TILE_BYTES // width, TILE_ELEMENTS)
    tile_elements = min(_power(count), most)
    rows = max(1, most // tile_elements)
    a, b = _sides(loops)
    return Specialisation("run", width, copy.row_alignment, a, b, count, rows, tile_elements, far=_far(loops))


def _tile(loops: list[Dim], width: int) -> list[int]:
    """How much of each loop a tile takes, powers of two: a cache line along either side's order, then more of A's."""
    wanted = EDGE_BYTES // width
    taken = [1] * len(loops)
    for side in (1, 2):
        reach = 1
        for i in sorted(range(len(loops)), key=lambda i: loops[i][side]):
            if loops[i][side] != reach or reach >= wanted:
                break
            size = loops[i][0]
            part = min(size & -size, _power(wanted) // reach)
            taken[i] = max(taken[i], part)
            if part < size:
                break
            reach *= size
    for i in sorted(range(len(loops)), key=lambda i: loops[i][1]):
        while prod(taken) * width < TILE_BYTES // 2 and loops[i][0] % (2 * taken[i]) == 0:
            taken[i] *= 2
    return taken


def _turn(loops: list[Dim], taken: list[int], width: int, align: int) -> Specialisation:
    inner = [(part, a, b) for part, (_, a, b) in zip(taken, loops, strict=True) if part > 1]
    outer = [(n // part, a * part, b * part) for part, (n, a, b) in zip(taken, loops, strict=True) if n > part]
    by_a = sorted(inner, key=lambda loop: -loop[1])
    by_b = sorted(inner, key=lambda loop: -loop[2])
    a, b = _sides(outer)
    return Specialisation(
        "turn",
        width,
        align,
        a,
        b,
        prod(size for size, _, _ in outer),
        1,
        prod(taken),
        _joined([(size, stride) for size, stride, _ in by_a]),
        _joined([(size, stride) for size, _, stride in by_b]),
        tuple(size for size, _, _ in by_a),
        tuple(by_a.index(loop) for loop in by_b),
        _far(loops),
    )


def _far(loops: list[Dim]) -> bool:
    return max(sum((size - 1) * loop[side] for size, *loop in loops) for side in (0, 1)) >= 1 << 31


def _sides(loops: list[Dim]) -> tuple[Loops, Loops]:
    sizes = tuple(size for size, _, _ in loops)
    return Loops(sizes, tuple(a for _, a, _ in loops)), Loops(sizes, tuple(b for _, _, b in loops))


def _joined(loops: list[tuple[int, int]]) -> Loops:
    """Loops of one side with those joined that continue each other, so that a compiler sees how long its runs are."""
    out: list[tuple[int, int]] = []
    for size, stride in loops:
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return Loops(tuple(size for size, _ in out), tuple(stride for _, stride in out))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: what is compiled, all lists of a `RowCopy` in one int64 array, and how many rows there are."""

    what: Specialisation
    tables: Ints
    layers: int
    objects: int
    units: int

    @property
    def items(self) -> int:
        """Pieces of work."""
        return self.what.items(self.layers * self.objects * self.units)


MOST = 1 << 30
"""Pieces of work of one launch, which counts them in int32."""


def parts(copy: RowCopy) -> list[RowCopy]:
    """The copy in parts of at most `MOST` pieces; one part unless it is beyond all GPUs of today.

    Raises:
        CopyError: one object alone has more.
    """
    each = specialise(copy).items(copy.layers * copy.units)
    if each > MOST:
        raise CopyError(
            f"an object of {copy.layers} layers × {copy.units} rows has {each} pieces; {MOST} can be counted"
        )
    step = MOST // max(1, each)
    if copy.objects <= step:
        return [copy]
    starts = range(0, copy.objects, step)
    return [replace(copy, a_units=copy.a_units[i : i + step], b_base=copy.b_base[i : i + step]) for i in starts]


def tables_of(copy: RowCopy) -> Ints:
    """A copy's lists as kernels read them: a_base, b_layers, b_base, b_units, a_units, one after another."""
    lists = (copy.a_base, copy.b_layers, copy.b_base, copy.b_units, copy.a_units.reshape(-1))
    return np.concatenate(lists)


def launch_of(copy: RowCopy) -> Launch:
    """Everything a launch needs."""
    return Launch(specialise(copy), tables_of(copy), copy.layers, copy.objects, copy.units)
