"""A driver for the tests of the index: an index, and ranks that answer as the test says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache.control import Finished, Index, TierInfo
from lmcache.plan import Chain, Copy, Job, JobReport, Plan, Report, Status
from lmcache.spec import ALL, HitRule
from lmcache_conformance.labs.indexlab import CHUNK, chain, name_at

ABCD = chain("one", "abcd")
DISK, REDIS = TierInfo("disk"), TierInfo("redis", shared=True)
OK, MISSING, CORRUPT, FAILED, LATE, SKIPPED = (
    Status.OK,
    Status.MISSING,
    Status.CORRUPT,
    Status.FAILED,
    Status.LATE,
    Status.SKIPPED,
)


class Lab:
    """An index and the answers of its ranks."""

    def __init__(
        self, slots: int | Sequence[int] = 8, groups: Sequence[tuple[str, HitRule]] = (("full", ALL),), **more: Any
    ):
        counts = [slots] * len(groups) if isinstance(slots, int) else slots
        self.index = Index(groups, CHUNK, counts, **more)
        self.ranks = more.get("ranks", 1)
        self.seq = 0
        self.now = 0.0

    def plan(self) -> Plan:
        self.index.check()
        return self.index.take_plan()

    def jobs(self, kind: str | None = None) -> list[Job]:
        return [job for job in self.plan().jobs if kind in (None, job.kind)]

    def answer(self, job: Job, *statuses: Status, rank: int = 0, final: bool = True, epoch: int = 0) -> list[Finished]:
        """Report one job of one rank; a single status stands for all its ops."""
        told = statuses * len(job.ops) if len(statuses) == 1 else statuses
        self.seq += 1
        report = Report(epoch, rank, self.seq, (JobReport(job.id, tuple(int(s) for s in told), final),))
        ended = self.index.report(report, self.now)
        self.index.check()
        return ended

    def settle(self) -> list[Finished]:
        """Everything that is planned succeeds on every rank, until nothing is left."""
        ended = []
        while jobs := self.jobs():
            for job in jobs:
                for rank in range(self.ranks):
                    ended += self.answer(job, OK, rank=rank)
        return ended

    def store(self, about: Chain = ABCD, first: int = 0, last: int | None = None, **more: Any) -> Job:
        """Begin to store, and return the job that goes out."""
        stored = self.index.begin_store(
            "store", about, first=first, last=len(about.digests) if last is None else last, now=self.now, **more
        )
        [job] = self.jobs("store")
        assert job.id == stored.job
        return job

    def have(self, about: Chain = ABCD, **more: Any) -> None:
        """Store, and let everything that follows succeed."""
        self.index.begin_store("store", about, first=0, last=len(about.digests), now=self.now, **more)
        self.settle()

    def on_tier(self, about: Chain = ABCD, tier: int = 0, groups: Sequence[int] = (0,)) -> None:
        names = [name_at(about, g, i) for g in groups for i in range(len(about.digests))]
        for rank in range(self.ranks):
            self.index.announce(tier, rank, names, True, self.now)

    def look(self, about: Chain = ABCD, owner: str = "me", tokens: int | None = None) -> tuple[str, int, str]:
        """Look up all full chunks (or `tokens` tokens) of a chain."""
        limit = len(about.digests) * CHUNK if tokens is None else tokens
        found = self.index.lookup(owner, about, limit, self.now)
        self.index.check()
        return found.status, found.tokens, found.stop

    def load(self, owner: str = "me", **more: Any) -> Job:
        job = self.index.begin_load(owner, self.now, **more)
        [found] = self.jobs("load")
        assert found.id == job
        return found


def places(job: Job) -> list[tuple[str, str, int]]:
    return [(type(op.src).__name__, type(op.dst).__name__, op.start) for op in job.ops if isinstance(op, Copy)]
