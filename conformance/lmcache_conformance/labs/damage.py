"""Raw object files: find them, check them, and break them in the ways in which disks and people do.

Nothing here goes through the cache under test. Files are read as what docs/file-format.md says they are: safetensors with
one JSON string of metadata, in which each segment of the payload has an XXH3-128.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash


def object_files(folder: Path) -> list[Path]:
    """Every object below a disk tier's folder, in order of token position, then name."""
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
    """Split a file.

    Raises:
        ValueError: it is not a safetensors file with our metadata.
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
    """What is wrong with a file that should be whole; None if nothing is."""
    try:
        return _problem(path, read_raw(path))
    except (ValueError, LookupError, TypeError) as error:  # a flipped bit can make anything of JSON
        return f"unreadable: {type(error).__name__}: {error}"


def _problem(path: Path, raw: Raw) -> str | None:
    end = 0
    for segment in raw.meta["segments"]:
        if segment["offset"] != end:
            return f"segment at {segment['offset']} leaves a gap after {end}"
        end += segment["stored"]
        part = raw.payload[segment["offset"] : end]
        if xxhash.xxh3_128_hexdigest(part) != segment["xxh3"] or len(part) != segment["stored"]:
            return f"segment {segment['planes']} of layer {segment['layer']} has another checksum than its header says"
    if end != len(raw.payload):
        return f"its segments end at {end}, the payload at {len(raw.payload)}"
    if any(raw.tail):
        return "its tail is not zero"
    if _resealed(raw.header, raw.meta["digest"]) != raw.header:
        return "its header has another checksum than it says"
    if (name := _name(raw.meta)) != path.name or path.parts[-3] != raw.meta["namespace"]:
        return f"it holds {name} of namespace {raw.meta['namespace'][:16]}…, and is called otherwise"
    return None


def _name(meta: Mapping[str, Any]) -> str:
    """The file name that its metadata asks for."""
    (l0, l1), (h0, h1) = meta["layers"], meta["heads"]
    tokens = meta["tokens"][1] - meta["tokens"][0]
    return f"{meta['chain']}.{meta['group']}.L{l0}-{l1}.H{h0}-{h1}.{meta['depth']}.{tokens}.safetensors"


def poison(path: Path) -> None:
    """Replace the payload by other values, *with* matching checksums: who reports a hit on it must show it in what it says."""
    raw = read_raw(path)
    payload = bytes(len(raw.payload))
    header = raw.header
    for segment in raw.meta["segments"]:
        fresh = xxhash.xxh3_128_hexdigest(payload[segment["offset"] : segment["offset"] + segment["stored"]])
        header = header.replace(segment["xxh3"].encode(), fresh.encode())
    path.write_bytes(_resealed(header, raw.meta["digest"]) + payload + raw.tail)


def _resealed(header: bytes, digest: str) -> bytes:
    """The header with its own digest computed again."""
    at = header.rfind(digest.encode())
    blank = header[:at] + b"0" * 32 + header[at + 32 :]
    return blank[:at] + xxhash.xxh3_128_hexdigest(blank).encode() + blank[at + 32 :]


# ------------------------------------------------------------------ damage

Damage = Callable[[Sequence[Path], random.Random], None]
"""Breaks every one of the files: none may be served any more."""


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


def _flip_payload(data: bytearray, rng: random.Random) -> bytearray:
    start = _payload_start(data)
    meta = json.loads(json.loads(data[8:start])["__metadata__"]["lmcache"])
    return _flip(data, start + rng.randrange(int(meta["payload_bytes"])), rng)


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
    """Each file gets another one's content: whole, but not what its name says."""
    contents = [path.read_bytes() for path in files]
    for path, content in zip(files, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)


DAMAGES: Mapping[str, Damage] = {
    "bit flipped in the payload": _each(_flip_payload),
    "bit flipped in the header": _each(_flip_header),
    "payload cut short": _each(_cut_payload),
    "header cut short": _each(lambda data, rng: data[: rng.randrange(1, 4096)]),
    "empty": _each(lambda data, rng: b""),
    "zeros of the right length": _each(lambda data, rng: bytes(len(data))),
    "deleted": _delete,
    "swapped with others": _rotate,
}
"""By name, for parametrising."""
