"""Broken control planes: wrong about reports, leases, hits, or clears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from lmcache.control import Finished, Index, Lookup, Owner, Store
from lmcache.control.extents import Extent, ExtentPin, extents_of
from lmcache.plan import Chain, JobReport, Plan, Report, Status
from lmcache.spec import HitRule
from lmcache_conformance.labs.indexlab import CHUNK
from lmcache_conformance.mutants import mutant
from lmcache_conformance.suites.index import IndexTests
from lmcache_conformance.suites.index_machine import IndexMachineTests


class _Tests(IndexMachineTests, IndexTests):
    """Both suites on a broken `Index`: `IndexTests` first, then random histories."""

    index_class: type[Index] = Index

    def open_index(self, groups: Sequence[tuple[str, HitRule]], slots: Sequence[int], **settings: Any) -> Index:
        """Opens the broken index."""
        return self.index_class(groups, CHUNK, slots, **settings)


# ---------------------------------------------------------------- ranks and reports


class _OneRankCountsForAll(Index):
    def report(self, report: Report, now: float) -> list[Finished]:
        ended: list[Finished] = []
        for rank in range(self.state.jobs.ranks):
            seq = report.seq if rank == report.rank else self.state.jobs._acked[rank] + 1
            ended += super().report(msgspec.structs.replace(report, rank=rank, seq=seq), now)
        return ended


@mutant(row="one rank's store fails, the others serve the hit", project="readiness before all ranks acknowledged")
class MutantFirstRankSpeaksForAll(_Tests):
    """A report of one rank counts for all ranks."""

    index_class = _OneRankCountsForAll


def _amended(report: Report, matches: Callable[[JobReport], bool], change: Callable[[int], int]) -> Report:
    jobs = tuple(
        msgspec.structs.replace(job, statuses=tuple(map(change, job.statuses))) if matches(job) else job
        for job in report.jobs
    )
    return msgspec.structs.replace(report, jobs=jobs)


class _AssumesStoresSucceed(Index):
    """Treats every op of one kind of job as successful."""

    kind = "store"

    def report(self, report: Report, now: float) -> list[Finished]:
        live = self.state.jobs.live

        def mine(job: JobReport) -> bool:
            return job.job in live and live[job.job].kind == self.kind

        return super().report(_amended(report, mine, lambda status: int(Status.OK)), now)


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantFailedStoreIsReady(_Tests):
    """A store counts as successful once it is reported, however it ended."""

    index_class = _AssumesStoresSucceed


class _AssumesLoadsSucceed(_AssumesStoresSucceed):
    kind = "load"


@mutant(row="load fails but is reported as success", project="vLLM #52234, LMCache #3388")
class MutantFailedLoadIsSuccess(_Tests):
    """A load counts as successful once it is reported, however it ended."""

    index_class = _AssumesLoadsSucceed


class _ReadyAtOnce(Index):
    def begin_store(self, owner: Owner, chain: Chain, **settings: Any) -> Store:
        store = super().begin_store(owner, chain, **settings)
        if store.job is not None:
            for group, spans in self.state.jobs.live[store.job].inserted.items():
                self.state.pools[group].publish(spans)
        return store


@mutant(row="a store that failed stays visible", project="LMCache #4991")
class MutantVisibleBeforeItIsStored(_Tests):
    """An object is offered as soon as its store begins."""

    index_class = _ReadyAtOnce


class _AcksUnreceived(Index):
    def take_plan(self) -> Plan:
        plan = super().take_plan()
        return msgspec.structs.replace(plan, acked=tuple(1 << 40 for _ in plan.acked))


@mutant(
    row="a report is lost, doubled or late; a slot is reused under a reader", project="reports are not exactly-once"
)
class MutantAcknowledgesWhatItNeverSaw(_Tests):
    """Acknowledges reports that it never received, so that ranks drop them: a lost report is not repeated."""

    index_class = _AcksUnreceived


class _CountsTwice(Index):
    """A job that a rank reports again counts as reported by the other ranks."""

    def report(self, report: Report, now: float) -> list[Finished]:
        seen: set[tuple[int, int]] = self.__dict__.setdefault("_received", set())
        again = tuple(job for job in report.jobs if (report.rank, job.job) in seen)
        seen.update((report.rank, job.job) for job in report.jobs)
        ended = super().report(report, now)
        for rank in range(self.state.jobs.ranks):
            if again and rank != report.rank:
                other = Report(report.epoch, rank, self.state.jobs._acked[rank] + 1, again)
                ended += super().report(other, now)
        return ended


@mutant(
    row="a report is lost, doubled or late; a slot is reused under a reader", project="reports are not exactly-once"
)
class MutantDoubledReportCountsTwice(_Tests):
    """Counts reports instead of the ranks they come from."""

    index_class = _CountsTwice


class _LateIsFinal(Index):
    def report(self, report: Report, now: float) -> list[Finished]:
        jobs = tuple(msgspec.structs.replace(job, final=True) for job in report.jobs)
        return super().report(msgspec.structs.replace(report, jobs=jobs), now)


@mutant(row="slot evicted or reused while a slow read is in flight", project="Mooncake #850")
class MutantLateIsOver(_Tests):
    """A load past its deadline counts as final: its slots are freed, though a read may still fill them."""

    index_class = _LateIsFinal


class _AnyEpoch(Index):
    def report(self, report: Report, now: float) -> list[Finished]:
        for extent in self.__dict__.pop("_lost", []):
            pool = self.state.pools[0]
            fresh = pool.insert(Chain(extent.space.namespace, extent.digests), 0, len(extent.digests))
            pool.publish(fresh)
            pool.unpin(fresh)
        return super().report(report, now)

    def reset(self, now: float) -> list[Finished]:
        fills = [spans for work in self.state.jobs.live.values() for spans in work.inserted.values()]
        lost = [extent for spans in fills for extent in extents_of(spans)]
        ended = super().reset(now)
        self.__dict__["_lost"] = lost
        return ended


@mutant(
    row="a report is lost, doubled or late; a slot is reused under a reader", project="reports are not exactly-once"
)
class MutantBelievesTheDead(_Tests):
    """A report from before a reset makes visible what the dead rank had stored."""

    index_class = _AnyEpoch


# ---------------------------------------------------------------- owners, leases, pins


class _ForgetsFailedLoads(Index):
    def lookup(self, owner: Owner, chain: Chain, max_tokens: int, now: float, *, near: int | None = None) -> Lookup:
        self.state.failed.discard(owner)
        return super().lookup(owner, chain, max_tokens, now, near=near)


@mutant(row="a failed load is offered again and again", project="the scheduler asks anew after a failure")
class MutantOffersAgain(_Tests):
    """Forgets which request's load has failed."""

    index_class = _ForgetsFailedLoads


