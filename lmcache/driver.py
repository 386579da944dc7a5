"""The wheel between one index and one transfer in one process: plans go down, reports come up, whoever waits is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from lmcache.control import Finished, Index
from lmcache.control.admission import Admission
from lmcache.observe.metrics import Metrics
from lmcache.plan import JobKind, Plan
from lmcache.transfer import Transfer
from lmcache.transfer.jobs import EngineView

T = TypeVar("T")


class ControlLoop:
    """Thread-safe. Whoever calls turns the wheel a little; there is no thread of its own.

    A question to the index and the plan that follows from it are taken in one step, so that nobody else executes a plan
    whose engine memory only the asker knows.
    """

    def __init__(self, index: Index, transfer: Transfer, metrics: Metrics, admission: Admission | None = None) -> None:
        self._admission = admission
        self._index = index
        self._transfer = transfer
        self._metrics = metrics
        self._lock = threading.RLock()
        self._seen = -1
        self._evictions = self._refused = 0
        self._awaited: set[int] = set()
        self._finished: dict[int, Finished] = {}

    def ask(self, question: Callable[[Index, float], T]) -> tuple[T, Plan]:
        """`question(index, now)`, and the plan that it led to: hand it to `execute`."""
        with self._lock:
            return question(self._index, time.monotonic()), self._index.take_plan()

    def tell(self, message: Callable[[Index, float], T]) -> T:
        """`message(index, now)`; jobs that it led to start at the next turn."""
        with self._lock:
            return message(self._index, time.monotonic())

    def ask_for_job(self, question: Callable[[Index, float], int | None]) -> tuple[int | None, Plan]:
        """Like `ask` for a question whose answer is a job id, which `result` will wait for."""
        with self._lock:
            job, plan = self.ask(question)
            if job is not None:
                self._awaited.add(job)
            return job, plan

    def execute(self, plan: Plan, views: Mapping[int, EngineView] | None = None) -> None:
        """Start what a plan says, on the caller's thread where that needs no tier."""
        if plan.jobs:
            self._transfer.execute(plan, views)

    def turn(self) -> None:
        """Hand reports to the index and its new jobs to the transfer, until both are quiet."""
        while True:
            news = self._transfer.news
            with self._lock:
                now = time.monotonic()
                finished = self._index.tick(now)
                if news != self._seen:
                    self._seen = news
                    if self._admission is not None:
                        self._admission.measured(0, self._transfer.facts())
                    finished = [*finished, *self._index.report(self._transfer.poll(), now)]
                for job in finished:
                    if job.job in self._awaited:
                        self._finished.setdefault(job.job, job)
                evicted = self._index.evictions
                if evicted != self._evictions:
                    self._metrics.evicted("dram", evicted - self._evictions)
                    self._evictions = evicted
                refused = self._index.refused
                if refused != self._refused:
                    self._metrics.skipped_store("admission", refused - self._refused)
                    self._refused = refused
                plan = self._index.take_plan()
            self.execute(plan)
            if not plan.jobs and self._transfer.news == self._seen:
                return

    def wait(self, seen: int, timeout: float) -> None:
        """Sleep until the transfer's news differ from `seen`, or a deadline passes, then turn."""
        self._transfer.wait(seen, timeout)
        self.turn()

    @property
    def news(self) -> int:
        """What to pass to `wait`; read it before looking at whatever you wait for."""
        return self._transfer.news

    def result(self, job: int | None) -> int:
        """Wait for a load; tokens that arrived. Whatever goes wrong here, the job writes no engine memory afterwards."""
        try:
            while True:
                seen = self.news
                loaded = self.try_result(job)
                if loaded is not None:
                    return loaded
                self.wait(seen, 1.0)
        except BaseException:
            if job is not None:
                self._transfer.fence([job])  # whoever catches this may use the memory for something else
            raise

    def try_result(self, job: int | None) -> int | None:
        """Like `result`, but None if the job has not ended yet."""
        if job is None:
            return 0
        self.turn()
        with self._lock:
            finished = self._finished.pop(job, None)
            if finished is None:
                return None
            self._awaited.discard(job)
        if not finished.final:  # it was too slow: the caller's memory must not change under him from here on
            self._transfer.fence([job])
        self._metrics.loaded(finished.ok_tokens)
        return finished.ok_tokens

    def settle(self, timeout: float, *kinds: JobKind) -> bool:
        """Turn until no job of these kinds is under way; False after `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            seen = self.news
            self.turn()
            busy = any(self._transfer.running(kind) for kind in kinds)
            if not busy and self.news == seen:  # else what has just ended may have something to follow it
                return True
            if (left := until - time.monotonic()) <= 0:
                return False
            self._transfer.wait(seen, left)
