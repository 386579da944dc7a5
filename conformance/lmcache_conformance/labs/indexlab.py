"""Fake ranks for tests of the index: data planes that copy *names* instead of bytes, and detect wrong ones.

A rank's arena holds, per slot, what was last written there: a `Content`. Reading a slot with other content than the op names is
an assertion error, and so is a plan that reuses a slot which an unfinished op of this rank may still access. Only the messages
are shared with the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from lmcache.plan import (
    ArenaSlot,
    Chain,
    Copy,
    Delete,
    Engine,
    Job,
    JobReport,
    Name,
    Op,
    Plan,
    Probe,
    Report,
    Status,
    Tier,
)

CHUNK = 4


class Content(NamedTuple):
    """Stands for the bytes of one object on one rank. `version`: how often its namespace was cleared before the store."""

    name: Name
    rank: int
    version: int


def chain(namespace: str, text: str) -> Chain:
    """Returns a chain with one chunk per letter. Equal texts have equal digests in all namespaces, as an engine's own keys do."""
    digests = [blake2b(text[: i + 1].encode(), digest_size=32).digest() for i in range(len(text))]
    return Chain(namespace.encode().ljust(32, b"."), digests)


def name_at(chain: Chain, group: int, i: int) -> Name:
    """Returns the name of the object of chunk `i`."""
    return Name(chain.namespace, chain.digests[i], group, CHUNK, i)


class RunningJob:
    """A job on one rank."""

    def __init__(self, job: Job, version: int) -> None:
        self.job = job
        self.statuses = [Status.PENDING] * len(job.ops)
        self.undone = list(range(len(job.ops)))
        self.hung: set[int] = set()
        self.version = version
        self.late = False

    def next_ops(self) -> list[int]:
        """Returns the ops that may run now: the first undone one of each slot."""
        seen: set[tuple[int, int]] = set()
        free = []
        for i in self.undone:
            key = slot_of(self.job.ops[i])
            if key is None or key not in seen:
                free.append(i)
            if key is not None:
                seen.add(key)
        return free


def slot_of(op: Op) -> tuple[int, int] | None:
    """Returns the (group, slot) that an op reads or writes, if any."""
    if isinstance(op, Copy):
        for place in (op.src, op.dst):
            if isinstance(place, ArenaSlot):
                return op.name.group, place.index
    return None


