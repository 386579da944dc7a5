"""The stored form of one object: a valid safetensors file in which every byte can be verified. See docs/file-format.md.

    8 bytes  little-endian length N of the JSON that follows; 8 + N is a multiple of 4096
    N bytes  safetensors JSON, padded with spaces; `__metadata__["lmcache"]` holds one JSON string: the `Header`
    payload  the object's bytes, in segments with one checksum each
    tail     zeros up to a multiple of 4096, visible as the tensor `__pad__`

A `Form` prepares once what all objects of one layout share; encoding an object then takes its checksums and one string join.
Nothing read from a file is used before its checksum is verified, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Mapping, Sequence
from typing import Literal

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
from lmcache.layout import ObjectLayout, SegmentSpan
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
    "form_of",
    "header_bytes",
    "verify",
    "verify_file",
    "verify_segment",
]

# torch dtype → safetensors dtype. Other dtypes are declared as raw bytes (U8) with a longer last axis.
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

_BLOCK = 1 << 20
"""Bytes that `verify_file` reads at a time."""

_MISMATCH = "its checksum does not match"


class Form:
    """The common part of all objects with one layout, with the constant text of their headers prepared.

    Create one per (layout, group, rect, tokens) and reuse it; it is immutable and thread-safe.

    Args:
        order: `canonical` or `native`.
        planes: the planes, in payload order if canonical; they define the place of each element.
        spans: the segments, ascending, covering the payload without gaps; one plane per span if canonical.
        isa: the writer's arithmetic identity; this host's by default.

    Raises:
        FormatError: the spans have gaps, contradict the planes, or need a header larger than 1 MiB.
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
        self.nbytes = covered((span.offset, span.nbytes) for span in self.spans)
        names = {plane.name for plane in self.planes}
        for span in self.spans:
            if not span.planes or not set(span.planes) <= names:
                raise FormatError(f"a segment contains planes {span.planes}, but the object has {sorted(names)}")
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
        # The text before each segment's checksum, and after the last one.
        pieces, glue = [], ',"segments":['
        for span in self.spans:
            fields = {"planes": span.planes, "layer": span.layer, "offset": span.offset, "raw": span.nbytes}
            text = json.dumps(fields | {"stored": span.nbytes, "codec": "raw", "xxh3": ""}, separators=(",", ":"))
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
        """Start of the payload, the same for every object of this form, so that a reader with the same layout can predict it."""
        if self.payload_offset > MAX_HEADER:
            raise FormatError(
                f"{len(self.spans)} segments need a header of {self.payload_offset} bytes, the maximum is {MAX_HEADER}; "
                "use fewer, larger segments"
            )
        self._pad = bytes(self.pad)

    @property
    def stored_bytes(self) -> int:
        """Size of the whole file."""
        return self.payload_offset + self.nbytes + self.pad

    def _tensors(self) -> dict[str, object]:
        """The safetensors table: one tensor per plane in canonical order, else one tensor of raw bytes; and the tail."""
        table: dict[str, object] = {}
        if self.order == "canonical":
            at = 0
            for plane in self.planes:
                size = sum(span.nbytes for span in self.spans if span.planes == (plane.name,))
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
        """The JSON of one object, without padding and with a digest of zeros."""
        (l0, l1), (h0, h1) = id.rect.layers, id.rect.heads
        parent_json = f'\\"{parent.hex()}\\"' if parent is not None else "null"
        variable = (
            f',\\"namespace\\":\\"{id.namespace.hex()}\\",\\"chain\\":\\"{id.chain.hex()}\\",\\"parent\\":{parent_json}'
            f',\\"depth\\":{id.depth},\\"group\\":{id.group},\\"layers\\":[{l0},{l1}],\\"heads\\":[{h0},{h1}]'
            f',\\"tokens\\":[{first},{first + id.tokens}],\\"position0\\":{position0}'
            f',\\"write_id\\":\\"{secrets.token_hex(8)}\\"'
        )
        segments = [text for pair in zip(self._pieces, checksums, strict=True) for text in pair]
        return "".join((self._before, variable, *segments, self._after, self._close))

    def encode(
        self,
        id: ObjectId,
        payload: memoryview,
        *,
        parent: bytes | None = None,
        first_token: int | None = None,
        position0: int = 0,
    ) -> list[memoryview | bytes]:
        """Returns the parts of the stored form, for `Tier.write`. The payload is not copied: it must not change until written.

        Args:
            id: the object's name.
            payload: its bytes, in this form's layout.
            parent: chain digest of the preceding chunk.
            first_token: index of the chunk's first token in its sequence; `depth * tokens` by default.
            position0: position of the sequence's token 0.

        Raises:
            FormatError: the payload has the wrong length, or a digest of the id is not 1 to 32 bytes long.
        """
        payload = payload.cast("B")
        if payload.nbytes != self.nbytes:
            raise FormatError(f"the payload has {payload.nbytes} bytes, this form needs {self.nbytes}")
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


