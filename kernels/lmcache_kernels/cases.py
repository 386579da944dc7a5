"""Named copies that occur in engines: compiled ahead of time (`aot`) and benchmarked on a GPU.

The geometry is that of an 8B model (8 kv heads of 128, bf16, blocks of 16 tokens) unless the name gives another.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from lmcache_kernels.address import Dim
from lmcache_kernels.rowcopy import RowCopy


@dataclass(frozen=True)
class Case:
    """One kind of copy.

    Attributes:
        name: source and target order.
        dims: loops within a row, see `RowCopy`.
        a_unit, b_unit: bytes from one row to the next on each side; also the alignment of rows.
        wide, narrow: required width in bytes of the wider and of the narrower of load and store.
        why: the reason if that is less than 16.
    """

    name: str
    dims: tuple[Dim, ...]
    a_unit: int
    b_unit: int
    wide: int = 16
    narrow: int = 16
    why: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes copied per row."""
        return prod(size for size, _, _ in self.dims)

    def copy(self, *, layers: int = 1, objects: int = 1, units: int = 2, a: int = 1 << 30, b: int = 1 << 31) -> RowCopy:
        """Builds a copy of consecutive rows between memory at addresses `a` and `b`; layers and objects are contiguous."""

        def ints(count: int, step: int, start: int = 0) -> np.ndarray:
            return np.arange(count, dtype=np.int64) * step + start

        pages = ints(objects * units, self.a_unit).reshape(objects, units)
        layer_b = self.b_unit * units
        return RowCopy(
            ints(layers, self.a_unit * objects * units, a),
            pages,
            ints(objects, layer_b * layers, b),
            ints(layers, layer_b),
            ints(units, self.b_unit),
            self.dims,
        )


def _transposed(itemsize: int) -> Case:
    """Keys of vLLM's `vec` pages, `head dim slot`, to `slot head dim`."""
    dims = ((8, 2048 * itemsize, 128 * itemsize), (128, 16 * itemsize, itemsize), (16, itemsize, 1024 * itemsize))
    name = {2: "bf16", 4: "fp32"}[itemsize]
    return Case(f"vec K {name}, turned", (*dims, (itemsize, 1, 1)), 32768 * itemsize, 16384 * itemsize)


CASES = (
    Case("pages as they are", ((65536, 1, 1),), 65536, 65536),
    Case("pages, K and V apart", ((32768, 1, 1),), 32768, 32768),
    Case("pages of 12 KiB", ((12288, 1, 1),), 12288, 12288),
    Case("MLA pages of 64 tokens", ((73728, 1, 1),), 73728, 73728),
    Case("tokens of a pool, 2 KiB", ((2048, 1, 1),), 2048, 2048),
    Case("tokens of a pool, 384 bytes", ((384, 1, 1),), 384, 384),
    Case("packed to canonical", ((16, 512, 2048), (8, 8192, 256), (256, 1, 1)), 65536, 32768),
    Case("packed to canonical, fp8", ((16, 256, 1024), (8, 4096, 128), (128, 1, 1)), 32768, 16384),
    Case("NHD to HND", ((8, 256, 4096), (16, 2048, 256), (256, 1, 1)), 32768, 32768),
    _transposed(2),
    _transposed(4),
    Case("AMX K, turned", ((2, 4096, 4096 * 8), (64, 64, 4), (16, 4, 2048), (4, 1, 1)), 8192, 65536),
    Case("AMX V, turned", ((8, 1024, 32), (16, 64, 4096), (16, 4, 2), (2, 2, 2048), (2, 1, 1)), 8192, 65536),
    Case("rows of 24 bytes", ((24, 1, 1),), 24, 24, 8, 8, "24 bytes are no multiple of 16"),
    Case("rows of 12 bytes", ((12, 1, 1),), 12, 12, 4, 4, "12 bytes are no multiple of 8"),
    Case("rows of 6 bytes", ((6, 1, 1),), 6, 6, 2, 2, "6 bytes are no multiple of 4"),
    Case("rows of 7 bytes", ((7, 1, 1),), 7, 7, 1, 1, "7 bytes are no multiple of 2"),
)

CONVERTED = Case("packed to canonical, converted", ((16, 512, 1024), (8, 8192, 128), (128, 1, 1)), 65536, 16384)
"""Rows of 2-byte floats converted to 1-byte codes: the innermost loop counts elements."""

CONVERTED_FP32 = Case("packed to canonical, converted", ((16, 1024, 1024), (8, 16384, 128), (128, 1, 1)), 131072, 16384)
"""The same with 4-byte floats."""
