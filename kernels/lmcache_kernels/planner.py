"""Splits a copy between the copy engine and a kernel, from addresses alone, with numpy.

A copy engine (DMA) uses no compute, but has a fixed cost per descriptor, so it is fast only for long pieces. A kernel copies
short pieces at full speed, but takes compute from the forward pass. So rows that are adjacent on *both* sides are merged into
the longest possible runs; long runs become descriptors, the rest stays a `RowCopy`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np

from lmcache_kernels.address import Dim, coalesce_runs, table
from lmcache_kernels.rowcopy import SKIP, Ints, RowCopy

DMA_BYTES = 28 << 10
"""Minimum run length for a descriptor. Published measurements on an H100 over PCIe: 3.8–6.9 GB/s for copies of 4–24 KiB,
44–52 GB/s from 28–64 KiB on; merging 8 KiB pieces raised 15 to 54 GB/s. The best value depends on the link's speed."""

SHUFFLE_BYTES = 1 << 10
"""Rows with runs shorter than this are a change of layout: searching them for adjacent runs is not worth the time."""

_MAX_RUNS = 16  # per row, for looking at runs individually; rows with more are treated as a change of layout too


@dataclass(frozen=True, eq=False)
class CopyPlan:
    """A `RowCopy`, split. Every byte of the copy is in exactly one descriptor or in one element of `kernel`.

    Attributes:
        a, b: int64 `(descriptors,)`, absolute start address of each run on side A and B.
        nbytes: int64 `(descriptors,)`, length of each run.
        kernel: the remaining copies, usually none or one.
    """

    a: Ints
    b: Ints
    nbytes: Ints
    kernel: tuple[RowCopy, ...]

    @property
    def dma_total(self) -> int:
        """Bytes copied by descriptors."""
        return int(self.nbytes.sum())


def plan(
    copy: RowCopy, *, link: bool = True, dma_bytes: int = DMA_BYTES, shuffle_bytes: int = SHUFFLE_BYTES
) -> CopyPlan:
    """Splits a copy between copy engine and kernel.

    Args:
        copy: the copy; its rows must not overlap on the side that is written.
        link: the copy crosses the link between host and device. If not, both sides are memory of one device, which a
            kernel reads and writes faster than any copy engine, so the kernel gets everything.
        dma_bytes: minimum bytes of a run that becomes a descriptor.
        shuffle_bytes: rows of several runs (after merging loops) shorter than this are left to the kernel unchanged.
    """
    if not link:
        return CopyPlan(*_no_descriptors(), _unless_empty(copy))
    dims = coalesce_runs(copy.dims)
    inner = dims[-1][0]
    places = prod(size for size, _, _ in dims[:-1])
    if places > 1 and inner < dma_bytes and (inner < shuffle_bytes or places > _MAX_RUNS):
        return CopyPlan(*_no_descriptors(), _unless_empty(copy))

    flat = _apart(copy, dims) if places > 1 else replace(copy, dims=dims)
    object_of, unit_of = np.nonzero(copy.a_units >= 0)
    if not object_of.size or not copy.layers:
        return CopyPlan(*_no_descriptors(), ())
    a = flat.a_units[object_of, unit_of]
    b = flat.b_base[object_of] + flat.b_units[unit_of]
    # Merge units first: they are adjacent in all layers alike, so a hundred layers cost no more than one.
    start_a, start_b, length, run_of = _merge(a, b, np.full(len(a), inner, dtype=np.int64))
    first_a, last_a = int(start_a.min()), int((start_a + length).max())
    bases = np.sort(flat.a_base)
    runs, layers = len(length), flat.layers
    if layers > 1 and bool((np.diff(bases) <= last_a - first_a).any()):  # runs of two layers may touch
        every_a = (flat.a_base[:, None] + start_a).reshape(-1)
        every_b = (flat.b_layers[:, None] + start_b).reshape(-1)
        d_a, d_b, d_length, joint_of = _merge(every_a, every_b, np.tile(length, layers))
        long = d_length >= dma_bytes
        taken = long[joint_of].reshape(layers, runs)
        d_a, d_b, d_length = d_a[long], d_b[long], d_length[long]
    else:
        long = length >= dma_bytes
        taken = np.broadcast_to(long, (layers, runs))
        d_a = (flat.a_base[:, None] + start_a[long]).reshape(-1)
        d_b = (flat.b_layers[:, None] + start_b[long]).reshape(-1)
        d_length = np.tile(length[long], layers)
    if not taken.any():
        return CopyPlan(*_no_descriptors(), (copy,))
    if taken.all():
        return CopyPlan(d_a, d_b, d_length, ())
    left = ~taken[:, run_of]  # (layers, resident rows)
    if places > 1 and bool((left.reshape(places, -1) == left[: copy.layers].reshape(1, -1)).all()):
        flat, left = copy, left[: copy.layers]  # only whole rows are left: keep their loops
    return CopyPlan(d_a, d_b, d_length, tuple(_rest(flat, object_of, unit_of, left)))


