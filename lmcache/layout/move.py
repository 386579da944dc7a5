"""Gather, scatter and translate. `plan` determines source and target of each byte; `lmcache_kernels` copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lmcache.errors import LayoutError
from lmcache.layout.bound import BoundGroup, BoundKV
from lmcache.layout.host import apart, by_neighbours
from lmcache.layout.objects import ObjectLayout, same_planes
from lmcache.layout.plan import Copy, Ints, Job, job_of, units_of
from lmcache.layout.rows import rows_of
from lmcache.layout.slots import check_slots
from lmcache_kernels import (
    RowCopy,
    Strip,
    all_rows,
    copy_block,
    copy_by_kernel,
    copy_rows_on_host,
    merge_strips,
    on_host,
    prepared_put,
    refine,
    take_rows,
    view,
    width_of,
    worth_it,
)


def gather(
    kv: BoundKV,
    group: int,
    slots: torch.Tensor,
    outs: Sequence[torch.Tensor],
    layout: ObjectLayout,
    layers: slice | None = None,
) -> None:
    """Copies objects out of the engine's memory.

    Args:
        kv: the engine's memory.
        group: index of the layer group.
        slots: int64 `(objects × tokens,)`, the slot of each token, object after object; all resident (no −1).
        outs: one uint8 `(layout.nbytes,)` tensor per object.
        layout: layout of the objects.
        layers: range of local layers to copy, default all; bytes of other layers in `outs` stay unchanged.

    Raises:
        SlotError: slots are out of range, or have the wrong length or type. Nothing was copied.
        LayoutError, SpecError: the layout belongs to another spec, or a buffer has the wrong size.
    """
    bound = kv.groups[group]
    _check_buffers(outs, layout)
    ids = check_slots(slots, bound.num_slots, len(outs) * layout.tokens, missing=False, unique=False)
    staged = list(outs)
    for i, out in enumerate(outs):
        if out.device != kv.device:
            staged[i] = torch.empty(layout.nbytes, dtype=torch.uint8, device=kv.device)
            if layers is not None:
                staged[i].copy_(out)
    _copy(bound, layout, ids, staged, layers, into_paged=False)
    for out, stage in zip(outs, staged, strict=True):
        if out is not stage:
            out.copy_(stage)


def scatter(
    srcs: Sequence[torch.Tensor],
    layout: ObjectLayout,
    kv: BoundKV,
    group: int,
    slots: torch.Tensor,
    layers: slice | None = None,
) -> None:
    """Copies objects into the engine's memory. Skips tokens whose slot is −1; writes no slot that is not listed.

    Args:
        srcs: one uint8 `(layout.nbytes,)` tensor per object.
        layout: layout of the objects.
        kv: the engine's memory.
        group: index of the layer group.
        slots: int64 `(objects × tokens,)`, the slot of each token, object after object; distinct, or −1.
        layers: range of local layers to copy, default all.

    Raises:
        SlotError: slots are out of range or duplicated, or have the wrong length or type. Nothing was copied.
        LayoutError, SpecError: the layout belongs to another spec, or a buffer has the wrong size.
    """
    bound = kv.groups[group]
    _check_buffers(srcs, layout)
    ids = check_slots(slots, bound.num_slots, len(srcs) * layout.tokens, missing=True, unique=True)
    staged = [src if src.device == kv.device else src.to(kv.device) for src in srcs]
    _copy(bound, layout, ids, staged, layers, into_paged=True)


def _copy(
    bound: BoundGroup,
    layout: ObjectLayout,
    ids: Ints,
    buffers: Sequence[torch.Tensor],
    layers: slice | None,
    *,
    into_paged: bool,
) -> None:
    """Copies between pages and buffers of one device: with a kernel if there is one, else with numpy and tensor operations."""
    if not buffers:
        return
    wanted = range(*(layers or slice(None)).indices(layout.layers))
    starts = [buffer.data_ptr() for buffer in buffers]
    works, host = units_of(bound, layout, ids, len(buffers)), on_host(buffers[0])
    if not host:
        rows = [row for work in works for row in rows_of(work, bound, starts, wanted)]
        if copy_by_kernel(rows, into_a=into_paged, device=buffers[0].device):
            return
    by_index = []
    for work in works:
        plan = work.plan
        if plan.by_page and host and all(worth_it(s.dims, into_a=into_paged) for s in plan.strips):
            copy_rows_on_host(rows_of(work, bound, starts, wanted), into_a=into_paged)
        else:
            by_index.append(job_of(work, wanted))
    for move in _moves(bound, by_index, buffers, into_paged=into_paged):
        move()


def _moves(
    bound: BoundGroup, work: Sequence[Job], buffers: Sequence[torch.Tensor], *, into_paged: bool
) -> list[Callable[[], object]]:
    """Prepares all copies of a call before the first byte is copied: running Python between copies, which evict the CPU
    caches, took a tenth of the total time when measured.
    """
    moves: list[Callable[[], object]] = []
    for job in work:
        mine = buffers if len(job.objects) == len(buffers) else [buffers[number] for number in job.objects]
        for chosen, memory, distance in _batches(mine):
            alignment = _alignment([memory], distance)
            for part, numbers in zip(job.parts, job.numbers, strict=True):
                width = min(part.width, alignment)  # both are powers of two
                copy = Copy(part, numbers[chosen], bound.storages[part.storage], memory, distance, width)
                moves += _puts(copy, job.partial) if into_paged else _takes(copy)
    return moves


def _takes(copy: Copy) -> Iterator[Callable[[], object]]:
    """Gather: copies rows of the paged side into the buffer."""
    device, host = copy.storage.device, on_host(copy.storage)
    pieces = list(apart(copy)) if host else [copy]
    if host:
        runs = [by_neighbours(piece) for piece in pieces]
        if None not in runs:
            yield from (put for run in runs for put in run or ())
            return
    for piece in pieces:
        part = piece.part
        paged = all_rows(piece.storage, part.rows, piece.width)
        numbers = torch.from_numpy(piece.numbers).to(device)
        if len(piece.lead) == 1:
            yield partial(take_rows, paged, numbers.view(-1), view(piece.memory, part.back, piece.lead, piece.width))
            continue
        for i, rows in enumerate(numbers):
            back = replace(part.back, offset=part.back.offset + i * piece.distance)
            yield partial(take_rows, paged, rows, view(piece.memory, back, part.lead, piece.width))


def _puts(copy: Copy, missing: bool) -> Iterator[Callable[[], object]]:
    """Scatter: copies rows of the buffer to the paged side."""
    device = copy.storage.device
    for piece in apart(copy) if on_host(copy.storage) else (copy,):
        paged = all_rows(piece.storage, piece.part.rows, piece.width)
        numbers = torch.from_numpy(piece.numbers).to(device).view([size for size, _ in piece.lead])
        dense = view(piece.memory, piece.part.back, piece.lead, piece.width)
        yield prepared_put(paged, numbers, dense, partial=missing)


def _batches(buffers: Sequence[torch.Tensor]) -> list[tuple[slice, torch.Tensor, int]]:
    """Groups buffers that can be copied together: (indices, tensor over all of them, bytes from one to the next).

    One group if they are at equal distances in one storage, like adjacent arena slots; else one group per buffer.
    """
    first, count, nbytes = buffers[0], len(buffers), buffers[0].shape[0]
    if count == 1:
        return [(slice(0, 1), first, 0)]
    start = first.data_ptr()
    distance = buffers[1].data_ptr() - start
    if distance >= nbytes and all(b.data_ptr() == start + i * distance for i, b in enumerate(buffers)):
        storage = first.untyped_storage()
        span = (count - 1) * distance + nbytes
        if start + span <= storage.data_ptr() + storage.nbytes():  # otherwise separate allocations, adjacent by chance
            memory = first.as_strided((span,), (1,), int(first.storage_offset()))
            return [(slice(0, count), memory, distance)]
    return [(slice(i, i + 1), buffer, 0) for i, buffer in enumerate(buffers)]


def translate(src: torch.Tensor, src_layout: ObjectLayout, dst: torch.Tensor, dst_layout: ObjectLayout) -> None:
    """Converts one object from one layout to another of the same spec. Buffers: uint8 `(nbytes,)`, must not overlap."""
    _check_buffers([src], src_layout)
    _check_buffers([dst], dst_layout)
    strips = src_layout.translations.get(dst_layout)
    if strips is None:
        strips = src_layout.translations.setdefault(dst_layout, _translation(src_layout, dst_layout))
    if on_host(src) and on_host(dst):
        rows = [_row(src.data_ptr(), dst.data_ptr(), strip) for strip in strips]
        copy_rows_on_host(rows, into_a=False)
        return
    alignment = _alignment([src, dst])
    for strip in strips:
        start = strip.sources[0][1]
        strides = [n for _, a, b in strip.dims[:-1] for n in (a, b)]
        copy_block(
            src, start, dst, strip.offset, strip.dims, width_of(start, strip.offset, strip.run, alignment, *strides)
        )


def _row(source: int, target: int, strip: Strip) -> RowCopy:
    """Turns a whole strip into a single row between two objects."""
    zero = np.zeros(1, dtype=np.int64)
    return RowCopy(
        zero + source + strip.sources[0][1], zero[None], zero + target, zero + strip.offset, zero, strip.dims
    )


def _check_buffers(buffers: Sequence[torch.Tensor], layout: ObjectLayout) -> None:
    shape = (layout.nbytes,)
    for buffer in buffers:
        if buffer.dtype != torch.uint8 or buffer.shape != shape or not buffer.is_contiguous():
            raise LayoutError(
                f"an object of this layout is a contiguous uint8 tensor of shape {shape}, "
                f"not {buffer.dtype} {tuple(buffer.shape)}"
            )


def _alignment(buffers: Sequence[torch.Tensor], distance: int = 0) -> int:
    return width_of(distance, *(b.data_ptr() for b in buffers), *(int(b.storage_offset()) for b in buffers))


def _translation(a: ObjectLayout, b: ObjectLayout) -> tuple[Strip, ...]:
    same_planes(a, b)
    strips = []
    for name, left in a.places.items():
        right = b.places[name]
        source, target = left.addresses[0], right.addresses[0]
        layer = (a.layers, left.layer, right.layer)
        inner = ((a.heads, source.head, target.head), (left.itemsize, 1, 1))
        for token in refine(left.tokens, right.tokens):
            for elem in refine(source.elem, target.elem):
                start = ((0, source.base + token.a + elem.a),)
                dims = (layer, *token.dims, *elem.dims, *inner)
                strips.append(Strip(start, target.base + token.b + elem.b, 0, (), dims))
    return merge_strips(strips)
