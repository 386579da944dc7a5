"""Validates copies before a launch: no byte is written twice, and buffers have the expected device, dtype and strides."""

from __future__ import annotations

import numpy as np
import torch

from lmcache_kernels.address import table
from lmcache_kernels.rowcopy import Ints, RowCopy

_MAX_CHECKED_RUNS = 1 << 20


class CopyError(ValueError):
    """An invalid copy. Nothing was copied."""


def check_buffers(*tensors: torch.Tensor) -> None:
    """Checks that the tensors of one kernel have one device, one dtype, and a contiguous last axis each.

    Raises:
        CopyError: they do not; the message names the values that differ.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.device != first.device:
            raise CopyError(f"tensors on {first.device} and {tensor.device}; a kernel runs on one device")
        if tensor.dtype != first.dtype:
            raise CopyError(f"tensors of {first.dtype} and {tensor.dtype}; a copy does not convert dtypes")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise CopyError(
                f"the last axis of a tensor of shape {tuple(tensor.shape)} has stride {tensor.stride(-1)}; it must be "
                "contiguous"
            )


def check_copy(copy: RowCopy, *, into_a: bool, itemsize: int = 1) -> None:
    """Checks that no byte is written twice and that every element is aligned to its size.

    Rows may interleave (heads of one page between those of the next). Overlap is checked run by run for up to a million
    runs per layer; beyond that, only the start addresses of rows with gaps are compared. Of layers, only the start addresses
    are compared.

    Args:
        copy: the copy to check.
        into_a: the direction, i.e. which side is written.
        itemsize: bytes per element, a power of two.

    Raises:
        CopyError: names the address, and the object and unit of two rows that overlap.
    """
    alignment = copy.alignment if itemsize <= 16 else 0
    if alignment % itemsize:
        raise CopyError(
            f"elements of {itemsize} bytes, but addresses, strides or runs are multiples of {alignment} bytes only"
        )
    layers, side = (copy.a_base, "pages") if into_a else (copy.b_layers, "objects")
    if len(np.unique(layers)) < len(layers):
        raise CopyError(f"two layers start at the same address {int(layers[0])} of the {side} that are written")
    objects, units = np.nonzero(copy.a_units >= 0)
    starts = copy.a_units[objects, units] if into_a else copy.b_base[objects] + copy.b_units[units]
    loops = [(size, a if into_a else b) for size, a, b in copy.dims]
    reach = 1 + sum((size - 1) * stride for size, stride in loops)
    length = copy.row_bytes if reach == copy.row_bytes else 1
    pieces, rows = starts, np.arange(len(starts))
    runs = copy.row_bytes // copy.run
    if reach != copy.row_bytes and len(starts) * runs <= _MAX_CHECKED_RUNS:
        inside = table(tuple(loops[:-1]))
        pieces, rows = (starts[:, None] + inside).reshape(-1), np.repeat(rows, len(inside))
        length = copy.run
    overlap = _first_overlap(pieces, length)
    if overlap is not None:
        one, other = (rows[i] for i in overlap)
        raise CopyError(
            f"unit {units[one]} of object {objects[one]} and unit {units[other]} of object {objects[other]} write the same "
            f"bytes of the {side}, at offset {int(max(pieces[overlap[0]], pieces[overlap[1]]))}"
        )


def _first_overlap(starts: Ints, length: int) -> tuple[int, int] | None:
    """Indices of two pieces of `length` bytes that overlap, or None."""
    order = np.argsort(starts, kind="stable")
    near = np.flatnonzero(np.diff(starts[order]) < length)
    return (int(order[near[0]]), int(order[near[0] + 1])) if len(near) else None
