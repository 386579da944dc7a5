"""Small objects with known bytes, and a reader that verifies everything, for tests of tiers and object files."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import xxhash

from lmcache.format.file import Form, canonical_form, decode_header, header_bytes, verify
from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import KVSpec, Rect
from lmcache.tiers.base import Range, Read, Result, Tier, Write

SPEC = KVSpec.uniform("test/model", layers=2, kv_heads=2, head_dim=16, dtype="bfloat16")
TOKENS = 16
FORM = canonical_form(SPEC, 0, TOKENS, isa="test-isa")
NAMESPACE = hashlib.sha256(b"namespace").digest()
OTHER_NAMESPACE = hashlib.sha256(b"other namespace").digest()


def object_id(
    number: int, *, namespace: bytes = NAMESPACE, group: int = 0, rect: Rect | None = None, tokens: int = TOKENS
) -> ObjectId:
    """Returns the id of chunk `number` of the single test chain."""
    chain = hashlib.sha256(b"chunk %d" % number).digest()
    return ObjectId(namespace, chain, group, rect or SPEC.rects[0], tokens, number)


def pattern(seed: object, nbytes: int) -> bytes:
    """Returns bytes that depend on `seed` alone."""
    return hashlib.shake_128(repr(seed).encode()).digest(nbytes)


def payload_of(id: ObjectId, form: Form = FORM) -> bytes:
    """Returns the correct payload of an object."""
    return pattern(id, form.nbytes)


def stored_form(id: ObjectId, form: Form = FORM) -> bytes:
    """Returns a whole object file."""
    return b"".join(form.encode(id, memoryview(payload_of(id, form))))


def put(tier: Tier, id: ObjectId, data: bytes | None = None) -> Result:
    """Writes one object: `data`, or its correct stored form in the parts that the codec produces."""
    parts = FORM.encode(id, memoryview(payload_of(id))) if data is None else [data]
    try:
        [result] = tier.write([Write(id, parts)])
    except Exception as error:
        raise AssertionError(f"a tier must return errors, but write raised {type(error).__name__}: {error}") from error
    return result


def get(tier: Tier, id: ObjectId, length: int) -> tuple[Result, bytes]:
    """Reads the first `length` bytes of one object."""
    buffer = bytearray(length)
    try:
        [result] = tier.read_into([Read(id, [memoryview(buffer)], [Range(0, length)])])
    except Exception as error:
        raise AssertionError(
            f"a tier must return errors, but read_into raised {type(error).__name__}: {error}"
        ) from error
    return result, bytes(buffer[: result.nbytes])


def load(tier: Tier, id: ObjectId, form: Form = FORM) -> bytes | None:
    """Returns the verified payload; None if the tier reports that the object is missing.

    Raises:
        FormatError: the stored bytes are not this object.
        OSError: the read failed.
    """
    result, data = get(tier, id, form.stored_bytes + 4096)
    if result.status is Status.MISSING:
        return None
    if result.status is not Status.OK:
        raise OSError(result.detail)
    view = memoryview(data)
    start = header_bytes(view)
    header = decode_header(view, id)
    verify(header, view[start : start + header.payload_bytes])
    return bytes(view[start : start + header.payload_bytes])


def forge(data: bytes, change: dict[str, Any] | None = None, *, drop: str = "") -> bytes:
    """Returns an object file with a changed header and a correctly recomputed digest."""
    size = 8 + int.from_bytes(data[:8], "little")
    outer = json.loads(data[8:size])
    inner = json.loads(outer["__metadata__"]["lmcache"]) | (change or {})
    inner.pop(drop, None)
    inner["digest"] = "0" * 32
    outer["__metadata__"]["lmcache"] = json.dumps(inner)
    text = json.dumps(outer).encode()
    length = -(-(8 + len(text)) // 4096) * 4096
    head = (length - 8).to_bytes(8, "little") + text.ljust(length - 8)
    at = head.rindex(b"0" * 32)
    head = head[:at] + xxhash.xxh3_128_hexdigest(head).encode() + head[at + 32 :]
    return head + data[size:]
