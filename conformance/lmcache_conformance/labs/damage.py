"""Finds, checks and damages raw object files, without using the cache under test.

Files are read as docs/file-format.md describes them: safetensors with one JSON string of metadata, which has an XXH3-128
for each segment of the payload.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash


def object_files(folder: Path) -> list[Path]:
    """Returns every object file below a disk tier's folder, ordered by chunk depth, then name."""
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    return sorted(files, key=lambda path: (_depth(path), path.name))


def _depth(path: Path) -> int:
    try:
        return int(path.name.split(".")[-3])
    except (IndexError, ValueError):
        return 0


class Raw(NamedTuple):
    """An object file's parts."""

    header: bytes
    payload: bytes
    tail: bytes
    meta: Mapping[str, Any]


def read_raw(path: Path) -> Raw:
    """Splits an object file into its parts.

    Raises:
        ValueError: the file is not a safetensors file with lmcache metadata.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < 8 or start > len(data):
        raise ValueError(f"{path.name} has {len(data)} bytes, its header alone should have {start}")
    outer = json.loads(data[8:start])
    meta = json.loads(outer["__metadata__"]["lmcache"])
    end = start + int(meta["payload_bytes"])
    return Raw(data[:start], data[start:end], data[end:], meta)


def problem_of(path: Path) -> str | None:
    """Returns what is wrong with an object file; None if it is intact."""
    try:
        return _problem(path, read_raw(path))
    except (ValueError, LookupError, TypeError) as error:  # a flipped bit in the JSON can cause any of these
        return f"unreadable: {type(error).__name__}: {error}"


def _problem(path: Path, raw: Raw) -> str | None:
    end = 0
    for segment in raw.meta["segments"]:
        if segment["offset"] != end:
            return f"segment at {segment['offset']} leaves a gap after {end}"
        end += segment["stored"]
        part = raw.payload[segment["offset"] : end]
        if xxhash.xxh3_128_hexdigest(part) != segment["xxh3"] or len(part) != segment["stored"]:
            return f"segment {segment['planes']} of layer {segment['layer']} does not match its checksum in the header"
    if end != len(raw.payload):
        return f"the segments end at {end}, the payload at {len(raw.payload)}"
    if any(raw.tail):
        return "the padding is not zero"
    if _with_new_digest(raw.header, raw.meta["digest"]) != raw.header:
        return "the header does not match its own checksum"
    if (name := _expected_name(raw.meta)) != path.name or path.parts[-3] != raw.meta["namespace"]:
        return f"the file contains {name} of namespace {raw.meta['namespace'][:16]}… but has another name"
    return None


def _expected_name(meta: Mapping[str, Any]) -> str:
    """Returns the file name that belongs to this metadata."""
    (l0, l1), (h0, h1) = meta["layers"], meta["heads"]
    tokens = meta["tokens"][1] - meta["tokens"][0]
    return f"{meta['chain']}.{meta['group']}.L{l0}-{l1}.H{h0}-{h1}.{meta['depth']}.{tokens}.safetensors"


def poison(path: Path) -> None:
    """Replaces the payload with zeros *and* updates its checksums: an engine that uses the file gives other answers."""
    raw = read_raw(path)
    payload = bytes(len(raw.payload))
    header = raw.header
    for segment in raw.meta["segments"]:
        fresh = xxhash.xxh3_128_hexdigest(payload[segment["offset"] : segment["offset"] + segment["stored"]])
        header = header.replace(segment["xxh3"].encode(), fresh.encode())
    path.write_bytes(_with_new_digest(header, raw.meta["digest"]) + payload + raw.tail)


def _with_new_digest(header: bytes, digest: str) -> bytes:
    """Returns the header with its own digest recomputed."""
    at = header.rfind(digest.encode())
    blank = header[:at] + b"0" * 32 + header[at + 32 :]
    return blank[:at] + xxhash.xxh3_128_hexdigest(blank).encode() + blank[at + 32 :]


# ------------------------------------------------------------------ damage

Damage = Callable[[Sequence[Path], random.Random], None]
"""Damages each of the given files, so that none of them may be served."""


def _each(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Damage:
    def damage(files: Sequence[Path], rng: random.Random) -> None:
        for path in files:
            path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return damage


def _flip(data: bytearray, at: int, rng: random.Random) -> bytearray:
    data[at] ^= 1 << rng.randrange(8)
    return data


def _payload_start(data: bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _payload_end(data: bytearray) -> int:
    start = _payload_start(data)
    meta = json.loads(json.loads(data[8:start])["__metadata__"]["lmcache"])
    return start + int(meta["payload_bytes"])


def _flip_payload(data: bytearray, rng: random.Random) -> bytearray:
    return _flip(data, rng.randrange(_payload_start(data), _payload_end(data)), rng)


def _flip_header(data: bytearray, rng: random.Random) -> bytearray:
    text = bytes(data[8 : _payload_start(data)]).rstrip()
    return _flip(data, 8 + rng.randrange(len(text)), rng)


def _cut_payload(data: bytearray, rng: random.Random) -> bytearray:
    start = _payload_start(data)
    return data[: rng.randrange(start, len(data) - 4096)]


def _delete(files: Sequence[Path], rng: random.Random) -> None:
    for path in files:
        path.unlink()


def _rotate(files: Sequence[Path], rng: random.Random) -> None:
    """Gives each file the content of another one: intact, but of the wrong object."""
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)


DAMAGES: Mapping[str, Damage] = {
    "bit flipped in the payload": _each(_flip_payload),
    "bit flipped in the payload's first byte": _each(lambda data, rng: _flip(data, _payload_start(data), rng)),
    "bit flipped in the payload's last byte": _each(lambda data, rng: _flip(data, _payload_end(data) - 1, rng)),
    "bit flipped in the header": _each(_flip_header),
    "payload cut short": _each(_cut_payload),
    "header cut short": _each(lambda data, rng: data[: rng.randrange(1, 4096)]),
    "empty": _each(lambda data, rng: b""),
    "zeros of the right length": _each(lambda data, rng: bytes(len(data))),
    "deleted": _delete,
    "swapped with others": _rotate,
}
"""Kinds of damage by name, for parametrised tests."""
