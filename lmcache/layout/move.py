"""Gather, scatter and translate: which bytes go where. The bytes themselves are moved by `lmcache_kernels`.

A copy is compiled once per (group, object layout) into `Strip`s: what is contiguous on both sides moves as one run. Per
call, only slots are looked at: whole pages in order go as pages, anything else as (runs of) tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

import numpy as np
import numpy.typing as npt
import torch
from lmcache_kernels import Digits, PlaneAddress, Strip, merge_strips, refine
from lmcache_kernels.reference import Rows, copy_block, gather_rows, scatter_rows, view, width_of

from lmcache.errors import LayoutError, SpecError
from lmcache.layout.objects import ObjectLayout, PlaneBytes, same_planes
from lmcache.layout.paged import BoundGroup, BoundKV
from lmcache.layout.slots import check_slots

_Ints = npt.NDArray[np.int64]


def gather(
    kv: BoundKV,
    group: int,
    slots: torch.Tensor,
    outs: Sequence[torch.Tensor],
    layout: ObjectLayout,
    layers: slice | None = None,
) -> None:
    """Copy objects out of the engine's memory.

    Args:
        kv: the engine's memory.
        group: index of the layer group.
        slots: int64 `(objects × tokens,)`, the slot of each token of each object in turn; all resident (no −1).
        outs: one uint8 `(layout.nbytes,)` tensor per object.
        layout: how to arrange the objects' bytes.
        layers: range of local layers to copy, default all; bytes of other layers in `outs` stay as they are.

    Raises:
        SlotError: slots out of range, of the wrong length or type. Nothing was copied.
        LayoutError, SpecError: the layout is of another spec, or a buffer has the wrong size.
    """
    bound = kv.groups[group]
    _check_buffers(outs, layout)
    ids = check_slots(slots, bound.num_slots, len(outs) * layout.tokens, missing=False, unique=False)
    staged = outs
    if any(out.device != kv.device for out in outs):
        staged = [torch.empty(layout.nbytes, dtype=torch.uint8, device=kv.device) for _ in outs]
        if layers is not None:
            for stage, out in zip(staged, outs, strict=True):
                stage.copy_(out)
    for job in _jobs(bound, layout, ids, len(outs), layers):
        _gather_job(bound, job, staged, kv.device)
    if staged is not outs:
        for stage, out in zip(staged, outs, strict=True):
            out.copy_(stage)


def scatter(
    srcs: Sequence[torch.Tensor],
    layout: ObjectLayout,
    kv: BoundKV,
    group: int,
    slots: torch.Tensor,
    layers: slice | None = None,
) -> None:
    """Copy objects into the engine's memory. Tokens whose slot is −1 are skipped; no slot that is not named is written.

    Args:
        srcs: one uint8 `(layout.nbytes,)` tensor per object.
        layout: how their bytes are arranged.
        kv: the engine's memory.
        group: index of the layer group.
        slots: int64 `(objects × tokens,)`, distinct, or −1.
        layers: range of local layers to copy, default all.

    Raises:
        SlotError: slots out of range, duplicated, of the wrong length or type. Nothing was copied.
        LayoutError, SpecError: the layout is of another spec, or a buffer has the wrong size.
    """
    bound = kv.groups[group]
    _check_buffers(srcs, layout)
    ids = check_slots(slots, bound.num_slots, len(srcs) * layout.tokens, missing=True, unique=True)
    staged = [src if src.device == kv.device else src.to(kv.device) for src in srcs]
    for job in _jobs(bound, layout, ids, len(srcs), layers):
        _scatter_job(bound, job, staged, kv.device)


def translate(src: torch.Tensor, src_layout: ObjectLayout, dst: torch.Tensor, dst_layout: ObjectLayout) -> None:
    """Rearrange one object's bytes from one layout to another of the same spec. Buffers: uint8 `(nbytes,)`, no overlap."""
    _check_buffers([src], src_layout)
    _check_buffers([dst], dst_layout)
    strips = src_layout.translations.get(dst_layout)
    if strips is None:
        strips = src_layout.translations.setdefault(dst_layout, _translation(src_layout, dst_layout))
    for strip in strips:
        base = strip.sources[0][1]
        width = _width(strip, strip.run, base, src.data_ptr(), dst.data_ptr())
        copy_block(src, base, dst, strip.offset, strip.dims, width)


