"""Broken tiers: our own, each with one defect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lmcache.keys import ObjectId
from lmcache.plan import Status
from lmcache.spec import Rect
from lmcache.tiers.base import Read, Result, Tier, Write
from lmcache.tiers.disk import DiskTier
from lmcache.tiers.memory import MemoryTier
from lmcache_conformance.labs.our_tiers import QUICK, DiskTierTests, MemoryTierTests
from lmcache_conformance.mutants import mutant
from lmcache_conformance.suites.tiers import TierCapabilities

NO_WAY_AROUND = TierCapabilities(persistent=True, bounded=True, shared=True)
"""For tiers with other file names: their mutants must be killed by what they serve, not by where the suite looks for files."""

# ---------------------------------------------------------------- names


class _ShortDigest(DiskTier):
    def _path(self, id: ObjectId) -> str:
        return super()._path(id._replace(chain=id.chain[:1]))


@mutant(row="another request's KV served from disk", project="LMCache #4385")
class MutantServesAnotherRequestsObject(DiskTierTests):
    """File names contain one byte of the digest, so that requests share files."""

    capabilities = NO_WAY_AROUND
    tier_class = _ShortDigest


class _NoRank(DiskTier):
    def _path(self, id: ObjectId) -> str:
        return super()._path(id._replace(rect=Rect(id.rect.layers, (0, 1))))


@mutant(row="key lacks kv dtype / TP rank / CP rank / LoRA version / tenant salt", project="SGLang #10969")
class MutantNamesWithoutTheRank(DiskTierTests):
    """File names lack the range of heads: all tensor-parallel ranks write to one file."""

    capabilities = NO_WAY_AROUND
    tier_class = _NoRank


class _HashedNames(DiskTier):
    _known: ClassVar[dict[ObjectId, ObjectId]] = {}

    def _renamed(self, id: ObjectId) -> ObjectId:
        renamed = id._replace(chain=(hash(id.chain) & (1 << 64) - 1).to_bytes(8, "big"))
        self._known[renamed] = id
        return renamed

    def _path(self, id: ObjectId) -> str:
        return super()._path(self._renamed(id))

    def scan(self) -> Any:
        for found in super().scan():
            yield found._replace(id=self._known.get(found.id, found.id))


@mutant(row="keys differ between processes (hash(None), PYTHONHASHSEED)", project="LMCache #1139")
class MutantNamesFromHash(DiskTierTests):
    """File names contain Python's `hash` of the digest."""

    capabilities = NO_WAY_AROUND
    tier_class = _HashedNames


class _OwnFolder(DiskTier):
    def __init__(self, root: Path, *args: Any, **settings: Any) -> None:
        super().__init__(root, *args, **settings)
        self._objects = os.path.join(self._objects, str(os.getpid()))


@mutant(row="a new process on the same folder sees nothing", project="LMCache #562")
class MutantAFolderPerProcess(DiskTierTests):
    """Objects are in a folder that is named after the process."""

    capabilities = TierCapabilities(persistent=True)  # the janitor does not visit the folder
    tier_class = _OwnFolder


class _Numbered(DiskTier):
    """Numbers files in order of arrival, and keeps the numbers in this process only."""

    def _number(self, id: ObjectId) -> bytes:
        numbers: dict[ObjectId, int] = self.__dict__.setdefault("_numbers", {})
        return numbers.setdefault(id, len(numbers)).to_bytes(32, "big")

    def _path(self, id: ObjectId) -> str:
        return super()._path(id._replace(chain=self._number(id), depth=0))

    def scan(self) -> Any:
        numbers: dict[ObjectId, int] = self.__dict__.setdefault("_numbers", {})
        by_number = {number.to_bytes(32, "big"): id for id, number in numbers.items()}
        for found in super().scan():
            yield found._replace(id=by_number.get(found.id.chain, found.id))


@mutant(row="wrong output after the server restarts", project="LMCache #4492")
class MutantForgetsWhatIsWhere(DiskTierTests):
    """After a restart, the first lookup gets the first file."""

    capabilities = NO_WAY_AROUND
    tier_class = _Numbered


# ---------------------------------------------------------------- what is served


class _ReportsRequestedBytes(DiskTier):
    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        results = super().read_into(reads, deadline=deadline)
        wanted = [sum(r.length for r in read.ranges) for read in reads]
        return [r._replace(nbytes=n) if r.status is Status.OK else r for r, n in zip(results, wanted, strict=True)]


@mutant(row="truncated chunk file reported as a full hit; stale pool bytes fill the rest", project="lmcache 0.5.6")
class MutantTruncatedIsWhole(DiskTierTests):
    """Reports as many bytes as were requested, whatever was read."""

    tier_class = _ReportsRequestedBytes


class _FlipsABit(DiskTier):
    """Flips one bit, always at the same offset."""

    def read_into(self, reads: Sequence[Read], *, deadline: float | None = None) -> list[Result]:
        results = super().read_into(reads, deadline=deadline)
        for read in reads:
            for buffer, (offset, length) in zip(read.buffers, read.ranges, strict=True):
                if offset <= 8192 < offset + length:
                    buffer[8192 - offset] ^= 1
        return results


@mutant(row="flipped bits in a chunk file reported as a full hit", project="lmcache 0.5.6")
class MutantFlipsABit(DiskTierTests):
    """One bit of what is read differs from what was written."""

    tier_class = _FlipsABit