def some_objects(copy: RowCopy, objects: slice | Ints) -> RowCopy:
    """Restricts a copy to some objects."""
    return replace(copy, a_units=copy.a_units[objects], b_base=copy.b_base[objects])


def ranges(copy: RowCopy, side: str) -> tuple[Ints, Ints]:
    """Returns the bytes that a copy accesses on side "a" or "b" as (addresses, lengths) of disjoint, ascending ranges.

    Adjacent ranges are merged. Used to find what to copy between a buffer and its mirror, and what a kernel reads and writes.
    """
    rows = copy.rows()[side == "b"]
    dims = coalesce_runs(copy.dims)
    starts = rows[:, None] + _places(dims, side == "b")[None, :]
    return union(starts.reshape(-1), np.full(starts.size, dims[-1][0], dtype=np.int64))


def union(starts: Ints, lengths: Ints) -> tuple[Ints, Ints]:
    """Returns the union of byte ranges as (starts, lengths) of disjoint, non-adjacent ranges in ascending order."""
    if not starts.size:
        return starts, lengths
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate((starts + lengths)[order])
    first = np.ones(len(starts), dtype=bool)
    first[1:] = starts[1:] > ends[:-1]
    begin = starts[first]
    return begin, ends[np.append(first[1:], True)] - begin


def _no_descriptors() -> tuple[Ints, Ints, Ints]:
    none = np.zeros(0, dtype=np.int64)
    return none, none, none


def _unless_empty(copy: RowCopy) -> tuple[RowCopy, ...]:
    return (copy,) if copy.nbytes else ()


def _places(dims: tuple[Dim, ...], on_b: bool) -> Ints:
    """Offset of each run of a row, `(runs,)`, in the order of the loops."""
    return table(tuple((size, b if on_b else a) for size, a, b in dims[:-1]))


def _apart(copy: RowCopy, dims: tuple[Dim, ...]) -> RowCopy:
    """Turns the runs of a row into additional layers (places × layers), so that each row is a single run."""
    return replace(
        copy,
        a_base=(_places(dims, False)[:, None] + copy.a_base).reshape(-1),
        b_layers=(_places(dims, True)[:, None] + copy.b_layers).reshape(-1),
        dims=dims[-1:],
    )


def _merge(a: Ints, b: Ints, nbytes: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Merges pieces, given in any order, that are adjacent on both sides.

    Returns:
        Start on A, start on B and length of each run, and the index of the run that contains each piece.
    """
    apart = b - a  # the same for all pieces of a run
    order = np.lexsort((a, apart)) if bool((apart[1:] < apart[:-1]).any() or (a[1:] < a[:-1]).any()) else None
    if order is not None:
        a, b, nbytes, apart = a[order], b[order], nbytes[order], apart[order]
    first = np.ones(len(a), dtype=bool)
    first[1:] = (apart[1:] != apart[:-1]) | (a[1:] != (a + nbytes)[:-1])
    number = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    run_of = number
    if order is not None:
        run_of = np.empty_like(number)
        run_of[order] = number
    return a[starts], b[starts], np.add.reduceat(nbytes, starts), run_of


def _rest(copy: RowCopy, object_of: Ints, unit_of: Ints, left: np.ndarray) -> list[RowCopy]:
    """The rows marked in `left` (bool `(layers, resident rows)`) as copies, one for all layers with the same rows."""
    alike: dict[bytes, list[int]] = {}
    for layer, bits in enumerate(np.packbits(left, axis=1)):
        alike.setdefault(bits.tobytes(), []).append(layer)
    out = []
    for layers in alike.values():
        keep = left[layers[0]]
        if not keep.any():
            continue
        units = np.full_like(copy.a_units, SKIP)
        units[object_of[keep], unit_of[keep]] = copy.a_units[object_of[keep], unit_of[keep]]
        objects, columns = np.flatnonzero((units >= 0).any(axis=1)), np.flatnonzero((units >= 0).any(axis=0))
        out.append(
            replace(
                copy,
                a_base=copy.a_base[layers],
                a_units=units[np.ix_(objects, columns)],
                b_base=copy.b_base[objects],
                b_layers=copy.b_layers[layers],
                b_units=copy.b_units[columns],
            )
        )
    return out
