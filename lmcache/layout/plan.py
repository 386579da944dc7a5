"""Compiles the copy between an engine's pages and an object: once per layout; each call then only processes its slots.

A copy is a set of `Strip`s: bytes that are contiguous on both sides are copied as one run. Objects that consist of whole pages
in order are copied page by page; all others token by token, with adjacent tokens merged into runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import gcd
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lmcache.errors import SpecError
from lmcache.layout.bound import BoundGroup
from lmcache.layout.objects import ObjectLayout, PlaneBytes
from lmcache_kernels import Digits, PlaneAddress, Rows, Strip, join_digits, merge_strips, refine, table, width_of

Ints = npt.NDArray[np.int64]
_MISSING = -(1 << 62)
_LONG_RUN = 4096


class Part(NamedTuple):
    """One strip, for layers that share a storage.

    `rows` describes a row on the paged side, `back` the same bytes in the object, whose rows have the leading dimensions
    `lead`: `layer` bytes from one layer to the next, then `units`. Row (layer, unit) of the paged side has the number
    `layer_rows[layer] + address[unit] // step`. `join`: consecutive units merged into one; `width`: bytes per element. `lead`:
    (size, stride) of the leading dimensions, as few as possible.
    """

    storage: int
    rows: Rows
    back: Rows
    layer: int
    units: Digits
    layer_rows: Ints
    step: int
    tag: int
    join: int
    width: int
    lead: Digits


class Copy(NamedTuple):
    """A part for objects in one buffer, ready to be copied.

    `numbers[object]` are row numbers in `storage`, negative = skip, in the shape of `part.lead`; objects start every
    `distance` bytes of `memory`; `width` bytes divide every offset, stride, length and pointer.
    """

    part: Part
    numbers: Ints
    storage: torch.Tensor
    memory: torch.Tensor
    distance: int
    width: int

    @property
    def lead(self) -> Digits:
        """(size, stride) of the rows of all objects in `memory`, as few digits as possible."""
        return joined([(len(self.numbers), self.distance), *self.part.lead])


class Job(NamedTuple):
    """Copies `parts` of `objects`. `numbers[part][object]` are row numbers, negative = skip, in the shape of `part.lead`."""

    objects: Sequence[int]
    parts: tuple[Part, ...]
    numbers: list[Ints]
    partial: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """The strips of one group and object layout, for units of a page or of one token.

    `kinds[tag]` = (page stride, slot digits; empty if by page) on the paged side of the planes with that tag.
    `joinable[tag]`: merging units lengthens some runs.
    """

    strips: tuple[Strip, ...]
    kinds: tuple[tuple[int, Digits], ...]
    by_page: bool
    joinable: tuple[bool, ...]
    parts: dict[object, tuple[Part, ...]] = field(default_factory=dict, repr=False)


class Units(NamedTuple):
    """Objects copied by the same plan: `ids` are page numbers (`block` = 1) or slots, int64 `(objects, units)`."""

    plan: Plan
    objects: Sequence[int]
    ids: Ints
    block: int

    def addresses(self, tag: int) -> Ints:
        """Byte offset of each unit within a layer on the paged side; undefined for missing units (−1)."""
        page, slot = self.plan.kinds[tag]
        return self.ids * page if not slot else self.ids // self.block * page + table(slot)[self.ids % self.block]


def units_of(bound: BoundGroup, layout: ObjectLayout, ids: Ints, objects: int) -> list[Units]:
    """Divides the objects into those copied by page and those copied by token.

    Args:
        ids: int64 `(objects × tokens,)`, checked slots; −1 = skip.
        objects: number of objects.
    """
    if not objects:
        return []
    plan = _plan(bound, layout, by_page=True)
    out = []
    rest = range(objects)
    if plan is not None:
        numbers, good = _whole_pages(ids, bound.block_tokens, objects, bool(ids.min() < 0))
        if good is None:
            return [Units(plan, rest, numbers, 1)]
        if good.any():
            out.append(Units(plan, np.flatnonzero(good).tolist(), numbers[good], 1))
        rest = np.flatnonzero(~good).tolist()
    if rest:
        plan = _plan(bound, layout, by_page=False)
        assert plan is not None
        out.append(Units(plan, rest, ids.reshape(objects, -1)[rest], bound.block_tokens))
    return out


def _whole_pages(ids: Ints, block: int, objects: int, partial: bool) -> tuple[Ints, npt.NDArray[np.bool_] | None]:
    """Returns page numbers `(objects, pages)`, and a mask of the objects that are whole pages in order (None = all).

    A page without resident tokens counts as whole and has number −1.
    """
    pages = ids.reshape(-1, block)
    first = pages[:, 0]
    numbers = first // block  # −1 // block is −1
    whole = pages == (numbers * block)[:, None] + np.arange(block)
    if not partial and whole.all():
        return numbers.reshape(objects, -1), None
    if partial:
        whole |= (pages == -1).all(axis=1)[:, None]
    return numbers.reshape(objects, -1), whole.reshape(objects, -1).all(axis=1)


def job_of(work: Units, layers: range) -> Job:
    """Returns the copy with rows selected by an index."""
    plan, ids = work.plan, work.ids
    partial = bool(ids.size and ids.min() < 0)
    addresses, joins = [], []
    for tag, (page, slot) in enumerate(plan.kinds):
        step, address = slot[-1][1] if slot else page, work.addresses(tag)
        if partial:  # missing units are adjacent to each other only
            address = np.where(ids < 0, np.arange(ids.shape[1]) * step + _MISSING, address)
        addresses.append(address)
        joins.append(_join(address, step) if plan.joinable[tag] else 1)
    key = (tuple(joins), layers.start, layers.stop)
    parts = plan.parts.get(key)
    if parts is None:
        parts = plan.parts.setdefault(key, _parts(plan, joins, layers))
    numbers = []
    for part in parts:
        units = addresses[part.tag] if part.join == 1 else addresses[part.tag][:, :: part.join]
        rows = part.layer_rows[None, :, None] + (units // part.step)[:, None, :]
        numbers.append(rows.reshape(len(work.objects), *(size for size, _ in part.lead)))
    return Job(work.objects, parts, numbers, partial)


def _join(address: Ints, step: int) -> int:
    """Returns the largest group size such that, in every object, consecutive units of each group are `step` bytes apart."""
    breaks = np.flatnonzero((np.diff(address, axis=1) != step).any(axis=0)) + 1
    return gcd(address.shape[1], int(np.gcd.reduce(breaks))) if len(breaks) else address.shape[1]


# ---------------------------------------------------------------- compiled once


def _plan(bound: BoundGroup, layout: ObjectLayout, *, by_page: bool) -> Plan | None:
    key = (layout, by_page)
    if key not in bound.plans:
        bound.plans[key] = _compile(bound, layout, by_page=by_page)
    plan: Plan | None = bound.plans[key]
    return plan


def _compile(bound: BoundGroup, layout: ObjectLayout, *, by_page: bool) -> Plan | None:
    """Returns None if `by_page` is requested but the object cannot be copied by page."""
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
    kinds: list[tuple[int, Digits]] = []
    for addresses, place in zip(bound.addresses, layout.places.values(), strict=True):
        for layers in _alike(addresses):
            kind = (addresses[layers[0]].page, () if by_page else addresses[layers[0]].slot)
            if kind not in kinds:
                kinds.append(kind)
            made = _plane_strips(addresses, layers, place, kinds.index(kind), bound, by_page)
            if made is None:
                return None
            strips += made
    merged = merge_strips(strips)
    joinable = tuple(any(s.tag == tag and _joinable(s) for s in merged) for tag in range(len(kinds)))
    return Plan(merged, tuple(kinds), by_page, joinable)


def _joinable(strip: Strip) -> bool:
    """Whether merging units can be faster: the object's units are regular, and runs are short."""
    return len(strip.units) == 1 and (len(strip.dims) > 1 or strip.run < _LONG_RUN)