class _EmptyIsAValue(DiskTier):
    def _contains(self, id: ObjectId) -> Result:
        return Result(Status.OK if os.path.exists(self._path(id)) else Status.MISSING)

    def _read(self, read: Read, deadline: float | None) -> Result:
        path = self._path(read.id)
        if os.path.exists(path) and not os.path.getsize(path):
            return Result(Status.OK, 0)
        return super()._read(read, deadline)

    def _settled(self, path: str) -> bool:
        return os.path.exists(path)


@mutant(row="key exists with an empty value", project="Mooncake #3465")
class MutantEmptyValue(DiskTierTests):
    """An empty file counts as an object."""

    tier_class = _EmptyIsAValue


class _KeepsFailures(MemoryTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.status is not Status.OK and not self._closed:
            with self._lock:
                self._objects.setdefault(write.id, b"half")
        return result


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantFailedWriteIsVisible(MemoryTierTests):
    """What a failed write has written can be read."""

    tier_class = _KeepsFailures


class _HalfIsPublished(DiskTier):
    """Writes without a temporary name: on a full device, the incomplete file remains."""

    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.status is Status.FULL and self._capacity is None:
            path = Path(self._path(write.id))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, 100)
        return result


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantHalfAFileIsVisible(DiskTierTests):
    """An incomplete file is visible under its final name."""

    tier_class = _HalfIsPublished


# ---------------------------------------------------------------- space


class _Phantom(DiskTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.status is Status.FULL and self._capacity is None:
            size = sum(memoryview(part).nbytes for part in write.parts)
            self._usage.add(size, limit=None, commit=lambda: None)
        return result


@mutant(row="ENOSPC leaves tasks stuck, phantom usage, and no store ever succeeds again", project="lmcache 0.5.6")
class MutantPhantomUsage(DiskTierTests):
    """Space reserved by a failed write is never released."""

    tier_class = _Phantom


class _FullForEver(DiskTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        if self.__dict__.get("_was_full"):
            return Result(Status.FULL, 0, "the device was full before")
        result = super()._write(write, deadline)
        self.__dict__["_was_full"] = result.status is Status.FULL and self._capacity is None
        return result


@mutant(row="ENOSPC leaves tasks stuck, phantom usage, and no store ever succeeds again", project="lmcache 0.5.6")
class MutantFullForEver(DiskTierTests):
    """After one ENOSPC no write succeeds any more."""

    tier_class = _FullForEver
    patience = 2.0


@mutant(row="disk tier grows without bound", project="vLLM #54327")
class MutantNoBound(DiskTierTests):
    """The capacity is ignored."""

    def open_tier(self, place: Path, capacity: int | None) -> Tier:
        """See `TierTests`."""
        return DiskTier(place, None, timing=QUICK)


class _ForgetsEarlierProcesses(DiskTier):
    """Counts and evicts only what this process has written."""

    def __init__(self, root: Path, capacity: int | None = None, **settings: Any) -> None:
        super().__init__(root, None, **settings)
        self._mine: dict[ObjectId, int] = {}
        self._bound = capacity

    def _write(self, write: Write, deadline: float | None) -> Result:
        size = sum(memoryview(part).nbytes for part in write.parts)
        if self._bound is not None and size > self._bound:
            return Result(Status.FULL)
        while self._bound is not None and self._mine and sum(self._mine.values()) + size > self._bound:
            oldest = next(iter(self._mine))
            del self._mine[oldest]
            self._delete(oldest)
        result = super()._write(write, deadline)
        if result.nbytes:
            self._mine[write.id] = result.nbytes
        return result


@mutant(row="disk tier grows without bound", project="vLLM #54779")
class MutantBoundPerLife(DiskTierTests):
    """Usage is counted from zero after each restart."""

    tier_class = _ForgetsEarlierProcesses


class _Raises(MemoryTier):
    def _write(self, write: Write, deadline: float | None) -> Result:
        size = sum(memoryview(part).nbytes for part in write.parts)
        if self._capacity is not None and self._used + size > self._capacity:
            raise MemoryError("no memory left")
        return super()._write(write, deadline)


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantFullMemoryRaises(MemoryTierTests):
    """A write to a full tier raises."""

    tier_class = _Raises


# ---------------------------------------------------------------- reset, time


class _ClearsHalf(DiskTier):
    """Keeps contents in memory in front of the files, which `clear` does not remove."""

    def _read(self, read: Read, deadline: float | None) -> Result:
        kept: dict[ObjectId, bytes] = self.__dict__.setdefault("_kept", {})
        if read.id in kept and not os.path.exists(self._path(read.id)):
            data, moved = kept[read.id], 0
            for buffer, (offset, length) in zip(read.buffers, read.ranges, strict=True):
                part = data[offset : offset + length]
                buffer[: len(part)] = part
                moved += len(part)
            return Result(Status.OK, moved)
        return super()._read(read, deadline)

    def _write(self, write: Write, deadline: float | None) -> Result:
        result = super()._write(write, deadline)
        if result.nbytes:
            self.__dict__.setdefault("_kept", {})[write.id] = b"".join(write.parts)
        return result

    def _delete(self, id: ObjectId) -> Result:
        self.__dict__.setdefault("_kept", {}).pop(id, None)
        return super()._delete(id)


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearLeavesACopy(DiskTierTests):
    """`clear` removes the files; copies in memory are still served."""

    tier_class = _ClearsHalf


class _NoDeadline(DiskTier):
    def _refusal(self, deadline: float | None) -> Result | None:
        return super()._refusal(None)


@mutant(row="a dead or slow remote hangs the engine", project="LMCache #4123")
class MutantIgnoresDeadlines(DiskTierTests):
    """Ignores deadlines."""

    tier_class = _NoDeadline
