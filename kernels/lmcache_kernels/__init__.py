"""Moving KV bytes between address tables. Knows tensors, offsets and strides; nothing of engines, specs or layouts.

`address` is the vocabulary (plain integers), `reference` the plain-torch movers that any faster kernel must equal.
"""

from lmcache_kernels.address import Digits, Dim, Piece, PlaneAddress, Strip, coalesce, merge_strips, refine, table

__all__ = ["Digits", "Dim", "Piece", "PlaneAddress", "Strip", "coalesce", "merge_strips", "refine", "table"]
