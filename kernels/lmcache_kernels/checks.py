"""What is refused before anything is launched: copies that would overwrite themselves, and memory that is not what it seems."""

from __future__ import annotations

import numpy as np
import torch

from lmcache_kernels.rowcopy import Ints, RowCopy

_MANY = 1 << 20


class CopyError(ValueError):
    """A copy that cannot be meant. Nothing was moved."""


def check_buffers(*tensors: torch.Tensor) -> None:
    """Tensors that one kernel works on: one device, one dtype, and each with a contiguous last axis.

    Raises:
        CopyError: they are not; the message names both sides.
    """
    first = tensors[0]
    for tensor in tensors:
        if tensor.device != first.device:
            raise CopyError(f"tensors on {first.device} and {tensor.device}; a kernel works on one device")
        if tensor.dtype != first.dtype:
            raise CopyError(f"tensors of {first.dtype} and {tensor.dtype}; bits are moved, not converted")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise CopyError(
                f"the last axis of a tensor of shape {tuple(tensor.shape)} has stride {tensor.stride(-1)}; it must be "
                "contiguous"
            )


def check_copy(copy: RowCopy, *, into_a: bool, itemsize: int = 1) -> None:
    """No byte is written twice, and every element lies at a multiple of its size.

    Rows may interleave (heads of a page among those of the next). Whether they meet is decided run by run up to a million
    runs of one layer; beyond that, rows with gaps are only compared by where they begin.

    Args:
        copy: what is to be moved.
        into_a: direction, so which side is written.
        itemsize: bytes of an element, a power of two.

    Raises:
        CopyError: naming the address, and the object and unit where two rows meet.
    """
    alignment = copy.alignment if itemsize <= 16 else 0
    if alignment % itemsize:
        raise CopyError(
            f"elements of {itemsize} bytes, but addresses, strides or runs are multiples of {alignment} bytes only"
        )
    layers, side = (copy.a_base, "pages") if into_a else (copy.b_layers, "objects")
    if len(np.unique(layers)) < len(layers):
        raise CopyError(f"two layers begin at the same address {int(layers[0])} of the {side} that are written")
    objects, units = np.nonzero(copy.a_units >= 0)
    starts = copy.a_units[objects, units] if into_a else copy.b_base[objects] + copy.b_units[units]
    loops = [(size, a if into_a else b) for size, a, b in copy.dims]
    reach = 1 + sum((size - 1) * stride for size, stride in loops)
    length = copy.row_bytes if reach == copy.row_bytes else 1
    pieces, rows = starts, np.arange(len(starts))
    runs = copy.row_bytes // copy.run
    if reach != copy.row_bytes and len(starts) * runs <= _MANY:
        inside = np.zeros(1, dtype=np.int64)
        for size, stride in loops[:-1]:
            inside = (inside[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        pieces, rows = (starts[:, None] + inside).reshape(-1), np.repeat(rows, len(inside))
        length = copy.run
    meeting = _first_overlap(pieces, length)
    if meeting is not None:
        one, other = (rows[i] for i in meeting)
        raise CopyError(
            f"unit {units[one]} of object {objects[one]} and unit {units[other]} of object {objects[other]} write the same "
            f"bytes of the {side}, at offset {int(max(pieces[meeting[0]], pieces[meeting[1]]))}"
        )


def _first_overlap(starts: Ints, length: int) -> tuple[int, int] | None:
    """Two pieces of `length` bytes that share one, or None."""
    order = np.argsort(starts, kind="stable")
    near = np.flatnonzero(np.diff(starts[order]) < length)
    return (int(order[near[0]]), int(order[near[0] + 1])) if len(near) else None
