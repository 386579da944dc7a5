"""`RowCopy`: one copy of many rows, as passed to a kernel: absolute addresses, factored into a few short lists.

Side A is an engine's memory, where the block table determines the address of each row (a page, or some tokens), with one
tensor per layer. Side B are objects, whose rows are regular. A model's pages and a hundred objects are then described by a
few short lists of integers instead of one address per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from lmcache_kernels.address import Dim

Ints = npt.NDArray[np.int64]

SKIP = -1
"""Value in `RowCopy.a_units` for a row that is not resident: it is neither read nor written."""


@dataclass(frozen=True, eq=False)
class RowCopy:
    """Row (object o, layer l, unit u) starts at `a_base[l] + a_units[o, u]` on side A and at
    `b_base[o] + b_layers[l] + b_units[u]` on side B and consists of the loops `dims`. All numbers are bytes.

    Attributes:
        a_base: int64 `(layers,)`, absolute addresses.
        a_units: int64 `(objects, units)`, offsets; negative = skip this row in all layers.
        b_base: int64 `(objects,)`, absolute addresses.
        b_layers: int64 `(layers,)`, offsets.
        b_units: int64 `(units,)`, offsets.
        dims: loops (size, stride on A, stride on B); the innermost is `(n, 1, 1)`: n contiguous bytes on both sides.
    """

    a_base: Ints
    a_units: Ints
    b_base: Ints
    b_layers: Ints
    b_units: Ints
    dims: tuple[Dim, ...]

    def __post_init__(self) -> None:
        shapes = (self.a_base.shape, self.a_units.shape, self.b_base.shape, self.b_layers.shape, self.b_units.shape)
        (layers,), (objects, units) = self.a_base.shape, self.a_units.shape
        if shapes != ((layers,), (objects, units), (objects,), (layers,), (units,)):
            raise ValueError(f"lists of shapes {shapes} do not describe the same layers, objects and units")
        if not self.dims or self.dims[-1][1:] != (1, 1) or min(size for size, _, _ in self.dims) < 1:
            raise ValueError(
                f"loops {self.dims} must be of at least one position and end in contiguous bytes (n, 1, 1)"
            )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.a_base)

    @property
    def objects(self) -> int:
        """Number of objects."""
        return len(self.b_base)

    @property
    def units(self) -> int:
        """Number of rows per object and layer."""
        return len(self.b_units)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(size for size, _, _ in self.dims)

    @property
    def run(self) -> int:
        """Bytes of a row that are contiguous on both sides."""
        return self.dims[-1][0]

    @property
    def nbytes(self) -> int:
        """Bytes copied, without skipped rows."""
        return int((self.a_units >= 0).sum()) * self.layers * self.row_bytes

    @cached_property
    def row_alignment(self) -> int:
        """The widest power of two, up to 16 bytes, that divides the address of every row on both sides."""
        resident = self.a_units[self.a_units >= 0]
        lists = (self.a_base, resident, self.b_base, self.b_layers, self.b_units)
        return _divisor(*(int(np.bitwise_or.reduce(numbers, initial=0)) for numbers in lists))

    @cached_property
    def alignment(self) -> int:
        """The widest power of two, up to 16 bytes, that divides every address, stride and run."""
        return _divisor(self.row_alignment, self.run, *(n for _, a, b in self.dims[:-1] for n in (a, b)))

    def inside(self) -> Iterator[tuple[int, int, int]]:
        """Yields (offset on A, offset on B, bytes) of each contiguous run of a row."""
        for place in product(*(range(size) for size, _, _ in self.dims[:-1])):
            yield (
                sum(i * a for i, (_, a, _) in zip(place, self.dims, strict=False)),
                sum(i * b for i, (_, _, b) in zip(place, self.dims, strict=False)),
                self.run,
            )

    def rows(self) -> tuple[Ints, Ints]:
        """Addresses of all resident rows, (on A, on B), each int64 `(rows,)`; layers outermost, units innermost."""
        resident = self.a_units >= 0
        a = self.a_base[:, None] + self.a_units[resident][None, :]
        b = (self.b_base[:, None] + self.b_units[None, :])[resident][None, :] + self.b_layers[:, None]
        return a.reshape(-1), b.reshape(-1)


def _divisor(*numbers: int) -> int:
    """Returns the largest power of two, up to 16, that divides all numbers."""
    bits = 16
    for number in numbers:
        bits |= number
    return bits & -bits
