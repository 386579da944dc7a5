"""The simplest tier: a dict in this process. An example for authors of tiers, and a base for tests that inject faults."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Found, Read, Result, Write, refusal


class MemoryTier:
    """Keeps objects as `bytes` and evicts the least recently used. `capacity_bytes=None`: no limit."""

    name = "memory"
    shared = False

    def __init__(self, capacity_bytes: int | None = None) -> None:
        self._capacity = capacity_bytes
        self._objects: dict[ObjectId, bytes] = {}  # least recently used first
        self._used = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def capacity_bytes(self) -> int | None:
        """The most bytes the tier holds; None: no limit."""
        return self._capacity

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.contains`."""
        with self._lock:
            return [
                self._refusal(deadline) or Result(Status.OK if id in self._objects else Status.MISSING) for id in ids
            ]

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.read_into`."""
        return [self._read(read, deadline) for read in reads]

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.write`."""
        return [self._write(write, deadline) for write in writes]

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        """See `Tier.delete`."""
        with self._lock:
            return [self._refusal(deadline) or self._remove(id) for id in ids]

    def clear(self, namespace: bytes | None = None) -> int:
        """See `Tier.clear`."""
        with self._lock:
            found = [id for id in self._objects if namespace is None or id.namespace == namespace]
            for id in found:
                self._remove(id)
            return len(found)

    def scan(self) -> Iterator[Found]:
        """See `Tier.scan`."""
        with self._lock:
            found = [Found(id, len(data)) for id, data in self._objects.items()]
        yield from found

    def flush(self, *, durable: bool = False) -> None:
        """Does nothing: this tier is only as durable as the process."""

    def used_bytes(self) -> int:
        """See `Tier.used_bytes`."""
        return self._used

    def close(self) -> None:
        """See `Tier.close`."""
        self._closed = True

    def _refusal(self, deadline: float | None) -> Result | None:
        return refusal(self._closed, deadline)

    def _read(self, read: Read, deadline: float | None) -> Result:
        with self._lock:
            if refused := self._refusal(deadline):
                return refused
            data = self._objects.pop(read.id, None)
            if data is None:
                return Result(Status.MISSING)
            self._objects[read.id] = data  # now the most recently used
        moved = 0
        for buffer, (offset, length) in zip(read.buffers, read.ranges, strict=True):
            part = memoryview(data)[offset : offset + length]
            buffer[: len(part)] = part
            moved += len(part)
        return Result(Status.OK, moved)

    def _write(self, write: Write, deadline: float | None) -> Result:
        data = b"".join(write.parts)
        with self._lock:
            if refused := self._refusal(deadline):
                return refused
            if not data:
                return Result(Status.FAILED, 0, "an object has at least one byte")
            if write.id in self._objects:
                return Result(Status.OK)
            if self._capacity is not None:
                if len(data) > self._capacity:
                    return Result(Status.FULL, 0, f"{len(data)} bytes do not fit into {self._capacity}")
                while self._used + len(data) > self._capacity:
                    self._remove(next(iter(self._objects)))
            self._objects[write.id] = data
            self._used += len(data)
            return Result(Status.OK, len(data))

    def _remove(self, id: ObjectId) -> Result:
        self._used -= len(self._objects.pop(id, b""))
        return Result(Status.OK)
