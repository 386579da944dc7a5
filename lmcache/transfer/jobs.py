"""State of a transfer's jobs and arena slots, and the reports that the index has not acknowledged yet.

Two guards make stale plans harmless. Each slot is tagged with the name and generation of its object, and an op reads a slot only
if the tag matches exactly. And an op past its deadline cannot *begin* to write engine memory: the check, and the mark that it is
writing, are one step under one lock.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from lmcache.keys import Name
from lmcache.layout import BoundKV, ObjectLayout
from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import ArenaSlot, Copy, Job, JobReport, Op, Plan, Report, Status
from lmcache.transfer.workers import Workers

_ENDED = 65_536
"""Acknowledged jobs remembered at most."""

SlotKey = tuple[int, int]
"""(group, slot index)"""


_WARNED = frozenset({Status.CORRUPT, Status.FAILED, Status.FULL, Status.LATE})
"""Statuses that are counted and logged; a missing object or a cancelled op is normal operation."""


class EngineView(NamedTuple):
    """The engine memory that a job copies from or to.

    Attributes:
        kv: the live tensors.
        slots: group → int64 `(tokens,)`, one slot per token of the request; −1 = not resident, never read or written.
    """

    kv: BoundKV
    slots: Mapping[int, torch.Tensor]


class ActiveJob:
    """A job in progress. Only `JobTracker` changes it, except for `after`."""

    __slots__ = (
        "after",
        "begun",
        "deadline",
        "detail",
        "epoch",
        "job",
        "late",
        "moving",
        "nbytes",
        "statuses",
        "unfinished",
        "view",
    )

    def __init__(self, job: Job, view: EngineView | None, epoch: int, now: float) -> None:
        self.job = job
        self.view = view
        self.after: object = None  # point of the engine's stream after which it may write pages
        self.begun = now
        self.epoch = epoch
        self.deadline = now + job.deadline if job.deadline else None
        self.statuses = [Status.PENDING] * len(job.ops)
        self.unfinished = set(range(len(job.ops)))  # ops that may still touch memory
        self.moving = 0  # ops that are writing engine memory now
        self.late = False  # no op may begin to write engine memory
        self.nbytes = 0
        self.detail = ""

    def copy(self, index: int) -> Copy:
        """Returns op `index`, which must be a copy."""
        op = self.job.ops[index]
        assert isinstance(op, Copy)
        return op


class Tag(NamedTuple):
    """What an arena slot holds.

    Attributes:
        name, generation: the object, and the slot's generation that it was assigned.
        layout: layout of its bytes.
        checksum: `lmcache.format.codec.checksum` of its bytes when they were put into the slot; None if it was not made.
        begun: a `time.monotonic()` before its bytes were gathered or loaded; None: unknown.
    """

    name: Name
    generation: int
    layout: ObjectLayout
    checksum: bytes | None = None
    begun: float | None = None


class JobTracker:
    """Tracks one rank's jobs and slot contents. Thread-safe.

    Attributes:
        news: grows whenever a job report is added or changes; read without the lock.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._epoch = 0
        self._seq = 0
        self._running: dict[int, ActiveJob] = {}
        self._reports: dict[int, JobReport] = {}
        self._first_sent: dict[int, int] = {}
        self._ended: OrderedDict[int, None] = OrderedDict()  # acknowledged jobs: a plan may be delivered again
        self._tags: dict[SlotKey, Tag] = {}
        self._stale: Counter[SlotKey] = Counter()  # slot → ops from before a reset that still use it
        self.news = 0

    # ---------------------------------------------------------------- plans and reports

    def begin(self, plan: Plan, views: Mapping[int, EngineView]) -> list[ActiveJob]:
        """Registers and returns the new jobs of `plan`; a plan may be delivered twice. A new epoch voids everything older."""
        now = time.monotonic()
        started = []
        with self._lock:
            if plan.epoch != self._epoch:
                self._reset(plan.epoch)
            if self._rank < len(plan.acked):
                self._acknowledge(plan.acked[self._rank])
            for job in plan.jobs:
                if not any(job.id in known for known in (self._running, self._reports, self._ended)):
                    self._running[job.id] = active = ActiveJob(job, views.get(job.id), self._epoch, now)
                    started.append(active)
        return started

    def report(self) -> Report:
        """Applies deadlines, and returns all job reports that the index has not acknowledged."""
        with self._lock:
            self._expire(time.monotonic())
            self._seq += 1
            for job in self._reports:
                self._first_sent.setdefault(job, self._seq)
            return Report(self._epoch, self._rank, self._seq, tuple(self._reports.values()))

    def finish(
        self, active: ActiveJob, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = ""
    ) -> None:
        """Records how ops ended. The caller guarantees that they touch no memory any more."""
        with self._lock:
            for index in indices:
                active.unfinished.discard(index)
                if active.statuses[index] is Status.PENDING:  # otherwise it was reported as late
                    active.statuses[index] = status
                if active.epoch != self._epoch and (key := slot_of(active.job.ops[index])) is not None:
                    self._stale[key] -= 1
            active.nbytes += nbytes
            if status is not Status.OK:
                active.detail = active.detail or detail
            if indices and not active.unfinished:
                self._publish(active)

    def wait(self, seen: int, timeout: float) -> None:
        """Blocks until `news` differs from `seen`, a deadline passes, or `timeout` seconds have passed."""
        with self._lock:
            if self.news != seen:
                return
            deadlines = [r.deadline for r in self._running.values() if r.deadline is not None and not r.late]
            if deadlines:
                timeout = min(timeout, max(0.0, min(deadlines) - time.monotonic()) + 0.001)
            self._changed.wait(timeout)
            self._expire(time.monotonic())

    def running(self, kind: str | None = None) -> int:
        """Returns the number of jobs (of one kind) in progress."""
        with self._lock:
            return sum(1 for active in self._running.values() if kind is None or active.job.kind == kind)

    # ---------------------------------------------------------------- engine memory

    def begin_engine_write(self, active: ActiveJob) -> bool:
        """Marks the job as writing until `end_engine_write`. Returns False if it is late or fenced: it must not write."""
        with self._lock:
            if active.late or (active.deadline is not None and time.monotonic() >= active.deadline):
                return False
            active.moving += 1
            return True

    def end_engine_write(self, active: ActiveJob) -> None:
        """Ends what `begin_engine_write` began."""
        with self._lock:
            active.moving -= 1
            if active.moving == 0:
                self._changed.notify_all()

    def fence(self, jobs: Sequence[int], timeout: float | None) -> bool:
        """Forbids new writes of `jobs` to engine memory and waits for the current ones; False after `timeout` seconds."""
        with self._lock:
            started = [self._running[job] for job in jobs if job in self._running]
            for active in started:
                active.late = True
            return self._changed.wait_for(lambda: all(active.moving == 0 for active in started), timeout)

    # ---------------------------------------------------------------- slot contents

    def claim(self, group: int, slot: int) -> None:
        """Removes the slot's tag, so that its memory may be written.

        Raises:
            MemoryError: a call from before the last reset still reads or writes the slot.
        """
        with self._lock:
            self._tags.pop((group, slot), None)
            if self._stale[group, slot] > 0:
                raise MemoryError(f"slot {slot} of group {group} is still used by a call from before the last reset")

    def tag(
        self,
        active: ActiveJob,
        indices: Sequence[int],
        layout: ObjectLayout,
        checksums: Iterable[bytes | None] = itertools.repeat(None),
    ) -> None:
        """Tags the destination slots of these ops with their objects, which are in `layout`; one checksum per op."""
        with self._lock:
            if active.epoch != self._epoch:
                return
            for copy, checksum in zip(map(active.copy, indices), checksums, strict=False):
                assert isinstance(copy.dst, ArenaSlot)
                tag = Tag(copy.name, copy.dst.generation, layout, checksum, active.begun)
                self._tags[copy.name.group, copy.dst.index] = tag

    def tags(self, active: ActiveJob, indices: Sequence[int]) -> list[Tag | None]:
        """Returns for each op the tag of its source slot; None if the slot does not hold exactly the op's object."""
        with self._lock:
            found: list[Tag | None] = []
            for copy in map(active.copy, indices):
                assert isinstance(copy.src, ArenaSlot)
                tag = self._tags.get((copy.name.group, copy.src.index))
                exact = tag is not None and tag.name == copy.name and tag.generation == copy.src.generation
                found.append(tag if exact and active.epoch == self._epoch else None)
            return found

    # ---------------------------------------------------------------- lock held

    def _reset(self, epoch: int) -> None:
        self._epoch = epoch
        self._seq = 0
        for active in self._running.values():
            active.late = True
            self._stale.update(key for i in active.unfinished if (key := slot_of(active.job.ops[i])) is not None)
        self._running = {}
        self._reports = {}
        self._first_sent = {}
        self._tags = {}

    def _acknowledge(self, seq: int) -> None:
        for job in [job for job, sent in self._first_sent.items() if sent <= seq]:
            del self._first_sent[job]
            del self._reports[job]
            self._ended[job] = None
        while len(self._ended) > _ENDED:
            self._ended.popitem(last=False)

    def _expire(self, now: float) -> None:
        for active in list(self._running.values()):
            if active.deadline is None or active.late or now < active.deadline or active.moving:
                continue
            active.late = True
            active.statuses = [Status.LATE if s is Status.PENDING else s for s in active.statuses]
            self._publish(active)

    def _publish(self, active: ActiveJob) -> None:
        if self._running.get(active.job.id) is not active:  # from an earlier epoch
            return
        final = not active.unfinished
        statuses = tuple(int(status) for status in active.statuses)
        self._reports[active.job.id] = JobReport(active.job.id, statuses, final, active.nbytes, active.detail)
        self._first_sent.pop(active.job.id, None)
        if final:
            del self._running[active.job.id]
        self.news += 1
        self._changed.notify_all()


