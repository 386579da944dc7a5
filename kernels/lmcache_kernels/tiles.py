"""Copies between two regular arrangements on a CPU: on all threads, and pairs of 2-byte elements joined as words.

Which primitive copies was measured, as part of memcpy on one core of an EPYC with AVX-512, on whole objects in memory:

    runs of 128–256 bytes      numpy's copy 0.5–1.0
    4-byte transposes (AMX K)  numpy's copy 0.26–0.6, tiles by `torch.channel_shuffle` (vectorised) 0.17–0.42
    pairs split (AMX V → rows) numpy's copy 0.20–0.42, tiles by narrowing and shifts 0.21–0.30
    pairs joined (rows → AMX V) numpy's copy 0.07–0.13, tiles by widening, shift and or 0.21–0.33
    2-byte transposes (vec K)  numpy's copy 0.10–0.34, tiles by words and halves 0.16–0.27

A transpose that is faster inside the second-level cache (4-byte elements: 14–27 GB/s) loses that again by loading a tile
and storing it. So numpy copies everything but joined pairs, and tiles exist for these alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lmcache_kernels.address import Dim
from lmcache_kernels.reference import ELEMENTS, in_parallel, width_of

Bytes = npt.NDArray[np.uint8]

TILE = 256 << 10
"""Bytes of a tile of joined pairs: with its two intermediate forms inside a second-level cache of 1 MiB."""

_WORTH_A_THREAD = 2 << 20


class Block(NamedTuple):
    """One strided copy: byte offsets on both sides, loops (size, stride in source, stride in target), `(n, 1, 1)` last."""

    a: int
    b: int
    dims: tuple[Dim, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that move."""
        return prod(size for size, _, _ in self.dims)


@functools.lru_cache(maxsize=1024)
def pair_of(dims: tuple[Dim, ...]) -> Dim | None:
    """The loop over the two elements of a word of the target, if these are 2-byte elements of two rows of the source."""
    if dims[-1][0] != 2 or sys.byteorder != "little":
        return None
    pair = next((d for d in dims[:-1] if d[0] == 2 and d[2] == 2 and d[1] > 2), None)
    row = next((d for d in dims[:-1] if d[0] > 1 and d[1] == 2), None)  # where rows are contiguous in the source
    return pair if row is not None else None


def copy_block_on_host(source: Bytes, target: Bytes, block: Block) -> None:
    """Copy a block, tile by tile if pairs have to be joined."""
    pair = pair_of(block.dims)
    if pair is None:
        loops = block.dims[:-1]
        sizes, run = [n for n, _, _ in loops], block.dims[-1][0]
        from_strides, to_strides = [s for _, s, _ in loops], [t for _, _, t in loops]
        addresses = source.ctypes.data, target.ctypes.data
        width = width_of(block.a, block.b, run, *addresses, *from_strides, *to_strides)
        a = _array(source, block.a, sizes, from_strides, run, width)
        np.copyto(_array(target, block.b, sizes, to_strides, run, width), a)
        return
    tiles = cut(block, TILE, pair)
    words = np.empty((2, max(tile.nbytes for tile in tiles) // 4), np.uint32)  # once: new memory costs page faults
    for tile in tiles:
        _join(source, target, tile, pair, words)


def _join(source: Bytes, target: Bytes, block: Block, pair: Dim, words: npt.NDArray[np.uint32]) -> None:
    """`target` word = first row's element | second row's element << 16, on machines that store the low byte first."""
    loops = sorted((d for d in block.dims[:-1] if d != pair and d[0] > 1), key=lambda d: -d[1])
    sizes = [n for n, _, _ in loops]
    from_strides, to_strides = [s for _, s, _ in loops], [t for _, _, t in loops]
    low, high = words[:, : prod(sizes)]
    for offset, out in ((0, low), (pair[1], high)):
        np.copyto(out.reshape(sizes), np.ndarray(sizes, np.uint16, source, block.a + offset, from_strides))
    np.left_shift(high, 16, out=high)
    np.bitwise_or(low, high, out=low)
    _runs(low.view(np.uint8), target, block.b, sizes, to_strides)


def _runs(words: Bytes, target: Bytes, b: int, sizes: Sequence[int], strides: Sequence[int]) -> None:
    """Store dense words: runs as long as the target has them."""
    run, loops = 4, list(zip(sizes, strides, strict=True))
    while loops and loops[-1][1] == run:
        run *= loops.pop()[0]
    sizes, strides = [n for n, _ in loops], [t for _, t in loops]
    dense = [run * prod(sizes[i + 1 :]) for i in range(len(sizes))]
    width = width_of(run, b, words.ctypes.data, target.ctypes.data, *strides)
    np.copyto(_array(target, b, sizes, strides, run, width), _array(words, 0, sizes, dense, run, width))


def _array(
    flat: Bytes, offset: int, sizes: Sequence[int], strides: Sequence[int], run: int, width: int
) -> npt.NDArray[Any]:
    return np.ndarray((*sizes, run // width), ELEMENTS[width], flat, offset, (*strides, width))


@functools.lru_cache(maxsize=256)
def cut(block: Block, limit: int, whole: Dim | None = None) -> tuple[Block, ...]:
    """The block in parts of at most `limit` bytes if cutting loops other than `whole` and the last suffices."""
    loops = [d for d in block.dims[:-1] if d != whole and d[0] > 1]
    if block.nbytes <= limit or not loops:
        return (block,)
    longest = max(loops, key=lambda d: d[1])
    size, s, t = longest
    step = max(1, limit // (block.nbytes // size))
    out: list[Block] = []
    for start in range(0, size, step):
        dims = tuple((min(step, size - start), s, t) if d is longest else d for d in block.dims)
        out += cut(Block(block.a + start * s, block.b + start * t, dims), limit, whole)
    return tuple(out)


def copy_blocks(source: torch.Tensor, target: torch.Tensor, blocks: Sequence[Block]) -> None:
    """Copy blocks of one flat uint8 tensor to another; both on the host, not overlapping.

    Large copies use as many threads as torch does.
    """
    a, b = source.numpy(), target.numpy()
    total = sum(block.nbytes for block in blocks)
    threads = min(torch.get_num_threads(), max(1, total // _WORTH_A_THREAD))
    parts = [part for block in blocks for part in cut(block, max(1, -(-block.nbytes // threads)))]
    if threads == 1:
        _all(a, b, parts)
        return
    shares = [parts[i::threads] for i in range(threads)]
    tasks: list[Callable[[], object]] = [functools.partial(_all, a, b, share) for share in shares]
    in_parallel(tasks)


def _all(source: Bytes, target: Bytes, blocks: Sequence[Block]) -> None:
    for block in blocks:
        copy_block_on_host(source, target, block)
