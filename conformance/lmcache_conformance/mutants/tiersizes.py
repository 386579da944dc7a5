"""Tiers that are right for few and small objects only, or answer more than they have done."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.tiers.base import Found, Read, Result, Write
from lmcache.tiers.disk import DiskTier
from lmcache_conformance.labs.our_tiers import DiskTierTests
from lmcache_conformance.mutants import BEYOND, mutant, only
from lmcache_conformance.suites.tiers import TierCapabilities

MANY = DiskTierTests.test_more_objects_than_a_store_lists_at_once_are_listed_deleted_and_cleared
KILL9 = DiskTierTests.test_what_was_flushed_survives_kill9_and_the_rest_is_whole_or_missing
POWER = DiskTierTests.test_what_a_durable_flush_covers_survives_a_power_loss
LATE_WRITE = DiskTierTests.test_a_deadline_that_passes_during_a_write_leaves_the_rest_undone_now_and_later
LATE_CALL = DiskTierTests.test_a_deadline_that_passes_during_a_call_ends_it
PAGE = 1_000

# ---------------------------------------------------------------- many and large


class _ListsAPage(DiskTier):
    def scan(self) -> Iterator[Found]:
        return itertools.islice(super().scan(), PAGE)


@only(MANY)
@mutant(row=BEYOND + "only the first page of a listing is used", project="stores that list 1,000 keys a request")
class MutantListsOnePage(DiskTierTests):
    """`scan` stops at 1,000 objects."""

    tier_class = _ListsAPage


class _ClearsAPage(DiskTier):
    def clear(self, namespace: bytes | None = None) -> int:
        found = (found.id for found in self.scan() if namespace in (None, found.id.namespace))
        return len(self.delete(list(itertools.islice(found, PAGE))))


@only(MANY)
@mutant(row="clear returns OK while a tier still serves", project="stores that list 1,000 keys a request")
class MutantClearsOnePage(DiskTierTests):
    """`clear` stops at 1,000 objects."""

    tier_class = _ClearsAPage


class _DeletesAPage(DiskTier):
    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        return super().delete(ids[:PAGE], deadline=deadline) + [Result(Status.OK)] * len(ids[PAGE:])


@only(MANY)
@mutant(row="clear returns OK while a tier still serves", project="stores that delete 1,000 keys a request")
class MutantDeletesOnePage(DiskTierTests):
    """`delete` ignores ids beyond the first 1,000 of a call."""

    tier_class = _DeletesAPage


class _DropsTheRest(DiskTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.nbytes > 64 << 20:
            os.truncate(self._path(write.id), 64 << 20)
        return result


@only(DiskTierTests.test_an_object_of_many_megabytes_survives)
@mutant(row=BEYOND + "the end of a large object is dropped", project="stores with a limit on values")
class MutantDropsBeyond64MiB(DiskTierTests):
    """What is beyond the first 64 MiB of an object is not stored."""

    tier_class = _DropsTheRest


# ---------------------------------------------------------------- deadlines


class _LateButPublished(DiskTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, None)
        late = deadline is not None and time.monotonic() > deadline
        return Result(Status.LATE) if late else result


@only(LATE_WRITE)
@mutant(row="a store that failed stays visible", project="clients that give up on an answer")
class MutantLateButPublished(DiskTierTests):
    """A write that took too long is published, and answers LATE."""

    tier_class = _LateButPublished


class _LateAppears(DiskTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.status is Status.LATE:
            again = Write(write.id, [bytes(part) for part in write.parts])
            threading.Timer(0.1, super()._write, (again, None)).start()
        return result


@only(LATE_WRITE)
@mutant(row="a store that failed stays visible", project="clients that go on in the background")
class MutantLateAppears(DiskTierTests):
    """A write that answered LATE is completed in the background."""

    tier_class = _LateAppears


class _AsksTheClockOnce(DiskTier):
    def _once(self, count: int, deadline: float | None) -> list[Result]:
        refused = self._refusal(deadline)
        return [refused] * count if refused else []

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        return self._once(len(ids), deadline) or super().contains(ids)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        return self._once(len(reads), deadline) or super().read_into(reads)

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        return self._once(len(ids), deadline) or super().delete(ids)


class _WritesAskTheClockOnce(DiskTier):
    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        refused = self._refusal(deadline)
        return [refused] * len(writes) if refused else super().write(writes)


@only(LATE_CALL)
@mutant(row="a dead or slow remote hangs the engine", project="deadlines that are checked once")
class MutantAsksTheClockOnce(DiskTierTests):
    """Reads, probes and deletes check the deadline when a call begins, and not again."""

    tier_class = _AsksTheClockOnce


@only(LATE_WRITE)
@mutant(row="a dead or slow remote hangs the engine", project="deadlines that are checked once")
class MutantWritesAskTheClockOnce(DiskTierTests):
    """Writes check the deadline when a call begins, and not again."""

    tier_class = _WritesAskTheClockOnce


# ---------------------------------------------------------------- flush


class _WritesBehind(DiskTier):
    """Writes in the background. Every call waits for what is under way, except `flush`."""

    shared = False

    def __init__(self, root: Path, capacity: int | None = None, **settings: Any) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._under_way: list[Future[list[Result]]] = []
        super().__init__(root, capacity, **settings)

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.pop().result()

    def _later(self, write: Write) -> list[Result]:
        time.sleep(0.02)
        return super().write([write])

    def write(self, writes: Sequence[Write], *, deadline: float | None = None) -> list[Result]:
        return [self._write_behind(write, deadline) for write in writes]

    def _write_behind(self, write: Write, deadline: float | None) -> Result:
        self._wait()
        data = b"".join(write.parts)
        [there] = super().contains([write.id], deadline=deadline)
        if there.status is not Status.MISSING or not data:
            return super().write([write], deadline=deadline)[0]
        self._under_way.append(self._pool.submit(self._later, Write(write.id, [data])))
        return Result(Status.OK, len(data))

    def contains(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        self._wait()
        return super().contains(ids, deadline=deadline)

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        self._wait()
        return super().read_into(reads, deadline=deadline)

    def delete(self, ids: Sequence[ObjectId], *, deadline: float | None = None) -> list[Result]:
        self._wait()
        return super().delete(ids, deadline=deadline)

    def clear(self, namespace: bytes | None = None) -> int:
        self._wait()
        return super().clear(namespace)

    def scan(self) -> Iterator[Found]:
        self._wait()
        return super().scan()

    def used_bytes(self) -> int:
        self._wait()
        return super().used_bytes()

    def close(self) -> None:
        self._wait()
        super().close()


@only(KILL9)
@mutant(row=BEYOND + "a flush returns before what it covers is stored", project="write-behind clients")
class MutantFlushDoesNotWait(DiskTierTests):
    """Writes in the background, and `flush` does not wait for it."""

    capabilities = TierCapabilities(persistent=True)
    tier_class = _WritesBehind


class _NeverSyncs(DiskTier):
    def flush(self, *, durable: bool = False) -> None:
        pass


_LOST = BEYOND + "a durable flush syncs nothing, or not everything"


@only(POWER)
@mutant(row=_LOST, project="caches that promise durability")
class MutantNeverSyncs(DiskTierTests):
    """A durable flush does nothing."""

    tier_class = _NeverSyncs


class _SyncsFiles(DiskTier):
    def flush(self, *, durable: bool = False) -> None:
        for path in list(self._durability._unsynced) if durable else ():
            self._durability._sync_file(path)


@only(POWER)
@mutant(row=_LOST, project="a new file whose folder is not synced")
class MutantSyncsNoFolder(DiskTierTests):
    """A durable flush syncs files, and not the folders that hold their names."""

    tier_class = _SyncsFiles


class _DoesNotWaitForTheOther(DiskTier):
    def flush(self, *, durable: bool = False) -> None:
        if self._durability._sync_lock.acquire(blocking=False):
            self._durability._sync_lock.release()
            super().flush(durable=durable)


@only(POWER)
@mutant(row=_LOST, project="two flushes at once")
class MutantDoesNotWaitForTheOtherFlush(DiskTierTests):
    """While a durable flush is under way, another one returns at once."""

    tier_class = _DoesNotWaitForTheOther


class _SyncsItsOwn(DiskTier):
    def flush(self, *, durable: bool = False) -> None:
        with mock.patch("lmcache.tiers.durable._sync_filesystem", return_value=None):
            super().flush(durable=durable)

    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if not result.nbytes:
            self._durability._unsynced.pop(self._path(write.id), None)
        return result


@only(POWER)
@mutant(row=_LOST, project="objects that another process has written")
class MutantSyncsOnlyItsOwn(DiskTierTests):
    """What another process has published is OK for a write, and not synced by a durable flush."""

    tier_class = _SyncsItsOwn
