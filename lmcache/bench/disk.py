"""Compares object files with the raw limit of a folder: a plain write, and a plain read plus a checksum, of the same bytes.

Raw and tier I/O alternate within each repetition and the best time of each counts, since times on a busy machine are noisy.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash

from lmcache.format.codec import ObjectCodec
from lmcache.keys import ObjectId
from lmcache.layout import ObjectLayout
from lmcache.plan import Status
from lmcache.spec import KVSpec
from lmcache.tiers.disk import DiskTier
from lmcache.transfer.arena import Arena


@dataclass(frozen=True)
class DiskResult:
    """Speed of one folder for one model shape and order.

    Attributes:
        model: label of the shape.
        order: byte order of the files; in memory the objects have an engine's native order.
        write_gbs, read_gbs: GB/s of payload through the disk tier, including checksums.
        raw_write_gbs: GB/s of plain `write` calls to new files.
        raw_read_gbs: GB/s of plain `preadv` plus one XXH3-128 over the bytes.
        disk_write_ratio, disk_read_ratio: disk tier / raw.
    """

    model: str
    order: str
    write_gbs: float
    raw_write_gbs: float
    disk_write_ratio: float
    read_gbs: float
    raw_read_gbs: float
    disk_read_ratio: float


def measure(
    model: str,
    spec: KVSpec,
    native: ObjectLayout,
    *,
    order: Literal["canonical", "native"],
    objects: int,
    folder: Path | None = None,
    repeat: int = 5,
) -> DiskResult:
    """Measures writes and reads of `objects` objects in `folder` (default: a tmpfs, to measure the code and not the disk)."""
    home = Path(tempfile.mkdtemp(prefix="lmcache-bench-", dir=folder or _memory_folder()))
    arena = Arena(objects, native.nbytes)
    payloads = [arena.view(i) for i in range(objects)]
    for i, payload in enumerate(payloads):
        payload.fill_(i)
    ids = [ObjectId(b"bench" * 6, i.to_bytes(32, "big"), 0, spec.rects[0], native.tokens, i) for i in range(objects)]
    io = ObjectCodec(spec, native.tokens, order=order)
    best = dict.fromkeys(("write", "raw_write", "read", "raw_read"), float("inf"))
    try:
        for _ in range(repeat):
            raw = home / "raw"
            raw.mkdir()
            best["raw_write"] = min(best["raw_write"], _raw_write(raw, payloads))
            best["raw_read"] = min(best["raw_read"], _raw_read(raw, payloads))
            shutil.rmtree(raw)
            tier = DiskTier(home / "ours")
            best["write"] = min(best["write"], _write(io, tier, ids, payloads, native))
            best["read"] = min(best["read"], _read(io, tier, ids, payloads, native))
            tier.close()
            shutil.rmtree(home / "ours")
    finally:
        shutil.rmtree(home)
    total = objects * native.nbytes / 1e9
    return DiskResult(
        model=model,
        order=order,
        write_gbs=total / best["write"],
        raw_write_gbs=total / best["raw_write"],
        disk_write_ratio=best["raw_write"] / best["write"],
        read_gbs=total / best["read"],
        raw_read_gbs=total / best["raw_read"],
        disk_read_ratio=best["raw_read"] / best["read"],
    )


def _memory_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _raw_write(folder: Path, payloads: Sequence[torch.Tensor]) -> float:
    began = time.perf_counter()
    for i, payload in enumerate(payloads):
        file = os.open(folder / str(i), os.O_WRONLY | os.O_CREAT, 0o600)
        data = payload.numpy().data
        while len(data):
            data = data[os.write(file, data) :]
        os.close(file)
    return time.perf_counter() - began


def _raw_read(folder: Path, payloads: Sequence[torch.Tensor]) -> float:
    began = time.perf_counter()
    for i, payload in enumerate(payloads):
        file = os.open(folder / str(i), os.O_RDONLY)
        data, at = payload.numpy().data, 0
        while at < len(data):
            at += os.preadv(file, [data[at:]], at)
        os.close(file)
        xxhash.xxh3_128_digest(data)
    return time.perf_counter() - began


def _write(
    io: ObjectCodec, tier: DiskTier, ids: Sequence[ObjectId], payloads: Sequence[torch.Tensor], native: ObjectLayout
) -> float:
    began = time.perf_counter()
    for id, payload in zip(ids, payloads, strict=True):
        result = io.save(tier, id, payload, native)
        if result.status is not Status.OK:
            raise OSError(f"writing to {tier.name}: {result.status.name} {result.detail}")
    return time.perf_counter() - began


def _read(
    io: ObjectCodec, tier: DiskTier, ids: Sequence[ObjectId], payloads: Sequence[torch.Tensor], native: ObjectLayout
) -> float:
    began = time.perf_counter()
    for id, payload in zip(ids, payloads, strict=True):
        result = io.load(tier, id, payload, native, None).result
        if result.status is not Status.OK:
            raise OSError(f"reading from {tier.name}: {result.status.name} {result.detail}")
    return time.perf_counter() - began
