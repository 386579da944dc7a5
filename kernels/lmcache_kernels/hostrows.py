"""Rows by numpy, on a CPU: one strided copy moves a page in all layers, K and V at once.

How numpy is asked makes a factor of two, as part of memcpy on one core of an EPYC (whole objects in memory, 16-token
pages of SmolLM2, whose runs are 128 bytes, and of Llama-3-8B, whose runs are 256):

    rows named by an index, a layer and a plane at a time          store 0.30, 0.55    retrieve 0.28, 0.56
    a page at a time, all layers                                   store 0.36, 0.61    retrieve 0.45, 0.46
    … and K and V as a loop of it: their lines are read once       store 0.42, 0.70    retrieve 0.49, 0.54
    … and a run as *one* element (numpy's void), not as words      store 0.56, 0.66    retrieve 0.55, 0.57

A copy that does not go past the caches, as memcpy does, reads what it is about to overwrite: 0.67 is the most that one core
can have where runs are short. Elements of 2 bytes that change places are another matter: splitting the pairs that AMX
wants (AMX V → rows) has 0.28–0.33, joining them 0.07–0.09. So pairs are joined as words, by widening, shift and or, in
tiles that stay in the second-level cache: 0.27–0.32.
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
"""Bytes of a tile of joined pairs: with its two intermediate forms inside a second-level cache of 1 MiB."""

_WORTH_A_THREAD = 2 << 20
_LONG_RUN = 256
_LONGEST = 1 << 20
"""Bytes of an element at most; longer runs are copied as bytes, which is one memcpy as well."""


class Loops(NamedTuple):
    """Rows of all objects and units of `copy`, those of `layers` and of more copies as loops around `copy.dims`."""

    copy: RowCopy
    layers: range
    dims: tuple[Dim, ...]


class Move(NamedTuple):
    """Two views of equal elements. `joins`: the source's last axis are the two halves of a word of the target."""

    target: Array
    source: Array
    joins: bool

    def parts(self) -> list[Move]:
        """The same in halves; as it is where it is a single element, or words that the target has in one run."""
        if not self.target.ndim:
            return [self]
        if len(self.target) == 1:
            return Move(self.target[0, ...], self.source[0, ...], self.joins).parts()
        middle = len(self.target) // 2
        return [Move(self.target[cut], self.source[cut], self.joins) for cut in (slice(middle), slice(middle, None))]


