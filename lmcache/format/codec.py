"""Objects between an arena slot and a tier: encode on the way down, verify and translate on the way up.

Every byte that comes from a tier passes `ObjectCodec.load`, which checks the header (magic, caps, own digest, that it is *this*
object), the length and each segment's checksum before the slot counts as filled. What fails is a status, never an
exception.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import torch

from lmcache.errors import FormatError, FormatVersionError, LayoutError
from lmcache.format import reslice
from lmcache.format.file import HEADER_PROBE, Form, Header, PlaneForm, SegmentSpan, decode_header, header_bytes, verify
from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout, translate
from lmcache.memory import anonymous
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Range, Read, Result, Tier, Write

_LAYOUTS_KEPT = 64


class Loaded(NamedTuple):
    """How a load ended, and in which order the bytes lie now (None unless it went well)."""

    result: Result
    layout: ObjectLayout | None = None


class ObjectCodec:
    """Encodes, verifies and translates the objects of one rank. Thread-safe; each thread has its own buffers.

    Args:
        spec: what this rank's KV is.
        chunk_tokens: tokens per object.
        order: the order in which objects are written; either is read.
        reslice: what is missing may be put together from objects of other tensor-parallel splits, see `lmcache.format.reslice`.
    """

    def __init__(
        self,
        spec: KVSpec,
        chunk_tokens: int,
        *,
        order: Literal["canonical", "native"] = "canonical",
        reslice: bool = False,
    ) -> None:
        self._spec = spec
        self._chunk_tokens = chunk_tokens
        self._reslice = reslice
        self._order = order
        self._canonical = [ObjectLayout.canonical(spec, g, chunk_tokens) for g in range(len(spec.groups))]
        self._forms: dict[ObjectLayout, Form] = {}
        self._layouts: dict[bytes, ObjectLayout] = {}
        self._others: dict[Rect, ObjectCodec] = {}
        self._local = threading.local()

    def save(self, tier: Tier, id: ObjectId, payload: torch.Tensor, layout: ObjectLayout) -> Result:
        """Write the object whose bytes are `payload` (uint8, in `layout`); they must not change until this returns."""
        target = layout if self._order == "native" else self._canonical[id.group]
        if target.signature != layout.signature:
            out = self._buffer("save", target.nbytes)
            translate(payload, layout, out, target)
            payload = out
        [result] = tier.write([Write(id, self._form(target).encode(id, _bytes(payload)))])
        return result

    def contains(self, tier: Tier, ids: Sequence[ObjectId], deadline: float | None) -> list[Result]:
        """Whether `load` would find them."""
        results = tier.contains(ids, deadline=deadline)
        if self._reslice and any(result.status is Status.MISSING for result in results):
            return reslice.contains(self._spec, tier, ids, results, deadline)
        return results

    def load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """Read and verify an object, or what it can be put together from, into `out`: see `_load`."""
        loaded = self._load(tier, id, out, want, deadline)
        if loaded.result.status is not Status.MISSING or not self._reslice:
            return loaded
        canonical = self._canonical[id.group]
        straight = want is None or want.signature == canonical.signature
        target = out if straight else self._buffer("reslice", canonical.nbytes)
        result = reslice.assemble(self._spec, tier, id, target, self._load_piece, deadline)
        if result.status is not Status.OK:
            return Loaded(result)
        if want is not None and not straight:
            translate(target, canonical, out, want)
            return Loaded(result, want)
        return Loaded(result, canonical)

    def _load_piece(self, spec: KVSpec, tier: Tier, id: ObjectId, out: torch.Tensor, deadline: float | None) -> Result:
        rect = spec.rects[id.group]
        io = self._others.get(rect)
        if io is None:
            io = self._others.setdefault(rect, ObjectCodec(spec, self._chunk_tokens))
        return io.load(tier, id, out, ObjectLayout.canonical(spec, id.group, self._chunk_tokens), deadline).result

    def _load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """Read and verify an object into `out` (uint8, `object_bytes`), in `want`'s order, or as it is stored.

        `out` is undefined unless the result is `OK`.
        """
        # Nearly all objects were written by someone with our settings: header and payload then take one round trip.
        guess = self._canonical[id.group] if self._order == "canonical" or want is None else want
        straight = want is None or guess.signature == want.signature
        target = out if straight else self._buffer("load", guess.nbytes)
        start = self._form(guess).payload_offset
        head = _bytes(self._buffer("head", max(start, HEADER_PROBE)))[:start]
        ranges = [Range(0, start), Range(start, guess.nbytes)]
        [result] = tier.read_into([Read(id, [head, _bytes(target)], ranges)], deadline=deadline)
        if result.status is not Status.OK:
            return Loaded(result)
        try:
            head = head[: result.nbytes]  # beyond it lies what this buffer held before
            if header_bytes(head) != start:
                return self._load_other(tier, id, out, want, deadline)
            header = decode_header(head, id)
            held = self._layout_of(header)
            if result.nbytes < start + held.nbytes:
                raise FormatError(f"truncated: {result.nbytes} of {start + held.nbytes} bytes")
            verify(header, _bytes(target))
            if want is not None and (held.signature != want.signature or not straight):
                src = target
                if straight:  # stored in another order than ours, with a header of the same length
                    src = self._buffer("load", held.nbytes)
                    src.copy_(target)
                translate(src, held, out, want)
                held = want
        except FormatVersionError as error:  # not ours to judge, nor to delete: another release uses this folder too
            return Loaded(Result(Status.FAILED, 0, str(error)))
        except (FormatError, LayoutError) as error:
            return Loaded(Result(Status.CORRUPT, result.nbytes, str(error)))
        return Loaded(result, held)

    def bounce(self, group: int) -> torch.Tensor:
        """This thread's spare buffer for one object of `group`; `load` may fill it when nothing has to be translated."""
        return self._buffer("bounce", self._canonical[group].nbytes)

    def _load_other(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """An object whose payload starts elsewhere than ours do: first the header, then the payload."""
        probe = _bytes(self._buffer("head", HEADER_PROBE))
        [result] = tier.read_into([Read(id, [probe], [Range(0, len(probe))])], deadline=deadline)
        if result.status is not Status.OK:
            return Loaded(result)
        size = header_bytes(probe)
        head = probe[: min(size, result.nbytes)]
        if size > len(probe):
            head = _bytes(self._buffer("long head", size))
            [result] = tier.read_into([Read(id, [head], [Range(0, size)])], deadline=deadline)
            if result.status is not Status.OK:
                return Loaded(result)
            head = head[: result.nbytes]
        header = decode_header(head, id)
        held = self._layout_of(header)
        straight = want is None or held.signature == want.signature
        target = out if straight else self._buffer("load", held.nbytes)
        [result] = tier.read_into([Read(id, [_bytes(target)], [Range(size, held.nbytes)])], deadline=deadline)
        if result.status is not Status.OK:
            return Loaded(result)
        verify(header, _bytes(target)[: result.nbytes])
        if want is not None and not straight:
            translate(target, held, out, want)
            held = want
        return Loaded(result, held)

    def _layout_of(self, header: Header) -> ObjectLayout:
        """The layout a header describes, if an object of this spec can have it."""
        group = header.group
        key = msgspec.json.encode(header.layout)
        layout = self._layouts.get(key)
        if layout is None:
            # Extents first: a description is not trusted to be of a size that can be held in memory.
            ours, theirs = _extents(self._canonical[group].describe()), _extents(header.layout)
            if ours != theirs:
                raise FormatError(f"holds {theirs}, this rank's objects are {ours}")
            layout = ObjectLayout.from_description(header.layout)
            if len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.clear()
            self._layouts[key] = layout
        if header.payload_bytes != layout.nbytes:
            raise FormatError(f"a payload of {header.payload_bytes} bytes, its layout needs {layout.nbytes}")
        return layout

    def _form(self, layout: ObjectLayout) -> Form:
        form = self._forms.get(layout)
        if form is None:
            shape = (layout.layers, layout.tokens, layout.heads)
            form = self._forms[layout] = Form(
                order=layout.order,
                planes=[PlaneForm(p.name, p.dtype, (*shape, p.elems), p.axes, p.block_tokens) for p in layout.planes],
                spans=[SegmentSpan(s.planes, s.layer, s.offset, s.nbytes) for s in layout.segments()],
                isa=self._spec.numerics.isa or None,
            )
        return form

    def _buffer(self, purpose: str, nbytes: int) -> torch.Tensor:
        """A buffer of this thread, kept for the next object."""
        buffers: dict[str, torch.Tensor] = self._local.__dict__
        found = buffers.get(purpose)
        if found is None or found.numel() < nbytes:
            found = buffers[purpose] = anonymous(nbytes)
        return found[:nbytes]


def _extents(layout: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """(name, dtype, shape) per plane of a layout's description."""
    try:
        return [(plane["name"], plane["dtype"], list(plane["shape"])) for plane in layout["planes"]]
    except (KeyError, TypeError) as error:
        raise FormatError(f"the layout has no {error}") from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a one-dimensional uint8 host tensor, without a copy."""
    return tensor.numpy().data.cast("B")
