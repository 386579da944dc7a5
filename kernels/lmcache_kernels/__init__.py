"""Copies KV bytes between addresses. Depends on tensors, offsets and strides only; not on engines, specs or layouts.

`address` defines the terms (plain integers); `reference` holds the copies that every faster kernel must reproduce bit for bit.
"""

from lmcache_kernels.address import (
    Digits,
    Dim,
    Piece,
    PlaneAddress,
    Strip,
    coalesce,
    join_digits,
    merge_strips,
    refine,
    table,
)
from lmcache_kernels.checks import CopyError
from lmcache_kernels.dispatch import copy_by_kernel, fallbacks
from lmcache_kernels.hostrows import copy_rows_on_host, worth_it
from lmcache_kernels.planner import DMA_BYTES, CopyPlan, plan, some_objects
from lmcache_kernels.reference import (
    ELEMENTS,
    Rows,
    all_rows,
    copy_block,
    on_host,
    prepared_assignment,
    prepared_put,
    put_rows,
    take_rows,
    view,
    width_of,
)
from lmcache_kernels.rowcopy import SKIP, RowCopy

__all__ = [
    "DMA_BYTES",
    "ELEMENTS",
    "SKIP",
    "CopyError",
    "CopyPlan",
    "Digits",
    "Dim",
    "Piece",
    "PlaneAddress",
    "RowCopy",
    "Rows",
    "Strip",
    "all_rows",
    "coalesce",
    "copy_block",
    "copy_by_kernel",
    "copy_rows_on_host",
    "fallbacks",
    "join_digits",
    "merge_strips",
    "on_host",
    "plan",
    "prepared_assignment",
    "prepared_put",
    "put_rows",
    "refine",
    "some_objects",
    "table",
    "take_rows",
    "view",
    "width_of",
    "worth_it",
]
