"""Copies rows between host memories with numpy: one strided copy moves a page in all layers, K and V together.

The form of the numpy call matters by a factor of two. Throughput relative to memcpy on one core of an EPYC (whole objects in
memory, 16-token pages of SmolLM2, with runs of 128 bytes, and of Llama-3-8B, with runs of 256):

    rows by index, one layer and plane at a time                   store 0.30, 0.55    retrieve 0.28, 0.56
    one page at a time, all layers                                 store 0.36, 0.61    retrieve 0.45, 0.46
    … and K and V as one more loop: cache lines are read once      store 0.42, 0.70    retrieve 0.49, 0.54
    … and a run as *one* element (numpy void), not as words        store 0.56, 0.66    retrieve 0.55, 0.57

Unlike memcpy, which bypasses the caches, such a copy first reads the lines that it overwrites: with short runs, 0.67 is the
limit of one core. Permuting 2-byte elements is slower: splitting the pairs of AMX (AMX V → rows) reaches 0.28–0.33, joining
them 0.07–0.09. So pairs are joined as words (widen, shift, or) in tiles that fit the second-level cache: 0.27–0.32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lmcache_kernels.address import Digits, Dim
from lmcache_kernels.reference import in_parallel
from lmcache_kernels.rowcopy import Ints, RowCopy

Array = npt.NDArray[Any]

TILE = 256 << 10
"""Bytes of a tile of joined pairs: the tile and its two intermediate forms fit a second-level cache of 1 MiB."""

_BYTES_PER_THREAD = 2 << 20
_LONG_RUN = 256
_LONGEST = 1 << 20
"""Maximum bytes of one numpy element; longer runs are copied as bytes, which numpy also turns into one memcpy."""


class Loops(NamedTuple):
    """Rows of all objects and units of `copy`; `dims` adds `layers`, and copies at equal distances, around `copy.dims`."""

    copy: RowCopy
    layers: range
    dims: tuple[Dim, ...]


class Move(NamedTuple):
    """Two views of equal shape. `joins`: the last axis of the source holds the two halves of each word of the target."""

    target: Array
    source: Array
    joins: bool

    def parts(self) -> list[Move]:
        """Splits the move into halves; returns it whole if it is a single element, or words that form one run in the target."""
        if not self.target.ndim:
            return [self]
        if len(self.target) == 1:
            return Move(self.target[0, ...], self.source[0, ...], self.joins).parts()
        middle = len(self.target) // 2
        return [Move(self.target[cut], self.source[cut], self.joins) for cut in (slice(middle), slice(middle, None))]


def copy_rows_on_host(copies: Sequence[RowCopy], *, into_a: bool) -> None:
    """Copies all rows between host memories, on up to torch's number of threads if large enough. Nothing may overlap."""
    # All Python work is done before the first copy: copies evict the interpreter's data from the CPU caches.
    moves = [move for loops in looped(copies) for move in _moves(loops, into_a=into_a)]
    total = sum(move.source.nbytes for move in moves)
    threads = min(torch.get_num_threads(), max(1, total // _BYTES_PER_THREAD))
    if threads == 1:
        _run(moves)
        return
    for _ in range(
        4
    ):  # split large moves (a page of a hundred layers, an object) so that threads share the work evenly
        if len(moves) < 4 * threads:
            moves = [part for move in moves for part in move.parts()]
    tasks: list[Callable[[], object]] = [functools.partial(_run, moves[i::threads]) for i in range(threads)]
    in_parallel(tasks)


def looped(copies: Sequence[RowCopy]) -> Iterator[Loops]:
    """Turns layers and copies at equal distances into loops within a row; the rows stay the same."""
    for first, planes in _families(copies):
        if not first.objects:
            continue
        low, high = int(first.b_base.min()), int(first.b_base.max())
        for layers in _regular(first.a_base, first.b_layers, low, high):
            a, b = first.a_base[layers.start : layers.stop], first.b_layers[layers.start : layers.stop]
            loop = [(len(layers), int(a[1] - a[0]), int(b[1] - b[0]))] if len(layers) > 1 else []
            yield Loops(first, layers, (*loop, *planes, *first.dims))


def worth_it(dims: Sequence[Dim], *, into_a: bool) -> bool:
    """Whether `copy_rows_on_host` is faster than indexed rows for rows with loops `dims`, as measured: not for rows of a
    single run, nor for scattering long runs or 2-byte elements that are permuted one by one.
    """
    if len(dims) == 1:
        return False
    run = dims[-1][0]
    if not into_a:
        return True
    return 2 < run < _LONG_RUN or (run == 2 and pair_of([(n, b, a) for n, a, b in dims]) is not None)


def pair_of(dims: Sequence[Dim]) -> Dim | None:
    """Returns the loop over the two halves of a target word if they are 2-byte elements from two rows of the source.

    `dims`: (size, stride in the source, stride in the target).
    """
    if dims[-1][0] != 2 or sys.byteorder != "little":
        return None
    pair = next((d for d in dims[:-1] if d[0] == 2 and d[2] == 2 and d[1] > 2), None)
    row = next((d for d in dims[:-1] if d[0] > 1 and d[1] == 2), None)  # the loop along a row of the source
    return pair if row is not None else None


def _families(copies: Sequence[RowCopy]) -> list[tuple[RowCopy, tuple[Dim, ...]]]:
    """Groups copies at equal distances from each other (K and V of a page): the first one, and the loop over the group."""
    out: list[tuple[RowCopy, tuple[Dim, ...]]] = []
    for copy in copies:
        if out:
            first, loop = out[-1]
            distance = _distance(first, copy)
            count, *one = loop[0] if loop else (1, *(distance or (0, 0)))
            if distance == (count * one[0], count * one[1]):
                out[-1] = first, ((count + 1, one[0], one[1]),)
                continue
        out.append((copy, ()))
    return out


def _distance(one: RowCopy, other: RowCopy) -> tuple[int, int] | None:
    """Bytes on A and on B from each row of one copy to the same row of the other; None if not the same for all rows."""
    same = (
        one.dims == other.dims
        and one.layers == other.layers
        and np.array_equal(one.a_units, other.a_units)
        and np.array_equal(one.b_units, other.b_units)
        and np.array_equal(one.b_base, other.b_base)
    )
    if not same:
        return None
    a, b = other.a_base - one.a_base, other.b_layers - one.b_layers
    if (a != a[0]).any() or (b != b[0]).any():
        return None
    return int(a[0]), int(b[0])


def _regular(a: Ints, b: Ints, low: int, high: int) -> Iterator[range]:
    """Ranges of layers at equal distances on both sides, all below `low` or all above `high`.

    numpy compares the bounds of source and target; if these overlap, as they do when the objects are located between two
    layers, it first makes a temporary copy of the source.
    """
    sides = np.where(a > high, 2, np.where(a < low, 0, 1))
    for side, group in groupby(range(len(a)), lambda i: int(sides[i])):
        layers = list(group)
        start = layers[0]
        while start <= layers[-1]:
            stop = start + 1
            if stop <= layers[-1] and side != 1:
                step = a[stop] - a[start], b[stop] - b[start]
                while stop <= layers[-1] and (a[stop] - a[stop - 1], b[stop] - b[stop - 1]) == step:
                    stop += 1
            yield range(start, stop)
            start = stop


def _moves(loops: Loops, *, into_a: bool) -> Iterator[Move]:
    """One move for every resident row."""
    copy, layer = loops.copy, loops.layers.start
    resident = copy.a_units >= 0
    if not resident.any():
        return
    dims = [(n, b, a) if into_a else (n, a, b) for n, a, b in loops.dims]
    arranged = _joined(dims) or _plain(dims)
    of_a, of_b = (arranged.target, arranged.source) if into_a else (arranged.source, arranged.target)
    a_rows = _Rows(int(copy.a_base[layer]), copy.a_units[resident], of_a)
    done = 0
    for start, mine in zip(copy.b_base.tolist(), resident, strict=True):
        b_rows = _Rows(start + int(copy.b_layers[layer]), copy.b_units[mine], of_b)
        for i, b in enumerate(b_rows.index, done):
            a_row, b_row = a_rows.all[a_rows.index[i], ...], b_rows.all[b, ...]
            yield Move(a_row, b_row, arranged.joins) if into_a else Move(b_row, a_row, arranged.joins)
        done += len(b_rows.index)


class _Arranged(NamedTuple):
    """The views of a row's source and target: loops of (size, stride), the last one contiguous bytes."""

    source: Digits
    target: Digits
    joins: bool = False


def _plain(dims: Sequence[Dim]) -> _Arranged:
    return _Arranged(tuple((n, s) for n, s, _ in dims), tuple((n, t) for n, _, t in dims))


def _joined(dims: Sequence[Dim]) -> _Arranged | None:
    """Views for joining pairs of the source into words of the target, in the source's order; None if there are no pairs."""
    pair = pair_of(dims)
    if pair is None:
        return None
    loops = sorted((d for d in dims[:-1] if d is not pair and d[0] > 1), key=lambda d: -d[1])
    run, rest = 4, [(n, t) for n, _, t in loops]
    while rest and rest[-1][1] == run and run * rest[-1][0] <= _LONGEST:
        run *= rest.pop()[0]
    source = (*((n, s) for n, s, _ in loops), (2, pair[1]), (2, 1))
    return _Arranged(source, (*rest, (run, 1)), joins=True)


class _Rows:
    """`all`: an array over every position from `base` in steps of the gcd of `offsets`; `index`: the positions wanted."""

    def __init__(self, base: int, offsets: Ints, dims: Digits) -> None:
        low = int(offsets.min()) if len(offsets) else 0
        numbers = offsets - low
        step = int(np.gcd.reduce(numbers)) or 1
        self.index: list[int] = (numbers // step).tolist()
        self.all = at(base + low, [(max(self.index, default=0) + 1, step), *dims])


def at(address: int, dims: Sequence[tuple[int, int]]) -> Array:
    """Views host memory as an array of runs: loops of (size, stride in bytes), the last one `(n, 1)`: n contiguous bytes."""
    run = dims[-1][0]
    sizes, strides = [n for n, _ in dims[:-1]], [s for _, s in dims[:-1]]
    if run in _WORDS:
        element = _WORDS[run]
    elif run <= _LONGEST:
        element = f"|V{run}"
    else:
        sizes, strides, element = [*sizes, run], [*strides, 1], "|u1"
    return np.asarray(_Memory(address, tuple(sizes), tuple(strides), element))


_WORDS = {n: np.dtype(f"u{n}").str for n in (2, 4, 8)}


class _Memory:
    """Host memory with numpy's array interface, see https://numpy.org/doc/stable/reference/arrays.interface.html."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


def _run(moves: Sequence[Move]) -> None:
    plain = [move for move in moves if not move.joins]
    tiles = [tile for move in moves if move.joins for tile in _tiles(move)]
    for move in plain:
        np.copyto(move.target, move.source)
    if tiles:
        # Allocated once: fresh memory causes page faults.
        words = np.empty((2, max(tile.source.nbytes for tile in tiles) // 4), np.uint32)
        for tile in tiles:
            _join(tile, words)


def _tiles(move: Move) -> Iterator[Move]:
    parts = move.parts() if move.source.nbytes > TILE else [move]
    if len(parts) == 1:
        yield move
        return
    for part in parts:
        yield from _tiles(part)


def _join(tile: Move, words: npt.NDArray[np.uint32]) -> None:
    """Target word = element of the first row | element of the second row << 16 (little-endian machines only)."""
    sizes = tile.source.shape[:-1]
    low, high = words[:, : prod(sizes)]
    for half, out in enumerate((low, high)):
        np.copyto(out.reshape(sizes), tile.source[..., half])
    np.left_shift(high, 16, out=high)
    np.bitwise_or(low, high, out=low)
    np.copyto(tile.target, low.view(tile.target.dtype).reshape(tile.target.shape))
