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
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import xxhash

from lmcache.errors import FormatError, FormatVersionError
from lmcache.keys import ObjectId
from lmcache.spec import KVSpec, Rect, host_isa

FORMAT = 1
"""The format version this release writes, and the newest it reads."""

ALIGN = 4096
"""Payloads start, and files end, at multiples of this: the page size of every storage API worth having."""

MAX_HEADER = 1 << 20
"""No header is longer than this, so a damaged length field can't make a reader allocate or parse more."""

HEADER_PROBE = 32 << 10
"""How much to read first when the payload's offset is not known: the whole header of nearly every model."""

_ZEROS = "0" * 32
_HUGE = (1 << 63) - 1

_Natural = Annotated[int, msgspec.Meta(ge=0, le=_HUGE)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}){1,32}$")]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}$")]

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


class PlaneForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One plane as this object holds it.

    Attributes:
        name: the plane's name in the spec.
        dtype: torch dtype name.
        shape: (layers, tokens, heads, elems), whatever the order of the bytes.
        axes: the axis string of the arrangement, `layer token head elem` in canonical order.
        block_tokens: tokens per page of the arrangement, None where it has no pages.
    """

    name: str
    dtype: str
    shape: tuple[_Natural, ...]
    axes: str
    block_tokens: int | None = None


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A contiguous run of the payload with its own checksum.

    Attributes:
        planes: the planes inside, one in canonical order.
        layer: position among the group's local layers.
        offset: first byte, counted from the start of the payload.
        raw: bytes after decoding.
        stored: bytes in the file.
        codec: how `stored` bytes become `raw` bytes; `raw` = they are the same.
        xxh3: XXH3-128 of the stored bytes, 32 hex digits.
    """

    planes: tuple[str, ...]
    layer: _Natural
    offset: _Natural
    raw: _Natural
    stored: _Natural
    codec: str
    xxh3: str


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file says about itself. `payload_offset` is where the payload starts in this file (not part of the JSON).

    Attributes:
        format: version of this format.
        order: `canonical` (plane layer token head elem) or `native` (as `layout` describes).
        planes: see `PlaneForm`.
        layout: the complete description of the arrangement, as `ObjectLayout.describe()` gave it.
        isa: the writer's arithmetic identity, e.g. `x86_64-AVX512`.
        codec: the codec of all segments.
        payload_bytes: stored length of the payload.
        namespace, chain, parent: hex digests; `parent` is the chain of the chunk before, None for the first one.
        depth, group, layers, heads: the rest of the id; `layers` and `heads` are the rect.
        tokens: token range [first, last) in the sequence.
        position0: position (as positional encoding sees it) of the sequence's token 0.
        write_id: random, tells two writes of the same object apart.
        segments: ascending, they cover the payload without gap.
        digest: XXH3-128 of bytes [0, payload_offset) of the file with these 32 digits replaced by `0`.
    """

    format: _Natural
    order: Literal["canonical", "native"]
    planes: tuple[PlaneForm, ...]
    layout: dict[str, object]
    isa: str
    codec: str
    payload_bytes: _Natural
    namespace: _Hex
    chain: _Hex
    parent: _Hex | None
    depth: _Natural
    group: _Natural
    layers: tuple[_Natural, _Natural]
    heads: tuple[_Natural, _Natural]
    tokens: tuple[_Natural, _Natural]
    position0: _Natural
    write_id: str
    segments: tuple[Segment, ...]
    digest: _Digest

    @property
    def id(self) -> ObjectId:
        """The object's name, from the header's own words."""
        return ObjectId(
            bytes.fromhex(self.namespace),
            bytes.fromhex(self.chain),
            self.group,
            Rect(self.layers, self.heads),
            self.tokens[1] - self.tokens[0],
            self.depth,
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes of the decoded payload: `spec.object_bytes(group, tokens)` of a spec that fits."""
        return sum(segment.raw for segment in self.segments)


class _Version(msgspec.Struct):
    """The one field that all versions share."""

    format: int


class _Metadata(msgspec.Struct):
    lmcache: str


class _SafetensorsJson(msgspec.Struct, rename={"metadata": "__metadata__"}):
    metadata: _Metadata


_decode_outer = msgspec.json.Decoder(_SafetensorsJson).decode
_decode_version = msgspec.json.Decoder(_Version).decode
_decode_inner = msgspec.json.Decoder(Header).decode


