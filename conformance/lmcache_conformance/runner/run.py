"""Runs targets: pytest in a child process for each, with limits, so that what crashes or hangs is one failed test.

A test that takes its process down costs only itself: the rest of its target is run in a new one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lmcache_conformance.runner.failures import ending
from lmcache_conformance.runner.processes import kill_group
from lmcache_conformance.runner.records import Began, Ended, Event, Started, TestResult, decode

MAX_RESTARTS = 20
"""How many tests of one target may crash or hang before the rest is given up."""

_POLL_S = 0.1
_TAIL_CHARS = 4_000
_NO_TESTS = 5  # pytest's exit status
_INI = Path(__file__).parents[1] / "pytest.ini"


@dataclass(frozen=True)
class Job:
    """One child pytest.

    Attributes:
        row: what the results are shown under: a target's name, or an adapter's.
        test: file, or `file::Class`, to run.
        options: more for pytest.
        environment: variables on top of this process's.
    """

    row: str
    test: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Seconds. `test`: one test, set-up included; `start`: until tests are collected; `job`: everything."""

    test: float = 600.0
    start: float = 600.0
    job: float = 3600.0


@dataclass
class RowResult:
    """What became of a job.

    Attributes:
        problem: why it did not come to its regular end; empty if it did.
        nothing: why it has no results at all, which is no failure: no tests of the chosen levels, not installed here.
        total: how many tests there are.
    """

    row: str
    results: list[TestResult] = field(default_factory=list)
    problem: str = ""
    nothing: str = ""
    seconds: float = 0.0
    total: int = 0

    @property
    def ok(self) -> bool:
        """Nothing failed."""
        return not self.problem and all(r.outcome != "failed" for r in self.results)


Progress = Callable[[RowResult, Event], None]


def run_job(job: Job, limits: Limits, *, progress: Progress = lambda row, event: None) -> RowResult:
    """Run one job to its end, whatever happens in it. `progress` is called with every event as it comes."""
    row = RowResult(job.row)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lmcache-conformance-") as name:
        for _ in range(MAX_RESTARTS + 1):
            broken = _Attempt(job, Path(name), row, limits, began + limits.job, progress).run()
            row.seconds = time.monotonic() - began
            if not broken:
                break
        else:
            row.problem = f"given up after {MAX_RESTARTS} tests that crashed or hung"
    return row


class _Attempt:
    """One process: from its start until it ends, is killed, or takes a test down with it."""

    def __init__(
        self, job: Job, folder: Path, row: RowResult, limits: Limits, deadline: float, progress: Progress
    ) -> None:
        self._job = job
        self._row = row
        self._limits = limits
        self._deadline = deadline
        self._progress = progress
        self._report = folder / "report.jsonl"
        self._output = folder / "output.txt"
        self._storage = folder / "hypothesis"
        self._position = self._report.stat().st_size if self._report.exists() else 0
        self._began = False
        self._running: Started | None = None
        self._since = time.monotonic()
        self._ended: Ended | None = None

    def run(self) -> bool:
        """Returns whether the rest has to be run in another process."""
        process = self._start()
        try:
            why = self._watch(process)
        finally:
            kill_group(process.pid)
            process.wait()
        self._read()
        if self._ended is not None:
            self._settle(self._ended.status)
            return False
        why = why or f"the process {ending(process.returncode)}"
        if self._running is None:
            self._row.problem = (
                f"{why} {'between tests' if self._began else 'before any test'}\n{self._tail()}".rstrip()
            )
            return False
        self._blame(self._running, why)
        return time.monotonic() < self._deadline

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "pytest", self._job.test, "-q", *self._job.options]
        file = Path(self._job.test.partition("::")[0]).absolute()
        if not file.is_relative_to(_INI.parent):  # tests of other packages: what project they lie in must not matter
            words += ["-c", str(_INI), "--rootdir", str(file.parent)]
        words += ["-p", "_hypothesis_pytestplugin", "-p", "lmcache_conformance.plugin"]
        words += [f"--lmcache-report={self._report}", "--lmcache-resume"]
        words += ["-o", f"faulthandler_timeout={max(1.0, self._limits.test * 0.9):g}"]
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other people's plugins reorder, repeat, parallelise: not here
            "PYTEST_ADDOPTS": "",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self._storage),
            "PYTHONPATH": _python_path(),
            **self._job.environment,
        }
        with self._output.open("wb") as output:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def _watch(self, process: subprocess.Popen[bytes]) -> str:
        """Wait for the end; returns why it was cut short, or nothing."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
                return ""
            self._read()
            now = time.monotonic()
            if now > self._deadline:
                return f"the time limit of {self._limits.job:g} s for the whole target was reached"
            limit = self._limits.test if self._running is not None else self._limits.start
            if now - self._since > limit:
                return f"it hung: no end within {limit:g} s"

    def _read(self) -> None:
        """Take in the whole lines that were added to the report."""
        if not self._report.exists():
            return
        with self._report.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            self._take(decode(line))

    def _take(self, event: Event) -> None:
        self._since = time.monotonic()
        if isinstance(event, Began):
            self._began = True
            self._row.total = len(self._row.results) + event.total
        elif isinstance(event, Started):
            self._running = event
        elif isinstance(event, TestResult):
            self._running = None
            self._row.results.append(event)
        else:
            self._ended = event
        self._progress(self._row, event)

    def _settle(self, status: int) -> None:
        """pytest's own word on how it went."""
        if status in (0, 1):
            return
        if status == _NO_TESTS:
            if not self._row.results:
                self._row.nothing = "no tests of the chosen levels"
            return
        if not any(r.outcome == "failed" for r in self._row.results):
            self._row.problem = f"pytest ended with exit status {status}\n{self._tail()}"

    def _blame(self, test: Started, why: str) -> None:
        result = TestResult(
            nodeid=test.nodeid,
            level=test.level,
            outcome="failed",
            message=why,
            detail=f"{why} during this test\n{self._tail()}",
            seconds=time.monotonic() - self._since,
            command=test.command,
            seed=test.seed,
            by_assertion="hung" in why,
        )
        self._take(result)

    def _tail(self) -> str:
        return self._output.read_bytes().decode(errors="replace")[-_TAIL_CHARS:]


def run_jobs(jobs: Sequence[Job], limits: Limits, *, progress: Progress = lambda row, event: None) -> list[RowResult]:
    """One after the other: engines want all cores, and each other's noise would look like hangs."""
    return [run_job(job, limits, progress=progress) for job in jobs]


def _python_path() -> str:
    """Children find this package where we were imported from, installed or not."""
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    return f"{before}{os.pathsep}{here}" if before else here
