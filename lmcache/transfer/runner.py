"""Runs the parts of jobs, here or on worker threads, and turns every failure into a status."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lmcache.observe.log import Throttle
from lmcache.observe.metrics import Metrics
from lmcache.plan import Status
from lmcache.transfer.jobs import ActiveJob, JobTracker
from lmcache.transfer.workers import Workers

_WARNED = frozenset({Status.CORRUPT, Status.FAILED, Status.FULL, Status.LATE})
"""Statuses that are counted and logged; a missing object or a cancelled op is normal operation."""


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
        """Runs `task`; if it raises, those of its ops `indices` that are unfinished fail. No other place catches everything."""
        try:
            task()
        except Exception as error:
            left = [i for i in indices if i in active.unfinished]
            self.finish(active, left, Status.FAILED, detail=f"{type(error).__name__}: {error}")

    def submit(self, workers: Workers, active: ActiveJob, indices: Sequence[int], task: Callable[[], object]) -> None:
        """Runs `task` on a thread of `workers`, guarded. If none can run it, its ops `indices` are cancelled."""
        if not workers.submit(partial(self.guard, active, indices, task)):
            self.finish(active, indices, Status.CANCELLED, detail="the cache is closed, or no thread can be started")
