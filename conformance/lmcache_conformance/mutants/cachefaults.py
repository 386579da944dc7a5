"""Caches that take what failed for done, or wait for it for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache import CacheEngine, PagedKV
from lmcache.engine import Hit, Slots
from lmcache.plan import Status
from lmcache.transfer.jobs import ActiveJob
from lmcache_conformance.labs.kvlab import CHUNK
from lmcache_conformance.mutants import BEYOND, mutant
from lmcache_conformance.mutants.brokencache import BrokenCacheFaultTests, BrokenCacheTests


class _AllIsWell(CacheEngine):
    def retrieve(self, hit: Hit, kv: PagedKV, slots: Slots, *, skip: int = 0) -> int:
        super().retrieve(hit, kv, slots, skip=skip)
        return hit.tokens


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantLoadAlwaysSucceeds(BrokenCacheFaultTests):
    """What was offered is called loaded, whatever came."""

    cache_class = _AllIsWell


class _OffersMore(CacheEngine):
    def lookup(self, tokens: Any, **names: Any) -> Hit:
        hit = super().lookup(tokens, **names)
        if len(tokens) >= hit.tokens + CHUNK and "max_tokens" not in names:
            hit.tokens += CHUNK
            hit.by_tier["dram"] = hit.by_tier.get("dram", 0) + CHUNK
        return hit


@mutant(row=BEYOND + "a hit is reported that is none", project="any adapter that counts wrong")
class MutantOffersOneMore(BrokenCacheTests):
    """One chunk more is offered than there is."""

    cache_class = _OffersMore


class _BlindOptimist(CacheEngine):
    """Objects count as stored when the copy was tried."""

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
    """There was no memory to store it in, and it is offered."""

    cache_class = _BlindOptimist


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
    """A load that was given up writes the engine's memory when its read comes back."""

    cache_class = _WritesLate


@mutant(row="a dead or slow remote hangs the engine", project="LMCache #4123 #4676 #4759")
class MutantWaitsForEver(BrokenCacheFaultTests):
    """No deadline on anything that a tier is asked."""

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
    """A write that meets a full disk is never ended: its slots stay pinned."""

    cache_class = _LosesFull
    patience = 3.0
