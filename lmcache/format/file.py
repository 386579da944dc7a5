"""The stored form of one object: a valid safetensors file whose every byte can be checked. See docs/file-format.md.

    8 bytes  little-endian length N of the JSON that follows; 8 + N is a multiple of 4096
    N bytes  safetensors JSON, padded with spaces; `__metadata__["lmcache"]` holds one JSON string: the `Header`
    payload  the object's bytes, cut into segments that each have a checksum
    tail     zeros up to a multiple of 4096, visible as the tensor `__pad__`

Everything that is the same in all objects of one layout is prepared once, in a `Form`; an object then costs its checksums
and one join of strings. Nothing read from a file is trusted before its checksum was, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
import xxhash

from lmcache.errors import FormatError
from lmcache.format.header import (
    ALIGN,
    FORMAT,
    HEADER_PROBE,
    HUGE,
    MAX_HEADER,
    ZERO_DIGEST,
    Header,
    PlaneForm,
    Segment,
    covered,
    decode_header,
    describe_id,
    header_bytes,
)
from lmcache.keys import ObjectId
from lmcache.spec import KVSpec, Rect, host_isa

__all__ = [
    "ALIGN",
    "FORMAT",
    "HEADER_PROBE",
    "MAX_HEADER",
    "Form",
    "Header",
    "PlaneForm",
    "Segment",
    "SegmentSpan",
    "canonical_form",
    "decode_header",
    "describe_id",
    "header_bytes",
    "verify",
    "verify_file",
    "verify_segment",
]

# torch dtype → safetensors dtype. What is not listed is shown as raw bytes (U8) with a longer last axis.
_SAFETENSORS_DTYPES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class SegmentSpan(NamedTuple):
    """Where a contiguous run of the payload lies: `planes` of the group's local layer `layer`, at bytes [offset, +length)."""

    planes: tuple[str, ...]
    layer: int
    offset: int
    length: int


