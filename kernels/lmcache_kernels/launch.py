"""Compile-time constants and launch arguments of a copy kernel, derived from a `RowCopy` alone, so that they can be tested
and compiled without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from lmcache_kernels.address import Dim, coalesce_runs, join_digits
from lmcache_kernels.checks import CopyError
from lmcache_kernels.rowcopy import Ints, RowCopy

ACCESS_BYTES = 16
"""The widest load and store of one thread."""

TILE_BYTES = 8 << 10
"""Bytes that one program moves at a time: with 4 warps of 32, four accesses of 16 bytes in flight per thread."""

TILE_ELEMENTS = 2048
"""Maximum elements of a tile, 16 per thread: narrow elements need as many registers as wide ones."""

EDGE_BYTES = 128
"""Minimum extent of a transposing tile along each side's own order: a cache line of a GPU."""


@dataclass(frozen=True)
class Loops:
    """Nested loops, outermost first; sizes and strides in elements."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Specialisation:
    """One compiled kernel. Sizes and strides are in elements of `width` bytes.

    Attributes:
        kind: "run": copies runs that are contiguous on both sides, in order; "turn": transposes tiles, i.e. reads them in one
            side's order and writes them in the other's.
        width: bytes per element.
        align: alignment in bytes of every row, on both sides.
        a, b: the loops of a row ("run") or around a tile ("turn"); both sides have the same sizes.
        count: elements per row ("run") or tiles per row ("turn").
        rows: rows that one program moves at a time ("run").
        tile: elements per tile.
        tile_a, tile_b: the elements of a tile in each side's own order, as few loops as possible ("turn").
        shape_a: sizes of the tile's loops in the order of A ("turn").
        to_b: position in A's order of each loop of B's order ("turn").
        far: element offsets within a row exceed int32.
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
        """Bytes that one program has in flight."""
        return self.rows * self.tile * self.width

    def warps(self, lanes: int) -> int:
        """Warps per program on a device with `lanes` threads per warp: at most 4, and at least one access per thread."""
        return min(4, max(1, self.bytes_at_a_time // (ACCESS_BYTES * lanes)))

    def items(self, rows: int) -> int:
        """Number of work items for `rows` rows."""
        per_row = -(-self.count // self.tile) if self.kind == "run" else self.count
        return -(-rows // self.rows) * per_row


def specialise(copy: RowCopy) -> Specialisation:
    """Chooses the kernel for a copy."""
    dims = coalesce_runs(copy.dims)
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
    """Extent of a tile along each loop, powers of two: a cache line along each side's order, then more along A's order."""
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
    """Merges contiguous loops of one side, so that the compiler sees the full length of its runs."""
    merged = join_digits(loops)
    return Loops(tuple(size for size, _ in merged), tuple(stride for _, stride in merged))


def _power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, eq=False)
class Launch:
    """One launch: the compiled kernel, all lists of a `RowCopy` in one int64 array, and the number of rows."""

    what: Specialisation
    tables: Ints
    layers: int
    objects: int
    units: int

    @property
    def items(self) -> int:
        """Number of work items."""
        return self.what.items(self.layers * self.objects * self.units)


MOST = 1 << 30
"""Maximum work items per launch; the kernel counts them in int32."""


def parts(copy: RowCopy) -> list[RowCopy]:
    """Splits a copy into parts of at most `MOST` work items; one part for any size that fits today's GPUs.

    Raises:
        CopyError: a single object exceeds the limit.
    """
    each = specialise(copy).items(copy.layers * copy.units)
    if each > MOST:
        raise CopyError(
            f"an object of {copy.layers} layers × {copy.units} rows has {each} pieces; the maximum is {MOST}"
        )
    step = MOST // max(1, each)
    if copy.objects <= step:
        return [copy]
    starts = range(0, copy.objects, step)
    return [replace(copy, a_units=copy.a_units[i : i + step], b_base=copy.b_base[i : i + step]) for i in starts]


def tables_of(copy: RowCopy) -> Ints:
    """Concatenates a copy's lists in the order kernels expect: a_base, b_layers, b_base, b_units, a_units."""
    lists = (copy.a_base, copy.b_layers, copy.b_base, copy.b_units, copy.a_units.reshape(-1))
    return np.concatenate(lists)


def launch_of(copy: RowCopy) -> Launch:
    """Prepares everything a launch needs."""
    return Launch(specialise(copy), tables_of(copy), copy.layers, copy.objects, copy.units)