def _check_buffers(buffers: Sequence[torch.Tensor], layout: ObjectLayout) -> None:
    for buffer in buffers:
        if buffer.dtype != torch.uint8 or buffer.shape != (layout.nbytes,) or not buffer.is_contiguous():
            raise LayoutError(
                f"an object of this layout is a contiguous uint8 tensor of shape ({layout.nbytes},), "
                f"not {buffer.dtype} {tuple(buffer.shape)}"
            )


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


# ---------------------------------------------------------------- compiled copies


@dataclass(frozen=True)
class _Plan:
    """Strips of one group and object layout, for units of a page or of one token.

    `strides[tag]`: (page stride, slot digits) of the planes with that tag on the paged side.
    """

    strips: tuple[Strip, ...]
    strides: tuple[tuple[int, Digits], ...]
    by_page: bool
    units: int


@dataclass(frozen=True)
class _Job:
    """Copy `strips`, whose unit u of object o lies at `address[tag][o, u]` on the paged side (negative = skip)."""

    plan: _Plan
    objects: Sequence[int]
    addresses: tuple[_Ints, ...]
    merged: tuple[int, ...]
    layers: range


def _jobs(bound: BoundGroup, layout: ObjectLayout, ids: _Ints, objects: int, layers: slice | None) -> list[_Job]:
    """Split a call into objects made of whole pages, and others."""
    tokens, block = layout.tokens, bound.block_tokens
    which = range(*(layers or slice(None)).indices(layout.layers))
    by_object = ids.reshape(objects, tokens)
    plan = _plan(bound, layout, by_page=True)
    jobs = []
    rest = np.arange(objects)
    if plan is not None:
        pages = ids.reshape(objects, plan.units, block)
        first = pages[:, :, :1]
        whole = ((pages - first == np.arange(block)) & (first % block == 0)) | ((pages == -1) & (first == -1))
        good = whole.all(axis=(1, 2))
        chosen = first[good, :, 0]
        if len(chosen):
            jobs.append(_job(plan, np.flatnonzero(good), np.where(chosen < 0, -1, chosen // block), 1, which))
        rest = np.flatnonzero(~good)
    if len(rest):
        plan = _plan(bound, layout, by_page=False)
        assert plan is not None
        jobs.append(_job(plan, rest, by_object[rest], block, which))
    return jobs


def _job(plan: _Plan, objects: _Ints, ids: _Ints, block: int, layers: range) -> _Job:
    addresses, merged = [], []
    for page, slot in plan.strides:
        if plan.by_page:
            step, address = page, ids * page
        elif slot:
            table = PlaneAddress(0, 0, page, 0, slot, (), 1).T
            step, address = slot[-1][1], ids // block * page + table[ids % block]
        else:
            step, address = page, ids * page
        if ids.size and ids.min() < 0:  # a run of missing units continues itself, and nothing else
            address = np.where(ids < 0, np.arange(ids.shape[1]) * step - (1 << 62), address)
        breaks = np.flatnonzero((np.diff(address, axis=1) != step).any(axis=0)) + 1
        merged.append(int(np.gcd.reduce(breaks, initial=ids.shape[1])) if len(breaks) else ids.shape[1])
        addresses.append(address)
    return _Job(plan, objects.tolist(), tuple(addresses), tuple(merged), layers)


def _plan(bound: BoundGroup, layout: ObjectLayout, *, by_page: bool) -> _Plan | None:
    key = (layout, by_page)
    if key not in bound.plans:
        bound.plans[key] = _compile(bound, layout, by_page=by_page)
    plan: _Plan | None = bound.plans[key]
    return plan


def _compile(bound: BoundGroup, layout: ObjectLayout, *, by_page: bool) -> _Plan | None:
    """None if pages are asked for but the object has no pages of that size."""
    mine = [(p.name, p.dtype, p.elems) for p in bound.planes]
    theirs = [(p.name, p.dtype, p.elems) for p in layout.planes]
    if (mine, bound.layers, bound.heads) != (theirs, layout.layers, layout.heads):
        raise SpecError(
            f"the layout is for {theirs} × {layout.layers} layers × {layout.heads} heads, "
            f"the engine holds {mine} × {bound.layers} × {bound.heads}"
        )
    if by_page and (bound.block_tokens == 1 or layout.tokens % bound.block_tokens):
        return None
    strips: list[Strip] = []
    strides: list[tuple[int, Digits]] = []
    for addresses, place in zip(bound.addresses, layout.places.values(), strict=True):
        tags = []
        for address in addresses:
            kind = (address.page, address.slot)
            if kind not in strides:
                strides.append(kind)
            tags.append(strides.index(kind))
        for start, stop in _alike(addresses):
            made = _plane_strips(addresses, range(start, stop), place, tags[start], bound, layout, by_page)
            if made is None:
                return None
            strips += made
    units = layout.tokens // bound.block_tokens if by_page else layout.tokens
    return _Plan(merge_strips(strips), tuple(strides), by_page, units)


def _alike(addresses: Sequence[PlaneAddress]) -> list[tuple[int, int]]:
    """Ranges of layers whose strides agree (in practice one: all)."""
    shapes = [(a.page, a.head, a.slot, a.elem) for a in addresses]
    cuts = [0, *(i for i in range(1, len(shapes)) if shapes[i] != shapes[i - 1]), len(shapes)]
    return list(pairwise(cuts))


def _plane_strips(
    addresses: Sequence[PlaneAddress],
    layers: range,
    place: PlaneBytes,
    tag: int,
    bound: BoundGroup,
    layout: ObjectLayout,
    by_page: bool,
) -> list[Strip] | None:
    """Strips of one plane for a range of layers with equal strides."""
    source, target = addresses[layers[0]], place.addresses[layers[0]]
    units, slot_pieces = place.tokens, refine((), ())
    if by_page:
        split = _split(place.tokens, bound.block_tokens)
        if split is None:
            return None
        units = split[0]
        slot_pieces = refine(source.slot, split[1])
    inner = ((bound.heads, source.head, target.head), (place.itemsize, 1, 1))
    strips = []
    for slot in slot_pieces:
        for elem in refine(source.elem, target.elem):
            sources = tuple((addresses[i].storage, addresses[i].base + slot.a + elem.a) for i in layers)
            dims = (*slot.dims, *elem.dims, *inner)
            strips.append(Strip(sources, target.base + slot.b + elem.b, place.layer, units, dims, tag, layers[0]))
    return strips


def _split(digits: Digits, inner: int) -> tuple[Digits, Digits] | None:
    """The digits of whole pages, and those of the `inner` tokens inside one; None where no digit boundary is there."""
    outer, rest, left = list(digits), [], inner
    while left > 1:
        size, stride = outer.pop()
        if size <= left and left % size == 0:
            rest.append((size, stride))
            left //= size
        elif size % left == 0:
            outer.append((size // left, stride * left))
            rest.append((left, stride))
            left = 1
        else:
            return None
    return _joined(outer), tuple(reversed(rest))


def _joined(digits: Sequence[tuple[int, int]]) -> Digits:
    """Digits that continue each other as one; at least one digit remains."""
    out: list[tuple[int, int]] = []
    for size, stride in digits:
        if out and (size == 1 or out[-1][0] == 1):
            out[-1] = out[-1] if size == 1 else (size, stride)
        elif out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out or [(1, 0)])


# ---------------------------------------------------------------- execution


def _width(strip: Strip, *numbers: int) -> int:
    return width_of(strip.offset, strip.layer, *numbers, strip.run, *(n for _, a, b in strip.dims[:-1] for n in (a, b)))


@dataclass(frozen=True)
class _Move:
    """A strip with consecutive units joined into runs, ready to execute."""

    strip: Strip
    address: _Ints
    layers: range


def _moves(job: _Job) -> list[_Move]:
    out = []
    for strip in job.plan.strips:
        address, m = job.addresses[strip.tag], job.merged[strip.tag]
        page, slot = job.plan.strides[strip.tag]
        step = page if job.plan.by_page or not slot else slot[-1][1]
        units = _joined(strip.units)
        if m > 1 and len(units) == 1:
            count, stride = units[0]
            dims = ((m, step, stride), *strip.dims)
            strip = replace(strip, dims=dims, units=((count // m, stride * m),)).tidy()
            address = address[:, ::m]
        else:
            strip = replace(strip, units=units)
        own = range(strip.first, strip.first + len(strip.sources))
        layers = range(max(job.layers.start, own.start), min(job.layers.stop, own.stop))
        if layers:
            out.append(_Move(strip, address, layers))
    return out


def _gather_job(bound: BoundGroup, job: _Job, outs: Sequence[torch.Tensor], device: torch.device) -> None:
    for part in _parts(bound, job, [out.data_ptr() for out in outs]):
        for row, number in enumerate(job.objects):
            index = torch.from_numpy(part.index[row]).to(device)
            dst = view(outs[number], part.back, part.lead, part.width)
            gather_rows(bound.storages[part.storage], part.rows, index, dst, part.width)


def _scatter_job(bound: BoundGroup, job: _Job, srcs: Sequence[torch.Tensor], device: torch.device) -> None:
    for part in _parts(bound, job, [src.data_ptr() for src in srcs]):
        for row, number in enumerate(job.objects):
            index = torch.from_numpy(part.index[row]).to(device)
            src = view(srcs[number], part.back, part.lead, part.width)
            if part.partial:
                present = index >= 0
                index, src = index[present], src[present]
            scatter_rows(src, bound.storages[part.storage], part.rows, index, part.width)


@dataclass(frozen=True)
class _Part:
    """One strip for layers that share a storage: `index[object]` has the shape of the leading dimensions `lead`.

    `rows` lie on the paged side, `back` describes the inside of a row in the object; negative indices are skipped.
    """

    storage: int
    rows: Rows
    back: Rows
    lead: Digits
    index: _Ints
    width: int
    partial: bool


def _parts(bound: BoundGroup, job: _Job, pointers: Sequence[int]) -> Iterator[_Part]:
    for move in _moves(job):
        strip = move.strip
        dims = tuple((size, a) for size, a, _ in strip.dims)
        back = tuple((size, b) for size, _, b in strip.dims)
        page, slot = job.plan.strides[strip.tag]
        steps = [page] if job.plan.by_page else [page, *(stride for _, stride in slot)]
        for storage, layers in _by_storage(strip, move.layers):
            bases = np.array([strip.sources[i - strip.first][1] for i in layers], dtype=np.int64)
            base = int(bases.min())
            step = gcd(*steps, *(bases - base).tolist())
            offset = strip.offset + (layers[0] - strip.first) * strip.layer
            flat = bound.storages[storage]
            width = _width(strip, step, base, offset, flat.data_ptr(), *(s for _, s in strip.units), *pointers)
            lead = _joined([(len(layers), strip.layer), *strip.units])
            address = move.address[:, None, :] + (bases - base)[None, :, None]
            index = np.where(move.address[:, None, :] < 0, -1, address // step)
            shape = (len(job.objects), *(size for size, _ in lead))
            partial = bool((move.address < 0).any())
            yield _Part(
                storage, Rows(base, step, dims), Rows(offset, 1, back), lead, index.reshape(shape), width, partial
            )


def _by_storage(strip: Strip, layers: range) -> list[tuple[int, range]]:
    """Runs of layers that lie in the same storage."""
    out: list[tuple[int, range]] = []
    for layer in layers:
        storage = strip.sources[layer - strip.first][0]
        if out and out[-1][0] == storage:
            out[-1] = (storage, range(out[-1][1].start, layer + 1))
        else:
            out.append((storage, range(layer, layer + 1)))
    return out