def copy_rows_on_host(copies: Sequence[RowCopy], *, into_a: bool) -> None:
    """Copy all rows between host memories, on as many threads as torch uses where that pays. Nothing may overlap."""
    # All of Python's work comes before the first byte moves, as copies empty the caches that it runs from.
    moves = [move for loops in looped(copies) for move in _moves(loops, into_a=into_a)]
    total = sum(move.source.nbytes for move in moves)
    threads = min(torch.get_num_threads(), max(1, total // _WORTH_A_THREAD))
    if threads == 1:
        _all(moves)
        return
    for _ in range(4):  # a page of a hundred layers, an object: more parts than threads
        if len(moves) < 4 * threads:
            moves = [part for move in moves for part in move.parts()]
    tasks: list[Callable[[], object]] = [functools.partial(_all, moves[i::threads]) for i in range(threads)]
    in_parallel(tasks)


def looped(copies: Sequence[RowCopy]) -> Iterator[Loops]:
    """The same rows with as many layers and copies as lie regularly made loops inside a row."""
    for first, planes in _families(copies):
        if not first.objects:
            continue
        low, high = int(first.b_base.min()), int(first.b_base.max())
        for layers in _regular(first.a_base, first.b_layers, low, high):
            a, b = first.a_base[layers.start : layers.stop], first.b_layers[layers.start : layers.stop]
            loop = [(len(layers), int(a[1] - a[0]), int(b[1] - b[0]))] if len(layers) > 1 else []
            yield Loops(first, layers, (*loop, *planes, *first.dims))


def worth_it(dims: Sequence[Dim], *, into_a: bool) -> bool:
    """Whether this is faster than rows named by an index, for rows with these loops inside, by measurement: not where rows
    are single runs, nor into pages whose runs are long or whose 2-byte elements change places one by one.
    """
    if len(dims) == 1:
        return False
    run = dims[-1][0]
    if not into_a:
        return True
    return 2 < run < _LONG_RUN or (run == 2 and pair_of([(n, b, a) for n, a, b in dims]) is not None)


def pair_of(dims: Sequence[Dim]) -> Dim | None:
    """The loop over the two halves of a word of the target, if these are 2-byte elements of two rows of the source.

    `dims`: (size, stride in the source, stride in the target).
    """
    if dims[-1][0] != 2 or sys.byteorder != "little":
        return None
    pair = next((d for d in dims[:-1] if d[0] == 2 and d[2] == 2 and d[1] > 2), None)
    row = next((d for d in dims[:-1] if d[0] > 1 and d[1] == 2), None)  # where rows are contiguous in the source
    return pair if row is not None else None


def _families(copies: Sequence[RowCopy]) -> list[tuple[RowCopy, tuple[Dim, ...]]]:
    """Copies that are one copy moved by equal distances, as K and V of a page are: the first, and the loop over them."""
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
    """Bytes on A and on B from every row of one copy to the same row of another; None where that differs."""
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
    """Runs of layers that are equally far apart on both sides, all before `low` or all behind `high`.

    numpy compares the bounds of what it reads and of what it writes; where they overlap, as they would if the objects lay
    between two layers, it first copies the source aside.
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
    """One for every row."""
    copy, layer = loops.copy, loops.layers.start
    there = copy.a_units >= 0
    if not there.any():
        return
    dims = [(n, b, a) if into_a else (n, a, b) for n, a, b in loops.dims]
    arranged = _joined(dims) or _plain(dims)
    of_a, of_b = (arranged.target, arranged.source) if into_a else (arranged.source, arranged.target)
    a_rows = _Rows(int(copy.a_base[layer]), copy.a_units[there], of_a)
    done = 0
    for start, mine in zip(copy.b_base.tolist(), there, strict=True):
        b_rows = _Rows(start + int(copy.b_layers[layer]), copy.b_units[mine], of_b)
        for i, b in enumerate(b_rows.index, done):
            a_row, b_row = a_rows.all[a_rows.index[i], ...], b_rows.all[b, ...]
            yield Move(a_row, b_row, arranged.joins) if into_a else Move(b_row, a_row, arranged.joins)
        done += len(b_rows.index)


class _Arranged(NamedTuple):
    """How the source and the target of a row are looked at: loops of (size, stride), the last one contiguous bytes."""

    source: Digits
    target: Digits
    joins: bool = False


def _plain(dims: Sequence[Dim]) -> _Arranged:
    return _Arranged(tuple((n, s) for n, s, _ in dims), tuple((n, t) for n, _, t in dims))


def _joined(dims: Sequence[Dim]) -> _Arranged | None:
    """Words of the target from pairs of the source, in the source's order; None where there are none to join."""
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
    """An array over every place at `base` + a multiple of what divides all `offsets`, and which of them are meant."""

    def __init__(self, base: int, offsets: Ints, dims: Digits) -> None:
        low = int(offsets.min()) if len(offsets) else 0
        numbers = offsets - low
        step = int(np.gcd.reduce(numbers)) or 1
        self.index: list[int] = (numbers // step).tolist()
        self.all = at(base + low, [(max(self.index, default=0) + 1, step), *dims])


def at(address: int, dims: Sequence[tuple[int, int]]) -> Array:
    """Host memory as an array of runs: loops of (size, stride in bytes), the last `(n, 1)`, n contiguous bytes."""
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
    """Host memory as numpy takes it, see https://numpy.org/doc/stable/reference/arrays.interface.html."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...], typestr: str) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "version": 3,
        }


def _all(moves: Sequence[Move]) -> None:
    plain = [move for move in moves if not move.joins]
    tiles = [tile for move in moves if move.joins for tile in _tiles(move)]
    for move in plain:
        np.copyto(move.target, move.source)
    if tiles:
        words = np.empty(
            (2, max(tile.source.nbytes for tile in tiles) // 4), np.uint32
        )  # once: new memory costs faults
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
    """Word of the target = first row's element | second row's << 16, on machines that store the low byte first."""
    sizes = tile.source.shape[:-1]
    low, high = words[:, : prod(sizes)]
    for half, out in enumerate((low, high)):
        np.copyto(out.reshape(sizes), tile.source[..., half])
    np.left_shift(high, 16, out=high)
    np.bitwise_or(low, high, out=low)
    np.copyto(tile.target, low.view(tile.target.dtype).reshape(tile.target.shape))
