"""`RowCopy` executed on host memory, one `memmove` for each run: the plainest reading of what it says."""

from __future__ import annotations

import ctypes

from lmcache_kernels import RowCopy


def move_rows(copy: RowCopy, *, into_a: bool, **_: object) -> None:
    """Copy every row, between host addresses."""
    for a, b in zip(*(side.tolist() for side in copy.rows()), strict=True):
        for at_a, at_b, nbytes in copy.inside():
            source, target = (b + at_b, a + at_a) if into_a else (a + at_a, b + at_b)
            ctypes.memmove(target, source, nbytes)
