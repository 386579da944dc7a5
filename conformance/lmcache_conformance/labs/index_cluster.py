"""Drives an index and its fake ranks (`indexlab.Rank`) in tests, with a clock that only the test advances.

There are two ways to run jobs. `settle`, `execute` and `report` run whatever is planned, with injected faults. In tests of one
job, `store_job` and `load_job` return the job that the index plans, and `complete` ends it with given statuses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcache.control import Finished, Index, Store, TierInfo
from lmcache.plan import Chain, Copy, Job, Plan, Status
from lmcache.spec import ALL, HitRule
from lmcache_conformance.labs.indexlab import CHUNK, Content, Rank, chain, name_at

ABCD = chain("one", "abcd")
FULL = (("full", ALL),)
DISK, REDIS = TierInfo("disk"), TierInfo("redis", shared=True)
OK, FAILED, MISSING, CORRUPT = Status.OK, Status.FAILED, Status.MISSING, Status.CORRUPT
LATE, SKIPPED = Status.LATE, Status.SKIPPED

Fault = Callable[[int, Any], "Status | str | None"]
"""(rank, op) → how it fails: a status, "hang", or None."""


class Cluster:
    """An index and its ranks.

    Args:
        index: the index under test.
        ranks, tiers: how many of each it was opened with.
        audit: calls the index's own `check` at every step.

    Attributes:
        now: time, in seconds; tests set it, or call `later`.
        ended: all that the index has reported as ended.
    """

    def __init__(self, index: Index, *, ranks: int = 1, tiers: int = 0, audit: bool = False) -> None:
        self.index = index
        self.audit = audit
        self.ranks = [Rank(rank, tiers) for rank in range(ranks)]
        self.now = 0.0
        self.ended: list[Finished] = []

    # ------------------------------------------------------------ what ranks do

    def plan(self) -> Plan:
        """Takes the next plan, hands it to every rank, and returns it."""
        self._check()
        plan = self.index.take_plan()
        for rank in self.ranks:
            rank.inbox.append((plan, {}))
            rank.take()
        return plan

    def jobs(self, kind: str | None = None) -> list[Job]:
        """Takes the next plan; returns its jobs, of one kind if given."""
        return [job for job in self.plan().jobs if kind in (None, job.kind)]

    def execute(self, rank: int, fault: Fault = lambda rank, op: None) -> None:
        """Runs all that one rank can run; what hangs is left."""
        mine = self.ranks[rank]
        hung: set[tuple[int, int]] = set()
        while todo := [(run, i) for run, i in mine.pending() if (id(run), i) not in hung]:
            run, i = todo[0]
            how = fault(rank, run.job.ops[i])
            mine.step(run, i, how)
            if how == "hang":
                hung.add((id(run), i))

    def report(self, rank: int) -> list[Finished]:
        """Delivers a report of one rank; returns what has ended by it."""
        ended = self.index.report(self.ranks[rank].report(), self.now)
        self._check()
        self.ended += ended
        return ended

    def settle(self, fault: Fault = lambda rank, op: None, rounds: int = 4) -> None:
        """Plans, runs and reports everything on all ranks, with these faults."""
        for _ in range(rounds):
            self.plan()
            for rank in range(len(self.ranks)):
                self.execute(rank, fault)
                self.report(rank)

    def complete(self, job: Job, *statuses: Status, rank: int = 0, final: bool = True) -> list[Finished]:
        """Ends the ops of one job on one rank with these statuses, and reports it.

        Args:
            job: a job that was planned.
            statuses: per op; a single one stands for all. Ops that end with OK are executed by the rank.
            rank: the rank.
            final: False: ops that are LATE have passed their deadline, and may still access memory.

        Returns:
            What has ended by it.
        """
        mine = self.ranks[rank]
        if (run := mine.runs.get(job.id)) is not None:
            wanted = statuses * len(job.ops) if len(statuses) == 1 else statuses
            for i, status in enumerate(wanted):
                if i in run.undone and (final or status is not Status.LATE):
                    mine.step(run, i, None if status is Status.OK else status)
            if not final:
                mine.expire(run)
            assert mine.reports[job.id].statuses == tuple(int(s) for s in wanted), (
                "the rank could not end the ops like this"
            )
        return self.report(rank)

    def hold(
        self, about: Chain = ABCD, tier: int = 0, *, at: Sequence[int] | None = None, announce: bool = True
    ) -> None:
        """Puts objects of group 0 (`at`: which chunks; None: all) into a tier of every rank, and announces them to the index."""
        names = [name_at(about, 0, i) for i in (range(len(about.digests)) if at is None else at)]
        for rank in self.ranks:
            rank.tiers[tier].update({name: Content(name, rank.rank, 0) for name in names})
            if announce:
                self.index.announce(tier, rank.rank, names, True, self.now)

    def later(self, seconds: float) -> list[Finished]:
        """Lets time pass; returns what has ended by it."""
        self.now += seconds
        ended = self.index.tick(self.now)
        self.ended += ended
        return ended

    # ------------------------------------------------------------ what an engine does

    def store(
        self,
        about: Chain = ABCD,
        owner: object = "writer",
        *,
        first: int = 0,
        last: int | None = None,
        resident: Sequence[Sequence[bool]] | None = None,
    ) -> Store:
        """Begins to store chunks [first, last) of a chain, by default all."""
        last = len(about.digests) if last is None else last
        try:
            return self.index.begin_store(owner, about, first=first, last=last, now=self.now, resident=resident)
        except Exception as error:
            raise AssertionError(f"a store that cannot be done is skipped, but it raised {error!r}") from error

    def store_job(self, about: Chain = ABCD, **more: Any) -> Job:
        """Begins to store; returns the job as it is planned."""
        stored = self.store(about, **more)
        [job] = self.jobs("store")
        assert job.id == stored.job
        return job

    def have(self, about: Chain = ABCD, **more: Any) -> None:
        """Stores a chain, and lets everything that follows succeed."""
        self.store(about, **more)
        self.settle()

    def lookup(self, about: Chain = ABCD, owner: object = "reader", tokens: int | None = None) -> tuple[str, int, str]:
        """Looks up all full chunks, or `tokens` tokens; returns status, tokens and why the hit ends there."""
        found = self.index.lookup(owner, about, len(about.digests) * CHUNK if tokens is None else tokens, self.now)
        self._check()
        return found.status, found.tokens, found.stop

    def offered(self, about: Chain = ABCD, owner: object = "reader", tokens: int | None = None) -> int:
        """Looks up where no tier is shared, so that the answer is immediate; returns the tokens of the hit."""
        status, found, _ = self.lookup(about, owner, tokens)
        assert status != "pending", "no tier here is shared, so there is nothing to wait for"
        return found

    def load(self, owner: object = "reader", **more: Any) -> int | None:
        """Begins to load what a lookup has found; returns the job's id."""
        return self.index.begin_load(owner, self.now, **more)

    def load_job(self, owner: object = "reader", **more: Any) -> Job:
        """Begins to load; returns the job as it is planned."""
        id = self.load(owner, **more)
        [job] = self.jobs("load")
        assert job.id == id
        return job

    def outcome(self, job: int | None) -> Finished:
        """Returns how a job ended."""
        ended = [end for end in self.ended if end.job == job]
        assert ended, f"job {job} never ended"
        return ended[-1]

    def quiet(self) -> None:
        """Lets everything run, and asserts that nothing is held: the state a cache must return to."""
        self.settle()
        stats = self.index.stats()
        held = {name: stats[name] for name in ("jobs", "leases", "slots_leaving") if stats[name]}
        assert not held, f"with all requests over, there are still {held}"

    def _check(self) -> None:
        if self.audit:
            self.index.check()


def open_cluster(
    slots: int | Sequence[int] = 8,
    groups: Sequence[tuple[str, HitRule]] = FULL,
    *,
    ranks: int = 1,
    tiers: Sequence[TierInfo] = (),
    **settings: Any,
) -> Cluster:
    """Opens an `Index` of `slots` slots (per group, or in each) with its ranks, audited at every step."""
    counts = [slots] * len(groups) if isinstance(slots, int) else slots
    index = Index(groups, CHUNK, counts, ranks=ranks, tiers=tiers, **settings)
    return Cluster(index, ranks=ranks, tiers=len(tiers), audit=True)


def places(job: Job) -> list[tuple[str, str, int]]:
    """Returns (kind of source, kind of destination, first token) of each copy of a job."""
    return [(type(op.src).__name__, type(op.dst).__name__, op.start) for op in job.ops if isinstance(op, Copy)]
