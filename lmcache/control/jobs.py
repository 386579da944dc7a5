"""Jobs under way, the plan that goes out and the reports that come back.

Reports may be lost, doubled, late or out of order. They are cumulative, so the newest one of a rank says all that older
ones said and no plan has acknowledged; older ones are ignored, as is everything of another epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lmcache.control.extents import ExtentPin
from lmcache.control.outcomes import Owner
from lmcache.control.slot_pool import SlotPool
from lmcache.plan import Job, JobKind, JobReport, Op, Plan, Report, Status


class LoadTarget:
    """What a load is for: chunks [first, chunks) beyond `skip` tokens; `targets[i]` = (op, group, position)."""

    __slots__ = ("chunks", "skip", "targets")

    def __init__(self, chunks: int, skip: int, targets: Sequence[tuple[int, int, int]]) -> None:
        self.chunks = chunks
        self.skip = skip
        self.targets = targets


class TrackedJob:
    """One job and everything it holds on to until every rank called it final."""

    __slots__ = (
        "cleared",
        "final",
        "id",
        "inserted",
        "kind",
        "namespace",
        "ok_tokens",
        "ops",
        "owner",
        "pins",
        "reported",
        "results",
        "told",
        "told_final",
        "until",
        "wanted",
    )

    def __init__(self, kind: JobKind, owner: Owner | None, namespace: bytes) -> None:
        self.id = 0
        self.kind = kind
        self.owner = owner
        self.namespace = namespace
        self.ops: list[Op] = []
        self.results: list[Status] = []  # per op: the first status on any rank that was not OK, else OK
        self.reported = 0  # bit mask of ranks
        self.final = 0  # bit mask of ranks
        self.until = math.inf  # when a rank that has said nothing counts as late
        self.pins: list[tuple[SlotPool, list[ExtentPin]]] = []
        self.inserted: dict[
            int, list[ExtentPin]
        ] = {}  # group → what it copies into slots, parents first; `pins` has it too
        self.wanted: LoadTarget | None = None
        self.ok_tokens = 0
        self.cleared = False  # its namespace was cleared meanwhile: nothing it did may become known
        self.told = False
        self.told_final = False


class JobTable:
    """All jobs of this epoch. Ids are never used twice, in any epoch."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.everyone = (1 << ranks) - 1
        self.epoch = 0
        self.live: dict[int, TrackedJob] = {}
        self._acked = [0] * ranks
        self._outgoing: list[Job] = []
        self._last_id = 0

    def start(self, work: TrackedJob, deadline: float = 0.0) -> int:
        """Queue the job for the next plan. `deadline`: seconds the data plane has, 0 = no limit."""
        self._last_id += 1
        work.id = self._last_id
        work.results = [Status.OK] * len(work.ops)
        self.live[work.id] = work
        self._outgoing.append(Job(work.id, work.kind, tuple(work.ops), deadline))
        return work.id

    def withdraw(self, work: TrackedJob) -> bool:
        """Take back a job that no plan has carried yet; False if one has."""
        kept = [job for job in self._outgoing if job.id != work.id]
        if len(kept) == len(self._outgoing):
            return False
        self._outgoing = kept
        del self.live[work.id]
        return True

    def take_plan(self) -> Plan:
        """What has accumulated since the last call."""
        jobs, self._outgoing = tuple(self._outgoing), []
        return Plan(self.epoch, jobs, tuple(self._acked))

    def news(self, report: Report) -> Iterator[tuple[TrackedJob, JobReport]]:
        """The job reports in it that may be news; the report counts as applied."""
        if report.epoch != self.epoch or not 0 <= report.rank < self.ranks or report.seq <= self._acked[report.rank]:
            return
        self._acked[report.rank] = report.seq
        for job in report.jobs:
            work = self.live.get(job.job)
            if work is not None:
                yield work, job

    def reset(self) -> list[TrackedJob]:
        """A new epoch without jobs; returns the old ones."""
        void = list(self.live.values())
        self.epoch += 1
        self.live = {}
        self._outgoing = []
        self._acked = [0] * self.ranks
        return void