class _KeepsPins(Index):
    def release(self, owner: Owner) -> None:
        self.leases.pop(owner, None)


@mutant(row="pins leak until nothing can be stored", project="LMCache #1034 #1285 #3187")
class MutantPinsLeak(_Tests):
    """A released lease keeps its pins."""

    index_class = _KeepsPins


class _PinsNothing(Index):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for pool in self.state.pools:
            unpin = pool.unpin

            def pin(extents: Sequence[Extent]) -> list[ExtentPin]:
                return [(extent, len(extent.digests)) for extent in extents]

            def release(pins: Iterable[ExtentPin], unpin: Any = unpin) -> None:
                unpin([(extent, len(extent.digests)) for extent in extents_of(pins) if extent.refs > 0])

            pool.pin = pin  # type: ignore[method-assign]
            pool.unpin = release  # type: ignore[method-assign]


@mutant(row="slot evicted or reused while a slow read is in flight", project="Mooncake #850")
class MutantReadersPinNothing(_Tests):
    """Slots are reused while they are read."""

    index_class = _PinsNothing


class _RaisesWhenFull(Index):
    def begin_store(self, owner: Owner, chain: Chain, **settings: Any) -> Store:
        if any(pool.unused < len(chain.digests) for pool in self.state.pools):
            raise MemoryError("no slot is free")
        return super().begin_store(owner, chain, **settings)


@mutant(row="a full RAM tier crashes the engine", project="LMCache #1330")
class MutantFullRaises(_Tests):
    """Raises where it should evict."""

    index_class = _RaisesWhenFull


# ---------------------------------------------------------------- hits


class _FromTheEnd(Index):
    def lookup(self, owner: Owner, chain: Chain, max_tokens: int, now: float, *, near: int | None = None) -> Lookup:
        for skip in range(len(chain.digests)):
            tail = chain._replace(digests=chain.digests[skip:])
            found = super().lookup(owner, tail, max_tokens, now, near=near)
            if found.tokens:
                return found
        return super().lookup(owner, chain, max_tokens, now, near=near)


@mutant(row="blocks taken from the wrong end (suffix for prefix)", project="dynamo #8419")
class MutantSuffixForPrefix(_Tests):
    """Offers what matches the end of a prompt for its beginning."""

    index_class = _FromTheEnd


class _FirstGroupDecides(Index):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.state.rules[1:] = [HitRule("trailing", 1)] * (len(self.state.rules) - 1)


@mutant(
    row="side state (sliding window, Mamba, sparse index) not restored with the hit",
    project="SGLang #38031, LMCache #4247",
)
class MutantSideStateIsOptional(_Tests):
    """Requires only the last chunk of every group but the first."""

    index_class = _FirstGroupDecides


class _StoresPlaceholders(Index):
    def begin_store(self, owner: Owner, chain: Chain, **settings: Any) -> Store:
        settings["resident"] = None
        return super().begin_store(owner, chain, **settings)


@mutant(row="garbage stored for, or loaded into, block 0", project="vLLM null block")
class MutantStoresPlaceholders(_Tests):
    """Stores chunks that are not resident in engine memory."""

    index_class = _StoresPlaceholders


# ---------------------------------------------------------------- reset


class _ClearsDram(Index):
    def clear(self, namespace: bytes | None, now: float) -> int:
        kept = self.state.directories
        self.state.directories = []
        try:
            return super().clear(namespace, now)
        finally:
            self.state.directories = kept


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantClearsDramOnly(_Tests):
    """Keeps the directories of the tiers in a clear."""

    index_class = _ClearsDram


class _ClearForgetsJobs(Index):
    def clear(self, namespace: bytes | None, now: float) -> int:
        work = [w for w in self.state.jobs.live.values() if not w.cleared]
        dropped = super().clear(namespace, now)
        for mine in work:
            mine.cleared = False
        return dropped


@mutant(row="clear returns OK while a tier still serves", project="vLLM #57727")
class MutantWriteBehindOutlivesClear(_Tests):
    """A write-back that runs during a clear is not deleted afterwards, and served."""

    index_class = _ClearForgetsJobs