def slot_of(op: Op) -> SlotKey | None:
    """Returns the arena slot that an op reads or writes, if any."""
    if isinstance(op, Copy):
        for place in (op.src, op.dst):
            if isinstance(place, ArenaSlot):
                return op.name.group, place.index
    return None


class JobRunner:
    """Runs tasks that execute ops of a job. Thread-safe.

    Args:
        tracker: where the ops' statuses are recorded.
        metrics, log: where failures are counted and logged.
    """

    def __init__(self, tracker: JobTracker, metrics: Metrics, log: Throttle) -> None:
        self.tracker = tracker
        self._metrics = metrics
        self._log = log

    def finish(
        self, active: ActiveJob, indices: Sequence[int], status: Status, nbytes: int = 0, detail: str = ""
    ) -> None:
        """Records how ops ended; see `JobTracker.finish`."""
        self.tracker.finish(active, indices, status, nbytes, detail)
        if indices and status in _WARNED:
            self._metrics.failed(active.job.kind, status.name.lower(), len(indices))
            self._log.warning(f"{active.job.kind}-{status.name.lower()}", objects=len(indices), detail=detail)

    def guard(self, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> None:
        """Runs `task`; if it raises, those of its ops `indices` that are unfinished fail."""
        try:
            task()
        except Exception as error:
            self.fail(active, indices, error)

    def fail(self, active: ActiveJob, indices: Sequence[int], error: Exception) -> None:
        """Records that those of these ops that are unfinished failed with `error`."""
        left = [i for i in indices if i in active.unfinished]
        self.finish(active, left, Status.FAILED, detail=f"{type(error).__name__}: {error}")

    def submit(self, workers: Workers, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> bool:
        """Runs `task` on a thread of `workers`, guarded. If none can run it, cancels its ops `indices` and returns False."""
        submitted = workers.submit(partial(self.guard, active, indices, task))
        if not submitted:
            self.finish(active, indices, Status.CANCELLED, detail="the cache is closed, or no thread can be started")
        return submitted
