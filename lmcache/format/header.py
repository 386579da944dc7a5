"""The header of an object file: its fields, and decoding from untrusted bytes.

The order of checks matters: the length is limited before anything is parsed, the version is read before fields that another
version may have changed, and no field is used before the header's own digest is verified.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
import xxhash

from lmcache.errors import FormatError, FormatVersionError
from lmcache.keys import ObjectId
from lmcache.spec import Rect

FORMAT = 1
"""The format version this release writes, and the newest it reads."""

ALIGN = 4096
"""Alignment in bytes of the payload's start and of the file's end: a page, as direct I/O and other storage APIs require."""

MAX_HEADER = 1 << 20
"""Maximum bytes of a header, so that a damaged length field cannot make a reader allocate or parse more."""

HEADER_PROBE = 32 << 10
"""Bytes to read first if the payload's offset is unknown: the whole header of nearly every model."""

ZERO_DIGEST = "0" * 32
"""Placeholder of the header's digest while the digest is computed."""

HUGE = (1 << 63) - 1

_Natural = Annotated[int, msgspec.Meta(ge=0, le=HUGE)]
_Hex = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2}){1,32}\Z")]
_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class PlaneForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One plane of an object.

    Attributes:
        name: the plane's name in the spec.
        dtype: torch dtype name.
        shape: (layers, tokens, heads, elems), independent of the order of the bytes.
        axes: the axis string of the layout, outermost axis first; `layer slot head dim` in canonical order.
        block_tokens: tokens per page of the layout; all of the object's tokens in canonical order.
    """

    name: str
    dtype: str
    shape: tuple[_Natural, ...]
    axes: str
    block_tokens: _Natural


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A contiguous run of the payload with its own checksum.

    Attributes:
        planes: the planes in the segment; exactly one in canonical order.
        layer: position among the group's local layers.
        offset: first byte, relative to the start of the payload.
        raw: bytes after decoding.
        stored: bytes in the file.
        codec: how to decode stored bytes; `raw` = they are stored as they are.
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
    """The header of an object file.

    Attributes:
        format: version of the format.
        order: `canonical` (plane layer slot head dim) or `native` (given by the planes' axes).
        planes: see `PlaneForm`; together with `order` the complete description of the layout.
        isa: the writer's arithmetic identity, e.g. `x86_64-AVX512`.
        codec: the codec of all segments.
        payload_bytes: stored length of the payload.
        namespace, chain, parent: hex digests; `parent` is the chain of the preceding chunk, None as this release writes it.
        depth, group, layers, heads: the rest of the id; `layers` and `heads` are the rect.
        tokens: token range [first, last) in the sequence.
        position0: position (in the positional encoding) of the sequence's token 0.
        write_id: random; distinguishes two writes of the same object.
        segments: ascending; they cover the payload without gaps.
        digest: XXH3-128 of the file's bytes before the payload, with these 32 digits replaced by `0`.
    """

    format: _Natural
    order: Literal["canonical", "native"]
    planes: tuple[PlaneForm, ...]
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
        """The object's name, from the header's fields."""
        return ObjectId(
            bytes.fromhex(self.namespace),
            bytes.fromhex(self.chain),
            self.group,
            Rect(self.layers, self.heads),
            self.tokens[1] - self.tokens[0],
            self.depth,
        )

    @property
    def layout(self) -> dict[str, object]:
        """The layout's description, for `ObjectLayout.from_description`."""
        return {"order": self.order, "planes": msgspec.to_builtins(self.planes)}

    @property
    def raw_bytes(self) -> int:
        """Bytes of the decoded payload; equals `spec.object_bytes(group, tokens)` of the matching spec."""
        return sum(segment.raw for segment in self.segments)


class _Version(msgspec.Struct):
    """The only field that all versions share."""

    format: int


class _Metadata(msgspec.Struct):
    lmcache: str


class _SafetensorsJson(msgspec.Struct, rename={"metadata": "__metadata__"}):
    metadata: _Metadata


_decode_outer = msgspec.json.Decoder(_SafetensorsJson).decode
_decode_version = msgspec.json.Decoder(_Version).decode
_decode_inner = msgspec.json.Decoder(Header).decode


def header_bytes(data: memoryview | bytes) -> int:
    """Returns the payload's offset in the file, from the first 8 bytes.

    Raises:
        FormatError: `data` has fewer than 8 bytes, or the length is not valid in this format.
    """
    if len(data) < 8:
        raise FormatError(f"only {len(data)} bytes: not an object file")
    size = 8 + int.from_bytes(data[:8], "little")
    if size > MAX_HEADER or size % ALIGN:
        raise FormatError(f"a header of {size} bytes: it must be a multiple of {ALIGN}, at most {MAX_HEADER}")
    return size


def decode_header(data: memoryview | bytes, id: ObjectId | None = None) -> Header:
    """Parses and verifies a header. `data` starts at the file's first byte and may extend into the payload.

    Args:
        data: at least `header_bytes(data)` bytes.
        id: the expected object; None accepts any.

    Raises:
        FormatVersionError: written by a newer version of the format.
        FormatError: truncated, damaged, of another object, or not of this format.
    """
    size = header_bytes(data)
    if len(data) < size:
        raise FormatError(f"truncated: the header has {size} bytes, only {len(data)} are present")
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
    if xxhash.xxh3_128_hexdigest(b"".join((raw[:at], ZERO_DIGEST.encode(), raw[at + 32 :]))) != header.digest:
        raise FormatError("the header is damaged: its digest does not match")
    _check(header)
    if id is not None and header.id != id:
        raise FormatError(f"holds {describe_id(header.id)}, not {describe_id(id)}")
    return header


def describe_id(id: ObjectId) -> str:
    """Formats an id for messages, with shortened digests."""
    (l0, l1), (h0, h1) = id.rect.layers, id.rect.heads
    return (
        f"chunk {id.chain.hex()[:16]}… (depth {id.depth}, {id.tokens} tokens) of namespace {id.namespace.hex()[:16]}…, "
        f"group {id.group}, layers [{l0},{l1}), heads [{h0},{h1})"
    )


def covered(segments: Iterable[tuple[int, int]]) -> int:
    """Returns the total length of (offset, length) segments; raises `FormatError` unless they are contiguous from 0."""
    at = 0
    for offset, length in segments:
        if offset != at or length < 1:
            raise FormatError(f"a segment of {length} bytes at {offset}: the next one should start at {at}")
        at += length
    return at


def _version_of(text: str) -> int:
    """Returns the version, the only field readable in a header of any version; 0 if it cannot be read."""
    try:
        return _decode_version(text).format
    except (msgspec.MsgspecError, RecursionError):
        return 0


def _check(header: Header) -> None:
    """Checks what the types do not express: ranges ascend, the codec is known, the segments cover the payload."""
    for name in ("layers", "heads", "tokens"):
        low, high = getattr(header, name)
        if low >= high:
            raise FormatError(f"{name} [{low}, {high}) is empty")
    for segment in header.segments:
        if segment.codec != "raw" or segment.raw != segment.stored:
            raise FormatError(f"codec {segment.codec!r} is unknown to this release: upgrade lmcache-sdk to read it")
    total = covered((segment.offset, segment.stored) for segment in header.segments)
    if total != header.payload_bytes:
        raise FormatError(f"the segments cover {total} bytes of a payload of {header.payload_bytes}")
