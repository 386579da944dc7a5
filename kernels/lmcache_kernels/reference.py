"""The movers in plain torch: what every faster kernel must equal, bit for bit.

Rows are named by an index on one side and lie regularly on the other. Elements are moved as integers as wide as all
offsets allow, so that no dtype, NaN payload or denormal can matter. On CPU the scatter goes through numpy, whose indexed
assignment is the faster one; other devices see torch operations only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch

_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
WIDEST = 16


def width_of(*numbers: int) -> int:
    """The widest element, in bytes, that divides all these offsets, strides and lengths."""
    return gcd(WIDEST, *numbers)


@dataclass(frozen=True)
class Rows:
    """Rows in a flat byte tensor: row i begins at `offset + i·stride`; inside lie loops of (size, stride), in bytes.

    The innermost loop is contiguous: `(n, 1)`.
    """

    offset: int
    stride: int
    dims: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> int:
        """Bytes from the first to past the last byte of one row."""
        return 1 + sum((size - 1) * stride for size, stride in self.dims)


def view(flat: torch.Tensor, rows: Rows, shape: Sequence[tuple[int, int]], width: int) -> torch.Tensor:
    """`(*shape sizes, *dims)` view of `flat` (uint8, one-dimensional), elements `width` bytes wide.

    `shape`: (size, stride) of the leading dimensions, usually (number of rows, row stride).
    """
    start = flat.storage_offset()
    if flat.shape[0] % width:
        flat = flat[: flat.shape[0] // width * width]
    sizes = [size for size, _ in shape] + [size for size, _ in rows.dims[:-1]]
    strides = [stride // width for _, stride in shape] + [stride // width for _, stride in rows.dims[:-1]]
    sizes.append(rows.dims[-1][0] // width)
    strides.append(1)
    return flat.view(_DTYPES[width]).as_strided(sizes, strides, (start + rows.offset) // width)


def all_rows(flat: torch.Tensor, rows: Rows, width: int) -> torch.Tensor:
    """View of every whole row that fits into `flat` from `rows.offset` on."""
    count = (flat.shape[0] - rows.offset - rows.reach) // rows.stride + 1
    return view(flat, rows, [(max(count, 0), rows.stride)], width)


def gather_rows(src: torch.Tensor, rows: Rows, index: torch.Tensor, dst: torch.Tensor, width: int) -> None:
    """`dst[i] = row index[i] of src` for every i; `dst` has the index's dimensions first, then the rows' own."""
    source = all_rows(src, rows, width)
    if index.dim() == 1:
        torch.index_select(source, 0, index, out=dst)
    else:
        dst.copy_(torch.index_select(source, 0, index.reshape(-1)).view(dst.shape))


def scatter_rows(src: torch.Tensor, dst: torch.Tensor, rows: Rows, index: torch.Tensor, width: int) -> None:
    """`row index[i] of dst = src[i]` for every i; other rows stay untouched. Indices must be distinct."""
    target = all_rows(dst, rows, width)
    if target.device.type == "cpu":
        target.numpy()[index.numpy()] = src.numpy()
    else:
        target.index_copy_(0, index.reshape(-1), src.reshape(-1, *target.shape[1:]))


def copy_block(
    src: torch.Tensor,
    src_offset: int,
    dst: torch.Tensor,
    dst_offset: int,
    dims: Sequence[tuple[int, int, int]],
    width: int,
) -> None:
    """One strided copy: loops (size, stride in src, stride in dst), the innermost contiguous on both sides."""
    a = Rows(src_offset, 1, tuple((size, s) for size, s, _ in dims))
    b = Rows(dst_offset, 1, tuple((size, d) for size, _, d in dims))
    view(dst, b, [], width).copy_(view(src, a, [], width))