def _alike(addresses: Sequence[PlaneAddress]) -> list[range]:
    """Ranges of layers with equal strides (in practice a single range)."""
    shapes = [(a.page, a.head, a.slot, a.elem) for a in addresses]
    cuts = [0, *(i for i in range(1, len(shapes)) if shapes[i] != shapes[i - 1]), len(shapes)]
    return [range(a, b) for a, b in pairwise(cuts)]


def _plane_strips(
    addresses: Sequence[PlaneAddress], layers: range, place: PlaneBytes, tag: int, bound: BoundGroup, by_page: bool
) -> list[Strip] | None:
    """Strips of one plane for a range of layers with equal strides; None if `by_page` does not fit the object."""
    source, target = addresses[layers[0]], place.addresses[layers[0]]
    units, slot_pieces = place.tokens, refine((), ())
    if by_page:
        split = split_digits(place.tokens, bound.block_tokens)
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
            start = target.base + slot.b + elem.b
            strips.append(Strip(sources, start, place.layer, joined(units), dims, tag, layers[0]))
    return strips


def split_digits(digits: Digits, inner: int) -> tuple[Digits, Digits] | None:
    """Splits digits into those of the pages and those of the `inner` tokens of a page; None if no digit can be cut there."""
    outer, rest, left = list(digits), [], inner
    while left > 1:
        size, stride = outer.pop()
        if left % size == 0:
            rest.append((size, stride))
            left //= size
        elif size % left == 0:
            outer.append((size // left, stride * left))
            rest.append((left, stride))
            left = 1
        else:
            return None
    return tuple(outer), tuple(reversed(rest))


def joined(digits: Sequence[tuple[int, int]]) -> Digits:
    """Merges contiguous digits; returns at least one digit."""
    return join_digits(digits) or ((1, digits[-1][1] if digits else 0),)


# ---------------------------------------------------------------- compiled once per merging of units


def _parts(plan: Plan, joins: Sequence[int], layers: range) -> tuple[Part, ...]:
    parts = []
    for original in plan.strips:
        strip, join = _with_joined_units(plan, original, joins[original.tag])
        page, slot = plan.kinds[strip.tag]
        strides = [page, *(stride for _, stride in slot)]
        own = range(strip.first, strip.first + len(strip.sources))
        wanted = range(max(layers.start, own.start), min(layers.stop, own.stop))
        for storage, mine in _by_storage(strip, wanted):
            bases = np.array([strip.sources[i - strip.first][1] for i in mine], dtype=np.int64)
            base = int(bases.min())
            step = gcd(*strides, *(bases - base).tolist())
            offset = strip.offset + (mine[0] - strip.first) * strip.layer
            inner = [n for _, a, b in strip.dims[:-1] for n in (a, b)]
            width = width_of(base, step, offset, strip.run, strip.layer, *(stride for _, stride in strip.units), *inner)
            rows = Rows(base, step, tuple((size, a) for size, a, _ in strip.dims))
            back = Rows(offset, 1, tuple((size, b) for size, _, b in strip.dims))
            lead, layer_rows = joined([(len(bases), strip.layer), *strip.units]), (bases - base) // step
            parts.append(
                Part(storage, rows, back, strip.layer, strip.units, layer_rows, step, strip.tag, join, width, lead)
            )
    return tuple(parts)


def _with_joined_units(plan: Plan, strip: Strip, join: int) -> tuple[Strip, int]:
    """Merges `join` consecutive units of the strip if that can be faster; returns the strip and the units merged."""
    if join == 1 or not _joinable(strip):
        return strip, 1
    page, slot = plan.kinds[strip.tag]
    step = slot[-1][1] if slot else page
    count, stride = strip.units[0]
    dims = ((join, step, stride), *strip.dims)
    return replace(strip, dims=dims, units=((count // join, stride * join),)).tidy(), join


def _by_storage(strip: Strip, layers: range) -> list[tuple[int, range]]:
    """(storage, range of layers) for consecutive layers in the same storage."""
    out: list[tuple[int, range]] = []
    for layer in layers:
        storage = strip.sources[layer - strip.first][0]
        if out and out[-1][0] == storage:
            out[-1] = (storage, range(out[-1][1].start, layer + 1))
        else:
            out.append((storage, range(layer, layer + 1)))
    return out
