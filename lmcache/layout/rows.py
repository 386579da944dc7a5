"""Converts copies of `plan` to `RowCopy`s, the absolute row addresses that kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lmcache.layout.bound import BoundGroup
from lmcache.layout.objects import ObjectLayout
from lmcache.layout.plan import Ints, Units, units_of
from lmcache_kernels import SKIP, RowCopy, table


def row_copies(bound: BoundGroup, layout: ObjectLayout, ids: Ints, starts: Sequence[int]) -> list[RowCopy]:
    """Returns the copies between slots `ids` (side A) and objects at addresses `starts` (side B).

    Args:
        bound: the engine's memory.
        layout: layout of the objects.
        ids: int64 `(objects × tokens,)`, checked slots; −1 = skip.
        starts: address of each object's first byte.
    """
    layers = range(layout.layers)
    return [
        copy for units in units_of(bound, layout, ids, len(starts)) for copy in rows_of(units, bound, starts, layers)
    ]


def rows_of(units: Units, bound: BoundGroup, starts: Sequence[int], layers: range) -> list[RowCopy]:
    """Converts `units` to rows.

    Adjacent units are not merged into longer runs: kernel specialisations then depend on the layouts alone, not on the block
    table, and a planner that needs longer pieces merges them itself.
    """
    pointers = [storage.data_ptr() for storage in bound.storages]
    every = np.asarray(starts, dtype=np.int64)
    out = []
    offsets = [np.where(units.ids < 0, SKIP, units.addresses(tag)) for tag in range(len(units.plan.kinds))]
    objects = every if len(units.objects) == len(every) else every[units.objects]
    for strip in units.plan.strips:
        own = range(max(layers.start, strip.first), min(layers.stop, strip.first + len(strip.sources)))
        if not own:
            continue
        sources = (strip.sources[layer - strip.first] for layer in own)
        out.append(
            RowCopy(
                np.array([pointers[storage] + base for storage, base in sources], dtype=np.int64),
                offsets[strip.tag],
                objects,
                strip.offset + (np.asarray(own, dtype=np.int64) - strip.first) * strip.layer,
                table(strip.units),
                strip.dims,
            )
        )
    return out
