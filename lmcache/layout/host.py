"""Optimisations of copies between host memories: avoiding numpy's overlap copies, and sequential reads for the prefetcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from math import gcd

import numpy as np

from lmcache.layout.plan import Copy
from lmcache_kernels import ELEMENTS, Rows, prepared_assignment, table

_LONG_ROW = 32 << 10  # bytes; above this, restarting the prefetcher takes a negligible part of the time
_BYTES_PER_PUT = 256 << 10  # below this, a call costs more than it saves
_MIN_GATHER_BYTES = 4 << 20


def apart(copy: Copy) -> Iterator[Copy]:
    """Splits a copy into pieces whose rows are all above or all below its buffer in memory.

    numpy compares the bounds of source and target; if these overlap, as they do when the buffer is located between two
    pools of a window, it first makes a temporary copy of the source.
    """
    part, numbers, storage = copy.part, copy.numbers, copy.storage
    low = copy.memory.data_ptr() - storage.data_ptr()
    high = low + copy.memory.nbytes
    if low >= storage.nbytes or high <= 0:
        yield copy
        return
    by_layer = numbers.reshape(len(numbers), len(part.layer_rows), -1)
    above = (part.rows.offset + by_layer.max(axis=(0, 2)) * part.step >= high).tolist()
    skip = -(-(high - part.rows.offset) // part.step)  # rows from this number on start after the buffer
    for is_above, group in groupby(range(len(above)), above.__getitem__):
        layers = list(group)
        chosen = slice(layers[0], layers[-1] + 1)
        piece, rows, layer_rows = by_layer[:, chosen], part.rows, part.layer_rows[chosen]
        if is_above:
            rows = replace(rows, offset=rows.offset + skip * part.step)
            piece, layer_rows = piece - skip, layer_rows - skip  # negative (skipped) rows stay negative
        back = replace(part.back, offset=part.back.offset + layers[0] * part.layer)
        lead = part.lead
        if len(layers) < len(above):  # the outermost of the leading dimensions counts layers, perhaps joined with units
            (size, stride), *inner = lead
            lead = ((size // len(above) * len(layers), stride), *inner)
        moved = part._replace(rows=rows, back=back, layer_rows=layer_rows, lead=lead)
        yield copy._replace(
            part=moved,
            numbers=piece.reshape(len(numbers), *(size for size, _ in moved.lead)),
            storage=storage if is_above else storage[: max(0, low)],
        )


def by_neighbours(copy: Copy) -> list[Callable[[], object]] | None:
    """Prepares a gather of adjacent pages that the objects hold in another order; None if the pages are not adjacent.

    A gather is slow at reading short rows at random addresses, because the prefetcher restarts at each row. Writing them at
    random addresses costs almost nothing. So if the pages, sorted by address, form long runs (a sequence whose blocks were
    freed and allocated again in another order), runs are read sequentially and each row is written to its place.
    """
    part, numbers = copy.part, copy.numbers
    row, nbytes = part.rows.dims[0][0], numbers.size * part.rows.dims[0][0]
    if len(part.rows.dims) > 1 or row % part.step or row > _LONG_ROW or nbytes < _MIN_GATHER_BYTES:
        return None
    objects, layers, next_row = len(numbers), len(part.layer_rows), row // part.step
    units = numbers.reshape(objects, layers, -1)[:, 0].reshape(-1) - part.layer_rows[0]
    if 2 * np.count_nonzero(np.diff(units) == next_row) >= units.size - 1:
        return None  # in order already, or a single unit
    order = np.argsort(units)
    cuts = np.flatnonzero(np.diff(units[order]) != next_row) + 1
    layer_step = int(part.layer_rows[-1] - part.layer_rows[0]) // max(1, layers - 1)
    even = layers == 1 or (layer_step > 0 and bool((np.diff(part.layer_rows) == layer_step).all()))
    if (len(cuts) + 1) * (1 if even else layers) * _BYTES_PER_PUT > nbytes:
        return None
    offsets = np.arange(objects)[:, None, None] * copy.distance + table(part.lead).reshape(layers, -1)
    grain = gcd(copy.distance, *(stride for _, stride in part.lead))
    places = (offsets.transpose(1, 0, 2) // grain).reshape(layers, -1)[:, order]
    groups = [range(layers)] if even else [range(i, i + 1) for i in range(layers)]
    # numpy instead of torch: there may be many of these arrays, and each takes time before the first byte is copied.
    width, element = copy.width, ELEMENTS[copy.width]
    count = Rows(part.back.offset, grain, part.back.dims).count(copy.memory.shape[0])
    inner = row // width
    target = np.ndarray((count, inner), element, copy.memory.numpy(), part.back.offset, (grain, width))
    pool, ordered, starts = copy.storage.numpy(), units[order], part.layer_rows.tolist()
    puts = []
    for first, last in pairwise([0, *cuts.tolist(), len(order)]):
        unit = int(ordered[first])
        for group in groups:
            start = part.rows.offset + (unit + starts[group.start]) * part.step
            strides = (layer_step * part.step if even else 0, row, width)
            source = np.ndarray((len(group), last - first, inner), element, pool, start, strides)
            puts.append(prepared_assignment(target, places[group.start : group.stop, first:last], source))
    return puts