class Form:
    """What all objects of one arrangement have in common, with the constant text of their headers prepared.

    Make one per (layout, group, rect, tokens) and keep it; it is immutable and may be used by many threads.

    Args:
        order: `canonical` or `native`.
        planes: the planes, in payload order if canonical.
        layout: JSON-able description of the arrangement, enough to translate from it.
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
        layout: Mapping[str, object],
        spans: Sequence[SegmentSpan],
        isa: str | None = None,
    ) -> None:
        self.order = order
        self.planes = tuple(planes)
        self.spans = tuple(spans)
        self.isa = host_isa() if isa is None else isa
        self.nbytes = _covered((span.offset, span.length) for span in self.spans)
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
                "layout": layout,
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
        self._after = _escape('"}],"digest":"' if pieces else ',"segments":[],"digest":"') + _ZEROS
        self._close = _escape('"}') + '"}}'
        longest = self._text(
            ObjectId(b"\0" * 32, b"\0" * 32, _HUGE, Rect((_HUGE, _HUGE), (_HUGE, _HUGE)), 0, _HUGE),
            ["0" * 32] * len(self.spans),
            parent=b"\0" * 32,
            first=_HUGE,
            position0=_HUGE,
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
    """The form of an object in canonical order (plane layer token head elem): readable by everyone."""
    layers, heads = len(spec.local_layers(group)), spec.local_heads(group)
    planes, spans, at = [], [], 0
    for plane in spec.groups[group].planes:
        planes.append(PlaneForm(plane.name, plane.dtype, (layers, tokens, heads, plane.elems), "layer token head elem"))
        size = tokens * heads * plane.elems * plane.itemsize
        for layer in range(layers):
            spans.append(SegmentSpan((plane.name,), layer, at, size))
            at += size
    return Form(order="canonical", planes=planes, layout={"order": "canonical"}, spans=spans, isa=isa)


def header_bytes(data: memoryview | bytes) -> int:
    """Where the payload starts, from the first 8 bytes of a file.

    Raises:
        FormatError: fewer than 8 bytes, or a length that no header of this format has.
    """
    if len(data) < 8:
        raise FormatError(f"only {len(data)} bytes: not an object")
    size = 8 + int.from_bytes(data[:8], "little")
    if size > MAX_HEADER or size % ALIGN:
        raise FormatError(f"a header of {size} bytes: this format's are multiples of {ALIGN} up to {MAX_HEADER}")
    return size


def decode_header(data: memoryview | bytes, id: ObjectId | None = None) -> Header:
    """Parse and check a header. `data` starts at the file's first byte and may reach into the payload.

    Args:
        data: at least `header_bytes(data)` bytes.
        id: the object that should be there; None accepts any.

    Raises:
        FormatVersionError: written by a newer format.
        FormatError: truncated, damaged, of another object, or not of this format at all.
    """
    size = header_bytes(data)
    if len(data) < size:
        raise FormatError(f"truncated: the header has {size} bytes, only {len(data)} are there")
    try:
        text = _decode_outer(data[8:size]).metadata.lmcache
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"the header is damaged: {error}") from None
    try:
        header = _decode_inner(text)
        version = header.format
    except (msgspec.MsgspecError, RecursionError) as error:
        version = _version_of(text)
        if version <= FORMAT:
            raise FormatError(f"the header is damaged: {error}") from None
    if version > FORMAT:
        raise FormatVersionError(
            f"written by format {version}, this release reads ≤ {FORMAT}: upgrade lmcache-sdk to read it"
        )
    raw, digest = bytes(data[:size]), header.digest.encode()
    at = raw.rfind(digest)
    if xxhash.xxh3_128_hexdigest(b"".join((raw[:at], _ZEROS.encode(), raw[at + 32 :]))) != header.digest:
        raise FormatError("the header is damaged: its digest does not match")
    _check(header)
    if id is not None and header.id != id:
        raise FormatError(f"holds {describe_id(header.id)}, not {describe_id(id)}")
    return header


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


def describe_id(id: ObjectId) -> str:
    """One id for people: digests shortened."""
    (l0, l1), (h0, h1) = id.rect.layers, id.rect.heads
    return (
        f"chunk {id.chain.hex()[:16]}… (depth {id.depth}, {id.tokens} tokens) of namespace {id.namespace.hex()[:16]}…, "
        f"group {id.group}, layers [{l0},{l1}), heads [{h0},{h1})"
    )


def _covered(runs: Iterable[tuple[int, int]]) -> int:
    """Total length of runs that must follow each other without gap, from 0 on."""
    at = 0
    for offset, length in runs:
        if offset != at or length < 1:
            raise FormatError(f"a segment of {length} bytes at {offset}: the next one should start at {at}")
        at += length
    return at


def _version_of(text: str) -> int:
    """The one thing that can be read from a header of any version; 0 if not even that."""
    try:
        return _decode_version(text).format
    except (msgspec.MsgspecError, RecursionError):
        return 0


def _check(header: Header) -> None:
    """What the types can't say: ranges ascend, the codec is known, the segments cover the payload."""
    for name in ("layers", "heads", "tokens"):
        low, high = getattr(header, name)
        if low >= high:
            raise FormatError(f"{name} [{low}, {high}) is empty")
    for segment in header.segments:
        if segment.codec != "raw" or segment.raw != segment.stored:
            raise FormatError(f"codec {segment.codec!r} is unknown to this release: upgrade lmcache-sdk to read it")
    covered = _covered((segment.offset, segment.stored) for segment in header.segments)
    if covered != header.payload_bytes:
        raise FormatError(f"the segments cover {covered} bytes of a payload of {header.payload_bytes}")


def _escape(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text)[1:-1]