class Form:
    """What all objects of one arrangement have in common, with the constant text of their headers prepared.

    Make one per (layout, group, rect, tokens) and keep it; it is immutable and may be used by many threads.

    Args:
        order: `canonical` or `native`.
        planes: the planes, in payload order if canonical; they say where each element lies.
        spans: the segments, ascending, covering the payload without gap; one plane per span if canonical.
        isa: the writer's arithmetic identity; this host's by default.

    Raises:
        FormatError: the spans have gaps, contradict the planes, or need a header above 1 MiB.
    """

    def __init__(
        self,
        *,
        order: Literal["canonical", "native"],
        planes: Sequence[PlaneForm],
        spans: Sequence[SegmentSpan],
        isa: str | None = None,
    ) -> None:
        self.order = order
        self.planes = tuple(planes)
        self.spans = tuple(spans)
        self.isa = host_isa() if isa is None else isa
        self.nbytes = covered((span.offset, span.length) for span in self.spans)
        names = {plane.name for plane in self.planes}
        for span in self.spans:
            if not span.planes or not set(span.planes) <= names:
                raise FormatError(f"a segment holds planes {span.planes}, but the object has {sorted(names)}")
        self.pad = -self.nbytes % ALIGN

        constant = msgspec.json.encode(
            {
                "format": FORMAT,
                "order": order,
                "planes": self.planes,
                "isa": self.isa,
                "codec": "raw",
                "payload_bytes": self.nbytes,
            }
        ).decode()
        tensors = json.dumps(self._tensors())[:-1]
        self._before = f'{tensors}, "__metadata__": {{"lmcache": "{_escape(constant[:-1])}'
        # What stands before each segment's checksum, and after the last one.
        pieces, glue = [], ',"segments":['
        for span in self.spans:
            fields = {"planes": span.planes, "layer": span.layer, "offset": span.offset, "raw": span.length}
            text = json.dumps(fields | {"stored": span.length, "codec": "raw", "xxh3": ""}, separators=(",", ":"))
            pieces.append(_escape(glue + text[:-2]))
            glue = '"},'
        self._pieces = tuple(pieces)
        self._after = _escape('"}],"digest":"' if pieces else ',"segments":[],"digest":"') + ZERO_DIGEST
        self._close = _escape('"}') + '"}}'
        longest = self._text(
            ObjectId(b"\0" * 32, b"\0" * 32, HUGE, Rect((HUGE, HUGE), (HUGE, HUGE)), 0, HUGE),
            ["0" * 32] * len(self.spans),
            parent=b"\0" * 32,
            first=HUGE,
            position0=HUGE,
        )
        self.payload_offset = -(-(8 + len(longest)) // ALIGN) * ALIGN
        """Where the payload starts, the same for every object of this form: what a reader with the same layout expects."""
        if self.payload_offset > MAX_HEADER:
            raise FormatError(
                f"{len(self.spans)} segments need a header of {self.payload_offset} bytes, the format allows {MAX_HEADER}; "
                "use fewer, larger segments"
            )
        self._pad = bytes(self.pad)

    @property
    def stored_bytes(self) -> int:
        """Size of the whole file."""
        return self.payload_offset + self.nbytes + self.pad

    def _tensors(self) -> dict[str, object]:
        """The safetensors table: one tensor per plane in canonical order, else one of raw bytes; and the tail."""
        table: dict[str, object] = {}
        if self.order == "canonical":
            at = 0
            for plane in self.planes:
                size = sum(span.length for span in self.spans if span.planes == (plane.name,))
                elements = math.prod(plane.shape)
                if not elements or size % elements or not plane.shape:
                    raise FormatError(f"plane {plane.name!r} of shape {plane.shape} can't fill {size} bytes")
                dtype = _SAFETENSORS_DTYPES.get(plane.dtype)
                shape = plane.shape if dtype else (*plane.shape[:-1], plane.shape[-1] * (size // elements))
                table[plane.name] = {"dtype": dtype or "U8", "shape": shape, "data_offsets": (at, at + size)}
                at += size
            if at != self.nbytes:
                raise FormatError(f"the planes hold {at} bytes, the segments {self.nbytes}")
        else:
            table["__native__"] = {"dtype": "U8", "shape": (self.nbytes,), "data_offsets": (0, self.nbytes)}
        if self.pad:
            end = self.nbytes + self.pad
            table["__pad__"] = {"dtype": "U8", "shape": (self.pad,), "data_offsets": (self.nbytes, end)}
        return table

    def _text(self, id: ObjectId, checksums: Sequence[str], *, parent: bytes | None, first: int, position0: int) -> str:
        """The JSON of one object, without padding, its digest still zeros."""
        (l0, l1), (h0, h1) = id.rect.layers, id.rect.heads
        mother = f'\\"{parent.hex()}\\"' if parent is not None else "null"
        variable = (
            f',\\"namespace\\":\\"{id.namespace.hex()}\\",\\"chain\\":\\"{id.chain.hex()}\\",\\"parent\\":{mother}'
            f',\\"depth\\":{id.depth},\\"group\\":{id.group},\\"layers\\":[{l0},{l1}],\\"heads\\":[{h0},{h1}]'
            f',\\"tokens\\":[{first},{first + id.tokens}],\\"position0\\":{position0}'
            f',\\"write_id\\":\\"{secrets.token_hex(8)}\\"'
        )
        woven = [text for pair in zip(self._pieces, checksums, strict=True) for text in pair]
        return "".join((self._before, variable, *woven, self._after, self._close))

    def encode(
        self,
        id: ObjectId,
        payload: memoryview,
        *,
        parent: bytes | None = None,
        first_token: int | None = None,
        position0: int = 0,
    ) -> list[memoryview | bytes]:
        """The parts of the stored form, for `Tier.write`. The payload is not copied: it must not change until written.

        Args:
            id: the object's name.
            payload: its bytes, in this form's arrangement.
            parent: chain digest of the chunk before.
            first_token: where the chunk starts in its sequence; `depth * tokens` by default.
            position0: position of the sequence's token 0.

        Raises:
            FormatError: the payload's length is not this form's, or a digest of the id has not 1..32 bytes.
        """
        payload = payload.cast("B")
        if payload.nbytes != self.nbytes:
            raise FormatError(f"the payload has {payload.nbytes} bytes, this form {self.nbytes}")
        for digest in (id.namespace, id.chain, parent):
            if digest is not None and not 0 < len(digest) <= 32:
                raise FormatError(f"a digest must have 1 to 32 bytes, {digest.hex()!r} has {len(digest)}")
        hexdigest = xxhash.xxh3_128_hexdigest
        sums = [hexdigest(payload[offset : offset + length]) for _, _, offset, length in self.spans]
        first = id.depth * id.tokens if first_token is None else first_token
        text = self._text(id, sums, parent=parent, first=first, position0=position0).encode()
        header = bytearray(self.payload_offset)
        header[:8] = (self.payload_offset - 8).to_bytes(8, "little")
        header[8:] = text.ljust(self.payload_offset - 8)
        at = 8 + len(text) - len(self._close) - 32
        header[at : at + 32] = hexdigest(header).encode()
        parts: list[memoryview | bytes] = [bytes(header), payload]
        if self.pad:
            parts.append(self._pad)
        return parts


def canonical_form(spec: KVSpec, group: int, tokens: int, *, isa: str | None = None) -> Form:
    """The form of an object in canonical order (plane layer slot head dim): readable by everyone."""
    layers, heads = len(spec.local_layers(group)), spec.local_heads(group)
    planes, spans, at = [], [], 0
    for plane in spec.groups[group].planes:
        shape = (layers, tokens, heads, plane.elems)
        planes.append(PlaneForm(plane.name, plane.dtype, shape, "layer slot head dim", tokens))
        size = tokens * heads * plane.elems * plane.itemsize
        for layer in range(layers):
            spans.append(SegmentSpan((plane.name,), layer, at, size))
            at += size
    return Form(order="canonical", planes=planes, spans=spans, isa=isa)


def verify(header: Header, payload: memoryview, segments: range | None = None) -> None:
    """Check the payload, segment by segment.

    Args:
        header: from `decode_header`.
        payload: its `payload_bytes` stored bytes, counted from the payload's start.
        segments: which ones, all by default.

    Raises:
        FormatError: naming the first segment whose bytes are missing or wrong.
    """
    checked = header.segments if segments is None else [header.segments[index] for index in segments]
    hexdigest = xxhash.xxh3_128_hexdigest
    for segment in checked:
        data = payload[segment.offset : segment.offset + segment.stored]
        if hexdigest(data) != segment.xxh3 or len(data) != segment.stored:
            verify_segment(segment, data)  # says what is wrong


def verify_segment(segment: Segment, data: memoryview) -> None:
    """Check one segment's stored bytes. Raises `FormatError`."""
    if len(data) != segment.stored or xxhash.xxh3_128_hexdigest(data) != segment.xxh3:
        what = (
            f"{len(data)} of {segment.stored} bytes" if len(data) != segment.stored else "its checksum does not match"
        )
        raise FormatError(f"segment of {'+'.join(segment.planes)}, layer {segment.layer}: {what}")


def verify_file(path: str | os.PathLike[str], id: ObjectId | None = None) -> Header:
    """Check a whole file: header, every segment, length, tail. Reads it once, in pieces.

    Raises:
        FormatError: in which way it is not (that) object.
        OSError: it can't be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEADER_PROBE)
        need = header_bytes(head)
        if len(head) < need:
            head += file.read(need - len(head))
        header = decode_header(head, id)
        end = need + header.payload_bytes
        expected = end + -header.payload_bytes % ALIGN
        if size != expected:
            raise FormatError(f"the file has {size} bytes, its header calls for {expected}")
        buffer = memoryview(bytearray(max((segment.stored for segment in header.segments), default=0)))
        file.seek(need)
        for segment in header.segments:
            data = buffer[: segment.stored]
            filled = 0
            while filled < segment.stored and (step := file.readinto(data[filled:])):
                filled += step
            verify_segment(segment, data[:filled])
        if any(file.read(ALIGN)):
            raise FormatError(f"the tail from byte {end} on is not zero")
    return header


def _escape(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text)[1:-1]
