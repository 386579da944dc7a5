"""Moving KV bytes between address tables. Knows tensors, offsets and strides; nothing of engines, specs or layouts.

`address` is the vocabulary (plain integers), `reference` the movers that any faster kernel must equal.
"""

from lmcache_kernels.address import Digits, Dim, Piece, PlaneAddress, Strip, coalesce, merge_strips, refine, table
from lmcache_kernels.planner import CopyPlan, plan, some_layers, some_objects
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
    "ELEMENTS",
    "SKIP",
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
]
