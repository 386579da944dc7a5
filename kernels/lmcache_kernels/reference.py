"""Reference copies in plain torch and numpy; every faster kernel must reproduce them bit for bit.

Rows are selected by an index on one side and are regular on the other. Elements are copied as the widest integers that all
offsets allow, so dtypes, NaN payloads and denormals do not matter. The primitives were chosen by measurement: on a CPU,
`torch.index_select` is the fastest gather (it supports any stride and writes in place), and numpy's indexed assignment of
rows is by far the fastest scatter. Other devices use torch operations only.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lmcache_kernels.address import Digits

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
ELEMENTS: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int16),
    4: np.dtype(np.int32),
    8: np.dtype(np.int64),
    16: np.dtype(np.complex128),
}
"""Width in bytes → numpy dtype; assigning an element copies its bits."""

WIDEST = 16


def width_of(*numbers: int) -> int:
    """Returns the widest element size, in bytes, that divides all these offsets, strides, lengths and pointers."""
    return gcd(WIDEST, *numbers)


@dataclass(frozen=True)
class Rows:
    """Rows in a flat byte tensor: row i starts at `offset + i·stride` and consists of loops `dims` of (size, stride), in bytes.

    The innermost loop is contiguous: `(n, 1)`.
    """

    offset: int
    stride: int
    dims: Digits

    @property
    def reach(self) -> int:
        """Bytes from the first byte of a row to the end of its last byte."""
        return 1 + sum((size - 1) * stride for size, stride in self.dims)

    def count(self, nbytes: int) -> int:
        """Number of whole rows that fit into `nbytes` bytes."""
        return max(0, (nbytes - self.offset - self.reach) // self.stride + 1)


def view(flat: torch.Tensor, rows: Rows, lead: Digits, width: int) -> torch.Tensor:
    """Returns a `(*lead sizes, *dims sizes)` view of `flat` (uint8, one-dimensional) with elements of `width` bytes.

    `lead`: (size, stride) of the leading dimensions, usually (number of rows, row stride).
    """
    start = int(flat.storage_offset()) + rows.offset
    if flat.shape[0] % width:
        flat = flat[: flat.shape[0] // width * width]
    outer = (*lead, *rows.dims[:-1])
    sizes = [*(size for size, _ in outer), rows.dims[-1][0] // width]
    strides = [*(stride // width for _, stride in outer), 1]
    return flat.view(_DTYPES[width]).as_strided(sizes, strides, start // width)


def all_rows(flat: torch.Tensor, rows: Rows, width: int) -> torch.Tensor:
    """Returns a `(rows, *dims sizes)` view of every whole row that fits into `flat`, indexed by row number."""
    return view(flat, rows, ((rows.count(flat.shape[0]), rows.stride),), width)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether numpy can access this memory."""
    return tensor.device.type == "cpu"


def take_rows(source: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
    """Copies `out[i] = source[index[i]]`. `source`, `out`: views of one dtype; `index`: int64, any shape, in range."""
    if index.dim() == 1:
        torch.index_select(source, 0, index, out=out)
    else:
        out.copy_(torch.index_select(source, 0, index.reshape(-1)).view(out.shape))


def put_rows(target: torch.Tensor, index: torch.Tensor, source: torch.Tensor, *, partial: bool = False) -> None:
    """Copies `target[index[i]] = source[i]`; other rows stay untouched. Indices must be distinct and in range.

    With `partial`, negative indices are skipped. On a CPU, large copies use torch's number of threads.
    """
    prepared_put(target, index, source, partial=partial)()


def prepared_put(
    target: torch.Tensor, index: torch.Tensor, source: torch.Tensor, *, partial: bool = False
) -> Callable[[], object]:
    """Prepares `put_rows` in Python and returns a function that performs the copy."""
    if not on_host(target):
        if partial:
            present = index >= 0
            index, source = index[present], source[present]
        return functools.partial(target.index_copy_, 0, index.reshape(-1), source.reshape(-1, *target.shape[1:]))
    memory, numbers, values = target.numpy(), index.numpy(), source.numpy()
    if partial:
        kept = numbers >= 0
        numbers, values = numbers[kept], values[kept]
    return prepared_assignment(memory, numbers, values)


def prepared_assignment(
    memory: npt.NDArray[Any], numbers: npt.NDArray[Any], values: npt.NDArray[Any]
) -> Callable[[], object]:
    """Prepares `memory[numbers] = values`, on torch's number of threads if it is large."""
    threads = torch.get_num_threads()
    if threads == 1 or values.nbytes < _MIN_PARALLEL_BYTES:
        return functools.partial(memory.__setitem__, numbers, values)
    shares = [functools.partial(memory.__setitem__, n, v) for n, v in _shares(numbers, values, threads)]
    return functools.partial(in_parallel, shares)


_MIN_PARALLEL_BYTES = 8 << 20


def _shares(
    numbers: npt.NDArray[Any], values: npt.NDArray[Any], threads: int
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Splits an assignment into equal parts along the longest dimension of the index."""
    axis = int(np.argmax(numbers.shape))
    for n, v in zip(np.array_split(numbers, threads, axis), np.array_split(values, threads, axis), strict=True):
        if n.size:
            yield n, v


def in_parallel(tasks: Sequence[Callable[[], object]]) -> None:
    """Runs all tasks, the first on the calling thread and each other one on a new thread, and joins them.

    Raises the first failure. Starting a thread takes 50 µs and the copies take milliseconds, so there is no thread pool.
    """
    failures: list[BaseException] = []

    def guarded(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            failures.append(error)

    helpers = [threading.Thread(target=guarded, args=(task,), name="lmcache-copy") for task in tasks[1:]]
    for helper in helpers:
        helper.start()
    for task in tasks[:1]:
        guarded(task)
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def copy_block(
    src: torch.Tensor,
    src_offset: int,
    dst: torch.Tensor,
    dst_offset: int,
    dims: Sequence[tuple[int, int, int]],
    width: int,
) -> None:
    """Performs one strided copy: loops (size, stride in src, stride in dst), the innermost contiguous on both sides."""
    a = Rows(src_offset, 1, tuple((size, s) for size, s, _ in dims))
    b = Rows(dst_offset, 1, tuple((size, d) for size, _, d in dims))
    source, target = view(src, a, (), width), view(dst, b, (), width)
    if on_host(source) and on_host(target):
        np.copyto(target.numpy(), source.numpy())  # up to twice as fast as torch's copy for permuted loops
    else:
        target.copy_(source)
