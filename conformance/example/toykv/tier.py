"""A tier in an SQLite file: one row per object, with FIFO eviction."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Found, Read, Result, Write

_TABLE = "CREATE TABLE IF NOT EXISTS objects (id BLOB PRIMARY KEY, namespace BLOB, data BLOB NOT NULL)"


class SqliteTier:
    """Stores at most `capacity` bytes of objects in the file `path`. Several processes may share a file."""

    name = "sqlite"
    shared = True

    def __init__(self, path: Path, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._closed = False
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=60)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(_TABLE)

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        return [self._safely(deadline, lambda id=id: self._contains(id)) for id in ids]

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        return [self._safely(deadline, lambda read=read: self._read(read)) for read in reads]

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        return [self._safely(deadline, lambda write=write: self._write(write)) for write in writes]

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        return [self._safely(deadline, lambda id=id: self._delete(id)) for id in ids]

    def clear(self, namespace: bytes | None = None) -> int:
        with self._lock:
            if namespace is None:
                return self._db.execute("DELETE FROM objects").rowcount
            return self._db.execute("DELETE FROM objects WHERE namespace = ?", (namespace,)).rowcount

    def scan(self) -> Iterator[Found]:
        with self._lock:
            rows = self._db.execute("SELECT id, length(data) FROM objects").fetchall()
        for id, size in rows:
            yield Found(msgspec.msgpack.decode(id, type=ObjectId), size)

    def flush(self, *, durable: bool = False) -> None:
        """A completed statement survives `kill -9`. To survive a power loss, `durable` writes back and syncs the log."""
        if durable:
            with self._lock:
                self._db.execute("PRAGMA wal_checkpoint(FULL)")

    def used_bytes(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT coalesce(sum(length(data)), 0) FROM objects").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._db.close()

    # ---------------------------------------------------------------- one item

    def _safely(self, deadline, act) -> Result:
        """Runs `act`; returns errors (closed, late, SQLite) as the item's result instead of raising them."""
        with self._lock:
            if self._closed:
                return Result(Status.FAILED, 0, "the tier is closed")
            if deadline is not None and time.monotonic() > deadline:
                return Result(Status.LATE, 0, "the deadline had passed")
            try:
                return act()
            except sqlite3.Error as error:
                return Result(Status.FAILED, 0, str(error))

    def _contains(self, id: ObjectId) -> Result:
        found = self._db.execute("SELECT 1 FROM objects WHERE id = ?", (_key(id),)).fetchone()
        return Result(Status.OK if found else Status.MISSING)

    def _read(self, read: Read) -> Result:
        found = self._db.execute("SELECT data FROM objects WHERE id = ?", (_key(read.id),)).fetchone()
        if found is None:
            return Result(Status.MISSING)
        data, moved = memoryview(found[0]), 0
        for buffer, (offset, length) in zip(read.buffers, read.ranges, strict=True):
            part = data[offset : offset + length]
            buffer[: len(part)] = part
            moved += len(part)
        return Result(Status.OK, moved)

    def _write(self, write: Write) -> Result:
        data, key = b"".join(write.parts), _key(write.id)
        if not data:
            return Result(Status.FAILED, 0, "an object has at least one byte")
        if self._capacity is not None and len(data) > self._capacity:
            return Result(Status.FULL, 0, f"{len(data)} bytes do not fit into {self._capacity}")
        with self._transaction():
            if self._db.execute("SELECT 1 FROM objects WHERE id = ?", (key,)).fetchone():
                return Result(Status.OK)
            while self._capacity is not None and self._used() + len(data) > self._capacity:
                self._db.execute("DELETE FROM objects WHERE rowid = (SELECT min(rowid) FROM objects)")
            self._db.execute("INSERT INTO objects VALUES (?, ?, ?)", (key, write.id.namespace, data))
        return Result(Status.OK, len(data))

    def _delete(self, id: ObjectId) -> Result:
        self._db.execute("DELETE FROM objects WHERE id = ?", (_key(id),))
        return Result(Status.OK)

    def _used(self) -> int:
        return int(self._db.execute("SELECT coalesce(sum(length(data)), 0) FROM objects").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _key(id: ObjectId) -> bytes:
    return msgspec.msgpack.encode(id)
