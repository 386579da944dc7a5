"""Caches that treat failures as success, or wait for them forever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache import CacheEngine, PagedKV
from lmcache.engine import Hit, Slots
from lmcache.plan import Status
from lmcache.transfer.jobs import ActiveJob
from lmcache_conformance.labs.kv_pool import CHUNK
from lmcache_conformance.mutants import BEYOND, mutant
from lmcache_conformance.mutants.brokencache import BrokenCacheFaultTests, BrokenCacheTests


class _LoadsSucceed(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        super().retrieve(hit, kv, slots, skip=skip)
        return hit.tokens


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantLoadAlwaysSucceeds(BrokenCacheFaultTests):
    """Reports the whole hit as loaded, whatever arrived."""

    cache_class = _LoadsSucceed


class _OffersMore(CacheEngine):
    def lookup(self, tokens: Any, **names: Any) -> Hit:
        hit = super().lookup(tokens, **names)
        if len(tokens) >= hit.tokens + CHUNK and "max_tokens" not in names:
            hit.tokens += CHUNK
            hit.by_tier["dram"] = hit.by_tier.get("dram", 0) + CHUNK
        return hit


@mutant(row=BEYOND + "a hit is reported that is none", project="any adapter that counts wrong")
class MutantOffersOneMore(BrokenCacheTests):
    """Offers one chunk more than it holds."""

    cache_class = _OffersMore


class _StoresSucceed(CacheEngine):
    """Objects count as stored once the copy was attempted."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        finish = self._rank.transfer._runner.finish

        def pretend(
            active: ActiveJob, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = ""
        ) -> None:
            finish(active, indices, Status.OK if active.job.kind == "store" else status, nbytes, detail)

        self._rank.transfer._runner.finish = pretend  # type: ignore[method-assign]


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantFailedStoreIsOffered(BrokenCacheFaultTests):
    """Offers an object for which it had no memory."""

    cache_class = _StoresSucceed


class _WritesLate(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        tracker = self._rank.transfer.tracker
        begin = tracker.begin_engine_write

        def always(active: ActiveJob) -> bool:
            if not begin(active):
                active.moving += 1
            return True

        tracker.begin_engine_write = always  # type: ignore[method-assign]


@mutant(row="slot evicted or reused while a slow read is in flight", project="Mooncake #850")
class MutantLateLoadStillWrites(BrokenCacheFaultTests):
    """Writes to engine memory when the read of a cancelled load completes."""

    cache_class = _WritesLate


@mutant(row="a dead or slow remote hangs the engine", project="LMCache #4123 #4676 #4759")
class MutantWaitsForEver(BrokenCacheFaultTests):
    """Has no effective deadline for calls of a tier."""

    settings = {"load_timeout_s": 3600.0, "probe_timeout_s": 3600.0}  # noqa: RUF012
    patience = 3.0


class _LosesFull(CacheEngine):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        finish = self._rank.transfer._runner.finish

        def forget(
            active: ActiveJob, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = ""
        ) -> None:
            if not (active.job.kind == "write_back" and status is Status.FULL):
                finish(active, indices, status, nbytes, detail)

        self._rank.transfer._runner.finish = forget  # type: ignore[method-assign]


@mutant(row="ENOSPC leaves tasks stuck, phantom usage, and no store ever succeeds again", project="lmcache 0.5.6")
class MutantFullDiskStrandsTasks(BrokenCacheFaultTests):
    """Never finishes a write to a full disk, so that its slots stay pinned."""

    cache_class = _LosesFull
    patience = 3.0
