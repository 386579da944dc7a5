"""Jobs under way: the plans that carry them and the reports that end them.

Reports may be lost, duplicated, late or reordered. They are cumulative: a rank's newest report repeats everything in its
older ones that no plan has acknowledged. So older reports are ignored, as are reports of another epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lmcache.control.extents import ExtentPin
from lmcache.control.outcomes import Owner
from lmcache.control.slot_pool import SlotPool
from lmcache.plan import Job, JobKind, JobReport, Op, Plan, Report, Status


class LoadTarget:
    """What a load brings into the engine: chunks [0, `chunks`) but for the first `skip` tokens, which are there already.

    `targets`: (index of the op, group, position in the chain) of each copy into the engine.
    """

    __slots__ = ("chunks", "skip", "targets")

    def __init__(self, chunks: int, skip: int, targets: Sequence[tuple[int, int, int]]) -> None:
        self.chunks = chunks
        self.skip = skip
        self.targets = targets


class TrackedJob:
    """A job and everything it pins until it is final on every rank."""

    __slots__ = (
        "cleared",
        "concluded",
        "final_ranks",
        "id",
        "inserted",
        "kind",
        "namespace",
        "ok_tokens",
        "ops",
        "owner",
        "pins",
        "reported_ranks",
        "results",
        "returned_final",
        "target",
        "until",
    )

    def __init__(self, kind: JobKind, owner: Owner | None, namespace: bytes) -> None:
        self.id = 0
        self.kind = kind
        self.owner = owner
        self.namespace = namespace
        self.ops: list[Op] = []
        self.results: list[Status] = []  # per op: the first status on any rank that was not OK, else OK
        self.reported_ranks = 0  # bit mask
        self.final_ranks = 0  # bit mask
        self.until = math.inf  # when a rank that has not reported counts as late
        self.pins: list[tuple[SlotPool, list[ExtentPin]]] = []
        # Group → the extents that the job copies into, parents first; they are in `pins` too.
        self.inserted: dict[int, list[ExtentPin]] = {}
        self.target: LoadTarget | None = None
        self.ok_tokens = 0
        self.cleared = False  # its namespace was cleared meanwhile: what it stored or wrote must not become visible
        self.concluded = False  # every rank has reported
        self.returned_final = False  # returned to the caller as `Finished` with `final=True`


class JobTable:
    """All jobs of this epoch. Ids are never reused, in any epoch."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.everyone = (1 << ranks) - 1  # the bit mask of all ranks
        self.epoch = 0
        self.live: dict[int, TrackedJob] = {}
        self._acked = [0] * ranks
        self._outgoing: list[Job] = []
        self._last_id = 0

    def start(self, job: TrackedJob, deadline: float = 0.0) -> int:
        """Queues the job for the next plan; returns its id. `deadline`: time limit on the ranks in seconds, 0 = none."""
        self._last_id += 1
        job.id = self._last_id
        job.results = [Status.OK] * len(job.ops)
        self.live[job.id] = job
        self._outgoing.append(Job(job.id, job.kind, tuple(job.ops), deadline))
        return job.id

    def withdraw(self, job: TrackedJob) -> bool:
        """Withdraws a job that no plan has carried yet; False if one has."""
        kept = [queued for queued in self._outgoing if queued.id != job.id]
        if len(kept) == len(self._outgoing):
            return False
        self._outgoing = kept
        del self.live[job.id]
        return True

    def take_plan(self) -> Plan:
        """Returns the jobs queued since the last call, and acknowledges reports."""
        jobs, self._outgoing = tuple(self._outgoing), []
        return Plan(self.epoch, jobs, tuple(self._acked))

    def updates(self, report: Report) -> Iterator[tuple[TrackedJob, JobReport]]:
        """Yields the reports on live jobs, unless the report is stale; it counts as applied."""
        if report.epoch != self.epoch or not 0 <= report.rank < self.ranks or report.seq <= self._acked[report.rank]:
            return
        self._acked[report.rank] = report.seq
        for update in report.jobs:
            job = self.live.get(update.job)
            if job is not None:
                yield job, update

    def reset(self) -> list[TrackedJob]:
        """Starts an epoch without jobs; returns the old ones."""
        void = list(self.live.values())
        self.epoch += 1
        self.live = {}
        self._outgoing = []
        self._acked = [0] * self.ranks
        return void
