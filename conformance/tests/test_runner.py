"""The runner: whatever happens in a child pytest becomes a result, affects at most one test, and ends in time."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lmcache_conformance.runner.processes import kill_group, members
from lmcache_conformance.runner.records import Began, Event, Started
from lmcache_conformance.runner.run import Job, Limits, RowResult, run_job

LIMITS = Limits(test=120, start=120, job=600)
HEAD = """
import os, signal, subprocess, sys, time, pytest
from lmcache_conformance.contract import Level
from lmcache_conformance.runner.marks import level
pytestmark = level(Level.FAULTS)
"""


@pytest.fixture(autouse=True)
def _no_addopts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # the user's own options must not matter


def suite(folder: Path, body: str) -> str:
    file = folder / "checks.py"
    file.write_text(HEAD + textwrap.dedent(body))
    return str(file)


def outcomes(row: RowResult) -> dict[str, str]:
    return {r.nodeid.rpartition("::")[2]: r.outcome for r in row.results}


def test_results_come_with_progress_and_seconds(tmp_path: Path) -> None:
    file = suite(tmp_path, "def test_a(): time.sleep(0.2)\ndef test_b(): assert 0\ndef test_c(): pytest.skip('why')")
    seen: list[Event] = []
    row = run_job(Job("mine", file), LIMITS, progress=lambda row, event: seen.append(event))
    assert outcomes(row) == {"test_a": "passed", "test_b": "failed", "test_c": "skipped"}
    assert (row.row, row.total, row.problem, row.nothing, row.ok) == ("mine", 3, "", "", False)
    assert row.seconds > row.results[0].seconds >= 0.2
    assert seen[0] == Began(3)
    assert [e.nodeid for e in seen if isinstance(e, Started)] == [r.nodeid for r in row.results]


def test_options_and_environment_reach_the_child_and_other_projects_settings_do_not(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "conftest.py").write_text("")
    file = suite(
        tmp_path,
        """
        def test_it(lmcache_seed, lmcache_budget):
            assert (lmcache_seed, lmcache_budget, os.environ["MINE"]) == (41, "full", "yes")
        """,
    )
    row = run_job(Job("r", file, ("--hypothesis-seed=41", "--lmcache-budget=full"), {"MINE": "yes"}), LIMITS)
    assert row.ok, row
    assert outcomes(row) == {"test_it": "passed"}
    assert {p.name for p in tmp_path.iterdir()} <= {"checks.py", "pytest.ini", "conftest.py", "__pycache__"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was killed by SIGSEGV"),
        ("os._exit(0)", "the process ended with exit status 0"),
        ("os.killpg(0, signal.SIGKILL)", "the process was killed by SIGKILL"),
    ],
)
def test_a_test_that_takes_its_process_down_costs_only_itself(tmp_path: Path, how: str, message: str) -> None:
    file = suite(
        tmp_path,
        f"""
        def test_before(): pass
        def test_dies():
            print("last words", flush=True)
            os.write(2, b"loud words")
            {how}
        def test_after(): pass
        """,
    )
    row = run_job(Job("r", file, ("-s", "--hypothesis-seed=3")), LIMITS)
    assert outcomes(row) == {"test_before": "passed", "test_dies": "failed", "test_after": "passed"}
    [failed] = [r for r in row.results if r.outcome == "failed"]
    assert failed.message == message
    assert "loud words" in failed.detail
    assert (failed.level, failed.seed) == ("faults", 3)
    assert "checks.py::test_dies" in failed.command
    assert row.problem == ""
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}
    again = subprocess.run(shlex.split(failed.command), env=environment, start_new_session=True, check=False)
    assert again.returncode not in (1, 2, 3, 4, 5)


def test_a_test_that_hangs_is_killed_with_its_children_and_the_rest_runs(tmp_path: Path) -> None:
    file = suite(
        tmp_path,
        f"""
        def test_hangs():
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpgrp()}}")
            time.sleep(600)
        def test_after(): pass
        """,
    )
    row = run_job(Job("r", file), Limits(test=6, start=120, job=600))
    assert outcomes(row) == {"test_hangs": "failed", "test_after": "passed"}
    assert row.results[0].message == "it hung: no end within 6 s"
    assert "in test_hangs" in row.results[0].detail  # faulthandler: where it hung
    assert row.results[0].by_assertion
    assert members(int((tmp_path / "pids").read_text())) == []


def test_the_whole_targets_time_limit_ends_it(tmp_path: Path) -> None:
    file = suite(tmp_path, "@pytest.mark.parametrize('i', range(100))\ndef test_slow(i): time.sleep(1)")
    row = run_job(Job("r", file), Limits(test=60, start=120, job=6))
    assert row.results[-1].outcome == "failed"
    assert row.results[-1].message == "the time limit of 6 s for the whole target was reached"
    assert len(row.results) < 20


def test_a_hang_before_any_test_is_the_rows_problem(tmp_path: Path) -> None:
    file = suite(tmp_path, "print('importing', flush=True)\ntime.sleep(600)")
    row = run_job(Job("r", file, ("-s",)), Limits(test=60, start=5, job=600))
    assert row.problem.startswith("it hung: no end within 5 s before any test")
    assert not row.ok


def test_what_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    row = run_job(Job("r", suite(tmp_path, "import no_such_module")), LIMITS)
    assert not row.ok
    assert [r.message for r in row.results] == ["not collected: ModuleNotFoundError: No module named 'no_such_module'"]
    assert row.problem == ""


def test_wrong_options_are_the_rows_problem_with_pytests_words(tmp_path: Path) -> None:
    row = run_job(Job("r", suite(tmp_path, "def test_a(): pass"), ("--lmcache-budget=huge",)), LIMITS)
    assert row.problem.startswith("the process ended with exit status 4 before any test")
    assert "huge" in row.problem


def test_no_tests_of_a_level_is_no_failure(tmp_path: Path) -> None:
    row = run_job(Job("r", suite(tmp_path, "def test_a(): pass"), ("--lmcache-level=keys",)), LIMITS)
    assert (row.ok, row.nothing, row.results) == (True, "no tests of the chosen levels", [])


def test_tests_that_crash_one_after_the_other_are_given_up_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmcache_conformance.runner.run.MAX_RESTARTS", 2)
    file = suite(tmp_path, "@pytest.mark.parametrize('i', range(9))\ndef test_dies(i): os._exit(1)")
    row = run_job(Job("r", file), LIMITS)
    assert len(row.results) == 3
    assert row.problem == "given up after 2 tests that crashed or hung"


def test_leaving_the_runner_leaves_no_process(tmp_path: Path) -> None:
    file = suite(
        tmp_path,
        f"def test_a():\n    open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpgrp()))\n    time.sleep(600)",
    )

    def interrupt(row: RowResult, event: Event) -> None:
        if isinstance(event, Started):
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                time.sleep(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(Job("r", file), LIMITS, progress=interrupt)
    assert members(int((tmp_path / "pid").read_text())) == []


RUN = """
import sys
from lmcache_conformance.runner.run import Job, Limits, run_job
run_job(Job("r", sys.argv[1]), Limits(test=120, start=120, job=600))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP), (signal.SIGKILL, -9)],
)
def test_a_run_that_is_ended_by_a_signal_leaves_no_process(tmp_path: Path, number: int, status: int) -> None:
    file = suite(
        tmp_path,
        f"""
        def test_hangs():
            children = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            open({str(tmp_path / "new")!r}, "w").write(f"{{os.getpgrp()}}")
            os.rename({str(tmp_path / "new")!r}, {str(tmp_path / "group")!r})
            time.sleep(600)
        """,
    )
    take = f"import signal; signal.signal({int(number)}, signal.SIG_DFL)\n" if number != signal.SIGKILL else ""
    run = subprocess.Popen([sys.executable, "-c", take + RUN, file])  # `nohup` ignores SIGHUP
    group = tmp_path / "group"
    try:
        until = time.monotonic() + 120
        while not group.exists():
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        child = int(group.read_text())
        try:
            run.send_signal(number)
            assert run.wait(60) == status
            until = time.monotonic() + 60
            while left := [pid for pid in members(child) if pid == child or number != signal.SIGKILL]:
                assert time.monotonic() < until, f"{left} are left"
                time.sleep(0.02)
        finally:
            kill_group(child)
    finally:
        run.kill()
        run.wait()
