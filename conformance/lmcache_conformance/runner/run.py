"""Runs each target in a child pytest with time limits, so that a crash or hang is one failed test.

After a test that crashes or hangs, the rest of its target runs in a new process.
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
from lmcache_conformance.runner.processes import kill_group, unwound_when_terminated
from lmcache_conformance.runner.records import Began, Ended, Event, Started, TestResult, decode

MAX_RESTARTS = 20
"""Number of tests of one target that may crash or hang before the rest is abandoned."""

_POLL_S = 0.1
_TAIL_CHARS = 4_000
_NO_TESTS = 5  # pytest's exit status
_INI = Path(__file__).parents[1] / "pytest.ini"


@dataclass(frozen=True)
class Job:
    """One child pytest.

    Attributes:
        row: name of the results' row: a target's or an adapter's name.
        test: file, or `file::Class`, to run.
        options: additional pytest options.
        environment: variables added to those of this process.
    """

    row: str
    test: str
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds. `test`: one test with set-up; `start`: until tests are collected; `job`: the whole job."""

    test: float = 600.0
    start: float = 600.0
    job: float = 3600.0


@dataclass
class RowResult:
    """The results of a job.

    Attributes:
        problem: why the job did not end regularly; empty if it did.
        nothing: why there are no results although nothing failed: no tests of the chosen levels, or not installed.
        total: number of tests.
    """

    row: str
    results: list[TestResult] = field(default_factory=list)
    problem: str = ""
    nothing: str = ""
    seconds: float = 0.0
    total: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.problem and all(r.outcome != "failed" for r in self.results)


Progress = Callable[[RowResult, Event], None]


def run_job(job: Job, limits: Limits, *, progress: Progress = lambda row, event: None) -> RowResult:
    """Runs one job to its end, restarting it after crashes and hangs. Calls `progress` with every event.

    Leaves no process behind, also if it is interrupted or terminated.
    """
    row = RowResult(job.row)
    began = time.monotonic()
    with unwound_when_terminated(), tempfile.TemporaryDirectory(prefix="lmcache-conformance-") as name:
        for _ in range(MAX_RESTARTS + 1):
            broken = _Attempt(job, Path(name), row, limits, began + limits.job, progress).run()
            row.seconds = time.monotonic() - began
            if not broken:
                break
        else:
            row.problem = f"given up after {MAX_RESTARTS} tests that crashed or hung"
    return row


class _Attempt:
    """One child process, until it ends, crashes or is killed."""

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
        """Runs the process. Returns whether the remaining tests have to run in another process."""
        process = self._start()
        try:
            why = self._watch(process)
        finally:
            kill_group(process.pid)
            process.wait()
        self._read()
        if self._ended is not None:
            self._finish(self._ended.status)
            return False
        why = why or f"the process {ending(process.returncode)}"
        if self._running is None:
            self._row.problem = (
                f"{why} {'between tests' if self._began else 'before any test'}\n{self._tail()}".rstrip()
            )
            return False
        self._record_failure(self._running, why)
        return time.monotonic() < self._deadline

    def _start(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "pytest", self._job.test, "-q", *self._job.options]
        file = Path(self._job.test.partition("::")[0]).absolute()
        if not file.is_relative_to(_INI.parent):  # tests of another package: settings of its project must not apply
            words += ["-c", str(_INI), "--rootdir", str(file.parent)]
        words += ["-p", "_hypothesis_pytestplugin", "-p", "lmcache_conformance.plugin"]
        words += [f"--lmcache-report={self._report}", "--lmcache-resume", f"--lmcache-parent={os.getpid()}"]
        words += ["-o", f"faulthandler_timeout={max(1.0, self._limits.test * 0.9):g}"]
        environment = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # other installed plugins may reorder, repeat or parallelise tests
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
        """Waits for the process to end. Returns why it has to be killed, or an empty string."""
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
        """Processes the complete lines added to the report file since the last call."""
        if not self._report.exists():
            return
        with self._report.open("rb") as file:
            file.seek(self._position)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        for line in whole.splitlines():
            self._handle(decode(line))

    def _handle(self, event: Event) -> None:
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

    def _finish(self, status: int) -> None:
        """Interprets pytest's exit status."""
        if status in (0, 1):
            return
        if status == _NO_TESTS:
            if not self._row.results:
                self._row.nothing = "no tests of the chosen levels"
            return
        if not any(r.outcome == "failed" for r in self._row.results):
            self._row.problem = f"pytest ended with exit status {status}\n{self._tail()}"

    def _record_failure(self, test: Started, why: str) -> None:
        """Records that the running test crashed or hung."""
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
        self._handle(result)

    def _tail(self) -> str:
        return self._output.read_bytes().decode(errors="replace")[-_TAIL_CHARS:]


def run_jobs(jobs: Sequence[Job], limits: Limits, *, progress: Progress = lambda row, event: None) -> list[RowResult]:
    """Runs jobs one after the other: engines use all cores, so that parallel jobs could run into time limits."""
    return [run_job(job, limits, progress=progress) for job in jobs]


def _python_path() -> str:
    """Returns a PYTHONPATH on which children find this package even if it is not installed."""
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH")
    return f"{before}{os.pathsep}{here}" if before else here