def form_of(layout: ObjectLayout, *, isa: str | None = None) -> Form:
    """Returns the form of objects with this layout; `isa` as for `Form`."""
    shape = (layout.layers, layout.tokens, layout.heads)
    return Form(
        order=layout.order,
        planes=[PlaneForm(p.name, p.dtype, (*shape, p.elems), p.axes, p.block_tokens) for p in layout.planes],
        spans=layout.segments(),
        isa=isa,
    )


def canonical_form(spec: KVSpec, group: int, tokens: int, *, isa: str | None = None) -> Form:
    """Returns the form of objects in canonical order (plane layer slot head dim), which every engine can read."""
    return form_of(ObjectLayout.canonical(spec, group, tokens), isa=isa)


def verify(header: Header, payload: memoryview, segments: range | None = None) -> None:
    """Verifies the checksums of the payload's segments.

    Args:
        header: from `decode_header`.
        payload: the stored payload, `payload_bytes` bytes.
        segments: indices of the segments to check, default all.

    Raises:
        FormatError: names the first segment whose bytes are missing or wrong.
    """
    checked = header.segments if segments is None else [header.segments[index] for index in segments]
    hexdigest = xxhash.xxh3_128_hexdigest
    for segment in checked:
        data = payload[segment.offset : segment.offset + segment.stored]
        if hexdigest(data) != segment.xxh3 or len(data) != segment.stored:
            verify_segment(segment, data)  # raises with the details


def verify_segment(segment: Segment, data: memoryview) -> None:
    """Verifies one segment's stored bytes; raises `FormatError`."""
    if len(data) != segment.stored or xxhash.xxh3_128_hexdigest(data) != segment.xxh3:
        what = f"{len(data)} of {segment.stored} bytes" if len(data) != segment.stored else _MISMATCH
        raise FormatError(_describe(segment, what))


def _describe(segment: Segment, what: str) -> str:
    return f"segment of {'+'.join(segment.planes)}, layer {segment.layer}: {what}"


def verify_file(path: str | os.PathLike[str], id: ObjectId | None = None) -> Header:
    """Verifies a whole file: header, every segment, length, tail. Reads it once, in blocks: memory does not depend on its size.

    Args:
        path: the file.
        id: the expected object; None accepts any.

    Raises:
        FormatError: the file is damaged, not of this format, or another object; the message has the details.
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a FIFO must not hang
    with open(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("not a regular file")
        size = status.st_size
        head = file.read(HEADER_PROBE)
        need = header_bytes(head)
        while len(head) < need and (more := file.read(need - len(head))):
            head += more
        header = decode_header(head, id)
        end = need + header.payload_bytes
        expected = end + -header.payload_bytes % ALIGN
        if size != expected:
            raise FormatError(f"the file has {size} bytes, its header requires {expected}")
        block = memoryview(bytearray(min(_BLOCK, max(1, size))))
        file.seek(need)
        for segment in header.segments:
            digest, left = xxhash.xxh3_128(), segment.stored
            while left and (step := file.readinto(block[: min(left, len(block))])):
                digest.update(block[:step])
                left -= step
            if left:
                raise FormatError(_describe(segment, f"{segment.stored - left} of {segment.stored} bytes"))
            if digest.hexdigest() != segment.xxh3:
                raise FormatError(_describe(segment, _MISMATCH))
        if any(file.read(ALIGN)):
            raise FormatError(f"the tail, from byte {end} to the end, is not zero")
    return header


def _escape(text: str) -> str:
    """Escapes text for use inside a JSON string."""
    return json.dumps(text)[1:-1]
