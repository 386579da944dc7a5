"""Transfers objects between an arena slot and a tier: encodes on save, verifies and translates on load.

Every byte from a tier passes through `ObjectCodec.load`, which checks the header (length limit, digest, object id), the payload
length and the checksum of each segment before the slot counts as filled. A failed check is reported as a status, never as an
exception.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import torch
import xxhash

from lmcache.errors import FormatError, FormatVersionError, LayoutError
from lmcache.format import reslice
from lmcache.format.file import HEADER_PROBE, Form, Header, decode_header, form_of, header_bytes, verify
from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout, translate
from lmcache.memory import anonymous
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Range, Read, Result, Tier, Write

_LAYOUTS_KEPT = 64


class Loaded(NamedTuple):
    """Result of a load, and the layout of the bytes in the buffer (None unless the load succeeded)."""

    result: Result
    layout: ObjectLayout | None = None


class ObjectCodec:
    """Encodes, verifies and translates the objects of one rank. Thread-safe; each thread has its own buffers.

    Args:
        spec: spec of this rank's KV.
        chunk_tokens: tokens per object.
        order: the order in which objects are written; both orders can be read.
        reslice: assemble missing objects from those of other tensor-parallel splits, see `lmcache.format.reslice`.
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

    def save(
        self,
        tier: Tier,
        id: ObjectId,
        payload: torch.Tensor,
        layout: ObjectLayout,
        made: bytes | None = None,
        begun: float | None = None,
    ) -> Result:
        """Writes an object.

        Args:
            tier: where to write.
            id: name of the object.
            payload: uint8, in `layout`; must not change until this returns.
            layout: of `payload`.
            made: checksum of `payload` from the time it was gathered. If the bytes have changed since, nothing is written and
                the status is `CORRUPT`.
            begun: see `Write`.
        """
        target = layout if self._order == "native" else self._canonical[id.group]
        stored = payload
        if target.signature != layout.signature:
            stored = self._buffer("save", target.nbytes)
            translate(payload, layout, stored, target)
        parts = self._form(target).encode(id, _bytes(stored))
        # After the stored form has its own checksums: no byte can change between the two without one of them noticing.
        if made is not None and checksum(payload) != made:
            return Result(Status.CORRUPT, 0, "its bytes have changed in host memory since they were gathered")
        [result] = tier.write([Write(id, parts, begun)])
        return result

    def contains(self, tier: Tier, ids: Sequence[ObjectId], deadline: float | None) -> list[Result]:
        """Checks which objects `load` would find; one result per id."""
        results = tier.contains(ids, deadline=deadline)
        if self._reslice and any(result.status is Status.MISSING for result in results):
            return reslice.contains(self._spec, tier, ids, results, deadline)
        return results

    def load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """Reads and verifies an object into `out`, assembling it from other splits if it is missing and `reslice` is set.

        Args:
            tier: where to read.
            id: name of the object.
            out: uint8 `(nbytes,)` buffer; undefined unless the result is `OK`.
            want: layout to translate to; None = keep the stored layout.
            deadline: passed to the tier.
        """
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
        codec = self._others.get(rect)
        if codec is None:
            codec = self._others.setdefault(rect, ObjectCodec(spec, self._chunk_tokens))
        return codec.load(tier, id, out, ObjectLayout.canonical(spec, id.group, self._chunk_tokens), deadline).result

    def _load(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """Reads and verifies an object into `out`, in layout `want` or as stored; arguments as for `load`."""
        # Nearly all objects were written with the same settings: header and payload then take one round trip.
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
            head = head[: result.nbytes]  # the rest of the buffer holds stale bytes
            if header_bytes(head) != start:
                return self._load_other(tier, id, out, want, deadline)
            header = decode_header(head, id)
            held = self._layout_of(header)
            if result.nbytes < start + held.nbytes:
                raise FormatError(f"truncated: {result.nbytes} of {start + held.nbytes} bytes")
            verify(header, _bytes(target))
            if want is not None and (held.signature != want.signature or not straight):
                src = target
                if straight:  # stored in another order, with a header of the same length
                    src = self._buffer("load", held.nbytes)
                    src.copy_(target)
                translate(src, held, out, want)
                held = want
        except FormatVersionError as error:  # not corrupt, so not to be deleted: a newer release uses the same folder
            return Loaded(Result(Status.FAILED, 0, str(error)))
        except (FormatError, LayoutError) as error:
            if (note := getattr(tier, "note_damaged", None)) is not None:
                note(id)
            return Loaded(Result(Status.CORRUPT, result.nbytes, str(error)))
        return Loaded(result, held)

    def bounce(self, group: int) -> torch.Tensor:
        """Returns this thread's spare buffer for one object of `group`; usable as `out` of `load`."""
        return self._buffer("bounce", self._canonical[group].nbytes)

    def _load_other(
        self, tier: Tier, id: ObjectId, out: torch.Tensor, want: ObjectLayout | None, deadline: float | None
    ) -> Loaded:
        """Reads an object whose payload starts at another offset than expected: first the header, then the payload."""
        result, header, size = self._header(tier, id, deadline)
        if header is None:
            return Loaded(result)
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

    def _header(self, tier: Tier, id: ObjectId, deadline: float | None) -> tuple[Result, Header | None, int]:
        """Reads an object's header: (result, header if that went well, its length). Raises `FormatError` if it is damaged."""
        probe = _bytes(self._buffer("head", HEADER_PROBE))
        [result] = tier.read_into([Read(id, [probe], [Range(0, len(probe))])], deadline=deadline)
        if result.status is not Status.OK:
            return result, None, 0
        size = header_bytes(probe[: result.nbytes])
        head = probe[: min(size, result.nbytes)]
        if size > len(probe):
            head = _bytes(self._buffer("long head", size))
            [result] = tier.read_into([Read(id, [head], [Range(0, size)])], deadline=deadline)
            if result.status is not Status.OK:
                return result, None, 0
            head = head[: result.nbytes]
        return result, decode_header(head, id), size

    def check(self, tier: Tier, id: ObjectId) -> Status:
        """Returns whether a tier holds an object: `OK` if its header is intact and its payload has the full length, `CORRUPT` if
        it is damaged, else what reading it came to. The payload is not read. With re-slicing, other splits count as well.
        """
        try:
            result, header, size = self._header(tier, id, None)
            if header is None:
                if result.status is Status.MISSING and self._reslice:
                    return self.contains(tier, [id], None)[0].status
                return result.status
            last = memoryview(bytearray(1))
            [result] = tier.read_into([Read(id, [last], [Range(size + header.payload_bytes - 1, 1)])])
            if result.status is not Status.OK:
                return result.status
            return Status.OK if result.nbytes == 1 else Status.CORRUPT
        except FormatVersionError:
            return Status.OK  # of a newer release that uses the same folder: not ours to replace
        except FormatError:
            return Status.CORRUPT

    def _layout_of(self, header: Header) -> ObjectLayout:
        """Returns the layout that a header describes; raises `FormatError` if it does not fit this spec's objects."""
        group = header.group
        key = msgspec.json.encode(header.layout)
        layout = self._layouts.get(key)
        if layout is None:
            # Check the extents first: an untrusted description may need more memory than is available.
            ours, theirs = _extents(self._canonical[group].describe()), _extents(header.layout)
            if ours != theirs:
                raise FormatError(f"contains {theirs}, this rank's objects are {ours}")
            layout = ObjectLayout.from_description(header.layout)
            if len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.clear()
            self._layouts[key] = layout
        if header.payload_bytes != layout.nbytes:
            raise FormatError(f"the payload has {header.payload_bytes} bytes, its layout needs {layout.nbytes}")
        return layout

    def _form(self, layout: ObjectLayout) -> Form:
        form = self._forms.get(layout)
        if form is None:
            form = self._forms[layout] = form_of(layout, isa=self._spec.numerics.isa or None)
        return form

    def _buffer(self, purpose: str, nbytes: int) -> torch.Tensor:
        """Returns this thread's buffer for `purpose`, reused for the next object."""
        buffers: dict[str, torch.Tensor] = self._local.__dict__
        found = buffers.get(purpose)
        if found is None or found.numel() < nbytes:
            found = buffers[purpose] = anonymous(nbytes)
        return found[:nbytes]


def checksum(payload: torch.Tensor) -> bytes:
    """Returns a 128-bit checksum of an object's bytes in host memory. Not cryptographic; as fast as memory is read."""
    return xxhash.xxh3_128_digest(_bytes(payload))


def _extents(layout: Mapping[str, Any]) -> list[tuple[Any, Any, Any]]:
    """Returns (name, dtype, shape) of each plane of a layout's description."""
    try:
        return [(plane["name"], plane["dtype"], list(plane["shape"])) for plane in layout["planes"]]
    except (KeyError, TypeError) as error:
        raise FormatError(f"the layout has no {error}") from None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the memory of a one-dimensional uint8 host tensor, without a copy."""
    return tensor.numpy().data.cast("B")