class Rank:
    """One rank's data plane."""

    def __init__(self, rank: int, tiers: int) -> None:
        self.rank = rank
        self.tiers: list[dict[Name, Content | None]] = [{} for _ in range(tiers)]  # None = corrupt
        self.epoch = 0
        self.die()

    def die(self) -> None:
        """Restarts the rank: everything but the tiers is lost, including running ops."""
        self.inbox: list[tuple[Plan, dict[int, int]]] = []  # (plan, job → version of what it stores)
        self.arena: dict[tuple[int, int], Content | None] = {}
        self.generations: dict[tuple[int, int], int] = {}  # newest assignment of each slot
        self.engine: dict[int, dict[tuple[int, int], Content]] = {}
        self.runs: dict[int, RunningJob] = {}
        self.ghosts: list[tuple[RunningJob, int]] = []  # hung ops of an epoch that is over
        self.reports: dict[int, JobReport] = {}
        self.first_sent: dict[int, int] = {}
        self.seq = 0

    # ------------------------------------------------------------ plans and reports

    def take(self) -> None:
        """Starts the next plan of the inbox."""
        plan, versions = self.inbox.pop(0)
        if plan.epoch != self.epoch:
            self.epoch = plan.epoch
            self.ghosts += [(run, i) for run in self.runs.values() for i in run.hung]
            self.runs, self.reports, self.first_sent, self.seq = {}, {}, {}, 0
        for done in [job for job, sent in self.first_sent.items() if sent <= plan.acked[self.rank]]:
            del self.first_sent[done], self.reports[done]
        for job in plan.jobs:
            fresh = set()
            for op in job.ops:
                if isinstance(op, Copy) and isinstance(op.dst, ArenaSlot):
                    key = slot_of(op)
                    users = [run.job.id for run in self.runs.values() if key in map(slot_of, run.job.ops)]
                    assert not users, (
                        f"job {job.id} reuses slot {key} while jobs {users} are not final on rank {self.rank}"
                    )
                    assert key is not None
                    assert key not in fresh, f"job {job.id} fills slot {key} twice"
                    fresh.add(key)
                    newest = self.generations.get(key, 0)
                    assert op.dst.generation > newest, f"slot {key} is reused, but its generation {newest} did not grow"
                    self.generations[key] = op.dst.generation
                elif isinstance(op, Copy) and isinstance(op.src, ArenaSlot):
                    newest = self.generations.get((op.name.group, op.src.index), 0)
                    assert op.src.generation == newest, (
                        f"job {job.id} reads generation {op.src.generation}, not {newest}"
                    )
            self.runs[job.id] = RunningJob(job, versions.get(job.id, 0))
            self._publish(self.runs[job.id])

    def report(self) -> Report:
        self.seq += 1
        for job in self.reports:
            self.first_sent.setdefault(job, self.seq)
        return Report(self.epoch, self.rank, self.seq, tuple(self.reports.values()))

    def _publish(self, run: RunningJob) -> None:
        if Status.PENDING in run.statuses or self.runs.get(run.job.id) is not run:
            return
        final = not run.undone
        self.reports[run.job.id] = JobReport(run.job.id, tuple(int(s) for s in run.statuses), final)
        self.first_sent.pop(run.job.id, None)
        if final:
            del self.runs[run.job.id]

    # ------------------------------------------------------------ execution

    def pending(self) -> list[tuple[RunningJob, int]]:
        """Returns the ops that can run now, hung ones included."""
        return [(run, i) for run in self.runs.values() for i in run.next_ops()] + self.ghosts

    def step(self, run: RunningJob, i: int, fault: Status | str | None = None) -> None:
        """Runs one op. `fault`: fail with that status, or "hang" (it continues at the next step)."""
        if (run, i) in self.ghosts:
            self.ghosts.remove((run, i))
            self._execute(run, i)
            return
        if fault == "hang":
            run.hung.add(i)
            return
        status = self._execute(run, i) if fault is None else self._fail(run, i, fault)
        run.hung.discard(i)
        run.undone.remove(i)
        if run.statuses[i] is Status.PENDING:
            run.statuses[i] = status
        self._publish(run)

    def expire(self, run: RunningJob) -> None:
        """Passes the job's deadline: what is not done is late, and may still access memory."""
        run.late = True
        run.statuses = [Status.LATE if s is Status.PENDING else s for s in run.statuses]
        run.hung.update(run.undone)
        self._publish(run)

    def _stale(self, key: tuple[int, int]) -> bool:
        return any(slot_of(run.job.ops[i]) == key for run, i in self.ghosts)

    def _fail(self, run: RunningJob, i: int, fault: Status | str) -> Status:
        op = run.job.ops[i]
        if isinstance(op, Copy) and isinstance(op.dst, ArenaSlot):
            self.arena[op.name.group, op.dst.index] = None  # half written
        assert isinstance(fault, Status)
        return fault

    def _execute(self, run: RunningJob, i: int) -> Status:
        op = run.job.ops[i]
        if isinstance(op, Probe):
            return Status.OK if op.name in self.tiers[op.tier] else Status.MISSING
        if isinstance(op, Delete):
            self.tiers[op.tier].pop(op.name, None)
            return Status.OK
        key = slot_of(op)
        if isinstance(op.dst, ArenaSlot) and key is not None and run.job.id in self.runs and self._stale(key):
            return Status.FULL
        content: Content | None
        if isinstance(op.src, Engine):
            content = Content(op.name, self.rank, run.version)
        elif isinstance(op.src, Tier):
            if op.name not in self.tiers[op.src.index]:
                return Status.MISSING
            content = self.tiers[op.src.index][op.name]
        else:
            assert key is not None
            content = self.arena.get(key)
            before = [j for j in range(i) if slot_of(run.job.ops[j]) == key]
            if any(run.statuses[j] is not Status.OK for j in before):
                return Status.SKIPPED
            current = run.job.id in self.runs
            if current:
                held = content and (content.name, content.rank)
                assert held == (op.name, self.rank), (
                    f"{run.job.kind} job {run.job.id}: {key} holds {held}, not {op.name}"
                )
        if content is None:
            if isinstance(op.dst, ArenaSlot) and key is not None:
                self.arena[key] = None
            return Status.CORRUPT
        if isinstance(op.dst, Engine):
            self.engine.setdefault(run.job.id, {})[op.name.group, op.start] = content
        elif isinstance(op.dst, ArenaSlot):
            assert key is not None
            self.arena[key] = content
        else:
            kept = self.tiers[op.dst.index].get(op.name)
            self.tiers[op.dst.index][op.name] = max(kept, content) if kept else content
        return Status.OK


def drain(ranks: Iterable[Rank]) -> Iterator[Report]:
    """Runs everything on all ranks without new faults; yields a report of each."""
    for rank in ranks:
        while rank.inbox:
            rank.take()
        while todo := rank.pending():
            rank.step(*todo[0])
        yield rank.report()
