"""Moving KV bytes between address tables. Knows tensors, offsets and strides; nothing of engines, specs or layouts.

`address` is the vocabulary (plain integers), `reference` the movers that any faster kernel must equal.
"""

from lmcache_kernels.address import Digits, Dim, Piece, PlaneAddress, Strip, coalesce, merge_strips, refine, table
from lmcache_kernels.checks import CopyError
from lmcache_kernels.dispatch import copy_by_kernel, fallbacks
from lmcache_kernels.hostrows import copy_rows_on_host, worth_it
from lmcache_kernels.planner import DMA_BYTES, CopyPlan, plan, some_layers, some_objects
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
    "merge_strips",
    "on_host",
    "plan",
    "prepared_assignment",
    "prepared_put",
    "put_rows",
    "refine",
    "some_layers",
    "some_objects",
    "table",
    "take_rows",
    "view",
    "width_of",
    "worth_it",
]
