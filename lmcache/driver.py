"""Drives a `Plane` and the data plane of one rank in one process: executes plans, applies reports, wakes waiters."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lmcache.control.outcomes import Finished, FlushResult, Lookup, Owner, Store
from lmcache.control.plane import Plane
from lmcache.interrupts import deliver, uninterrupted
from lmcache.plan import Chain, JobKind, Name, Plan, Report, TierFacts
from lmcache.transfer.jobs import EngineView
from lmcache.transfer.rank import Rank

_NAP_S = 1.0
"""Seconds between two looks at the progress of jobs, at most."""

_SIGNAL_S = 0.05
"""Seconds that a signal waits for its handler while the main thread waits for a job, at most."""


class Driver:
    """Drives a `Plane` and a `Rank`. Thread-safe; has no thread of its own, so every call also processes what has become due.

    A decision and its plan are taken under one lock: only the deciding caller has the engine memory that the plan needs.
    """

    def __init__(self, plane: Plane, rank: Rank, *, probe_timeout: float) -> None:
        self._plane = plane
        self._rank = rank
        self._transfer = rank.transfer
        self._tracker = rank.transfer.tracker
        self._probe_timeout = probe_timeout
        self._selective = plane.admission.active
        self._lock = threading.RLock()
        self._owners = itertools.count(1)
        self._seen = -1  # the tracker's `news` when its report was last applied
        self._awaited: set[int] = set()
        self._finished: dict[int, Finished] = {}
        if self._selective:
            rank.measure()
            plane.apply((), {0: rank.facts()}, time.monotonic())

    # ---------------------------------------------------------------- requests

    @uninterrupted
    def lookup(self, chain: Chain, max_tokens: int) -> tuple[Owner, Lookup]:
        """Returns the longest hit, leased to a new owner. Waits for probes of shared tiers, up to the probe timeout."""
        owner = next(self._owners)
        self.pump()
        while True:
            seen = self._tracker.news
            with self._lock:
                found = self._plane.lookup(owner, chain, max_tokens, time.monotonic())
                plan = self._plane.take_plan() if found.status == "pending" else None
            if plan is None:
                return owner, found
            self._execute(plan)
            try:
                self._wait(seen, self._probe_timeout)  # afterwards the plane no longer waits for the probe
            except BaseException:
                self.release(owner)
                raise
            self.pump()

    @uninterrupted
    def release(self, owner: Owner) -> None:
        """Ends an owner's lease and removes the owner."""
        with self._lock:
            self._plane.forget(owner)

    @uninterrupted
    def store(self, chain: Chain, view: EngineView, resident: Sequence[Sequence[bool]]) -> Store:
        """Copies the chunks of `chain` from the engine to DRAM; the engine may overwrite them afterwards."""
        self.pump()
        with self._lock:
            now, last = time.monotonic(), len(chain.digests)
            store = self._plane.begin_store(next(self._owners), chain, first=0, last=last, now=now, resident=resident)
            plan = self._plane.take_plan()
        self._execute(plan, store.job, view)
        self.pump()
        return store

    @uninterrupted
    def load(self, owner: Owner, view: EngineView, skip: int = 0) -> int:
        """Loads what `owner` leased into the engine and waits for it; returns how many leading tokens are in place.

        Once this has returned or raised, the job writes no engine memory.
        """
        with self._lock:
            job = self._plane.begin_load(owner, time.monotonic(), skip=skip)
            plan = self._plane.take_plan()
            if job is not None:
                self._awaited.add(job)
        if job is None:
            self._execute(plan)
            return 0
        try:
            self._execute(plan, job, view)
            while True:
                seen = self._tracker.news
                self.pump()
                with self._lock:
                    finished = self._finished.pop(job, None)
                    if finished is not None:
                        self._awaited.discard(job)
                        break
                self._wait(seen, _NAP_S)
        except BaseException:
            self._tracker.fence([job], None)  # the caller may reuse the memory
            with self._lock:
                self._awaited.discard(job)
                self._finished.pop(job, None)
            raise
        if not finished.final:  # late: the caller's memory must not change after return
            self._tracker.fence([job], None)
        self._plane.metrics.loaded(finished.ok_tokens)
        return finished.ok_tokens

    @uninterrupted
    def prefetch(self, owner: Owner, skip: int = 0) -> None:
        """Starts to load what `owner` leased from lower tiers into DRAM."""
        self.pump()
        with self._lock:
            self._plane.begin_prefetch(owner, time.monotonic(), skip=skip)
            plan = self._plane.take_plan()
        self._execute(plan)

    # ---------------------------------------------------------------- maintenance

    @uninterrupted
    def announce(self, tier: int, names: Iterable[Name]) -> None:
        """Adds objects found on a tier to the index."""
        with self._lock:
            self._plane.announce(tier, 0, names, True, time.monotonic())

    @uninterrupted
    def clear(self, namespaces: Sequence[bytes] | None) -> int:
        """Removes everything (of these namespaces) from the index; returns how many objects were in DRAM."""
        with self._lock:
            now = time.monotonic()
            wanted: Sequence[bytes | None] = [None] if namespaces is None else namespaces
            return sum(self._plane.clear(namespace, now) for namespace in wanted)

    @uninterrupted
    def stats(self) -> tuple[dict[str, int], list[dict[str, int]]]:
        """Returns the index's counts, and per group the number of arena slots in each state."""
        self.pump()
        with self._lock:
            return self._plane.stats(), self._plane.arenas()

    @uninterrupted
    def drain(self, timeout: float, *kinds: JobKind, patient: bool = False) -> bool:
        """Waits until no job of these kinds is in progress; False when it gives up.

        A job counts from the decision to start it until its last report was applied, wherever its plan is in between.

        Args:
            timeout: seconds; may be infinite.
            kinds: which jobs.
            patient: count the seconds from the last object that a tier has written or removed.
        """
        until, progress = time.monotonic() + timeout, self._progress()
        while True:
            seen = self._tracker.news
            self.pump()
            if not self.in_progress(*kinds):
                return True
            now = time.monotonic()
            if patient and (latest := self._progress()) != progress:
                until, progress = now + timeout, latest
            if now >= until:
                return False
            self._wait(seen, min(until - now, _NAP_S))

    def in_progress(self, *kinds: JobKind) -> int:
        """Returns the number of jobs of these kinds that have not ended."""
        with self._lock:
            return sum(job.kind in kinds for job in self._plane.state.jobs.live.values())

    def _progress(self) -> int:
        """A number that grows with every object that a tier has written or removed."""
        return self._transfer.tier_copier.completed

    @uninterrupted
    def flush(self, timeout: float, *kinds: JobKind) -> FlushResult:
        """Waits for write-backs; those that failed are tried again while that helps. Returns what became of all of them."""
        until = time.monotonic() + timeout
        done, left = self.drain(timeout, *kinds), -1
        while done and time.monotonic() < until and len(self._plane.state.unwritten) not in (0, left):
            with self._lock:
                left = len(self._plane.state.unwritten)
                if not self._plane.state.retry_unwritten():
                    break
            done = self.drain(max(0.0, until - time.monotonic()), *kinds)
        with self._lock:
            result = self._plane.take_receipts()
        return result if done else replace(result, dropped={**result.dropped, "pending": self.in_progress(*kinds)})

    @uninterrupted
    def pump(self) -> None:
        """Applies new reports and expired deadlines, and executes the resulting plans, until there are none."""
        plane, tracker = self._plane, self._tracker
        while True:
            news = tracker.news
            with self._lock:
                reports: tuple[Report, ...] = ()
                facts: dict[int, list[TierFacts]] = {}
                if news != self._seen:
                    self._seen = news
                    reports = (tracker.report(),)
                    if self._selective:
                        facts = {0: self._rank.facts()}
                finished, plan = plane.advance(reports, facts, time.monotonic())
                for namespace in self._rank.cleared_elsewhere():  # after the write-backs of what has just been stored
                    plane.cleared_elsewhere(namespace)
                for job in finished:
                    if job.job in self._awaited:
                        self._finished.setdefault(job.job, job)
            if plan.jobs:
                self._execute(plan)
            elif tracker.news == self._seen:
                return

    def _wait(self, seen: int, timeout: float) -> None:
        """Waits until the tracker's `news` differs from `seen`, for `timeout` seconds; raises what a signal handler raises."""
        until = time.monotonic() + timeout
        while True:
            self._tracker.wait(seen, max(0.0, min(until - time.monotonic(), _SIGNAL_S)))
            deliver()
            if self._tracker.news != seen or time.monotonic() >= until:
                return

    def _execute(self, plan: Plan, job: int | None = None, view: EngineView | None = None) -> None:
        """Executes a plan; `view` is the engine memory of `job`."""
        if plan.jobs:
            self._transfer.execute(plan, {job: view} if job is not None and view is not None else {})
