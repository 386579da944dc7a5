"""Every mutant is killed by its suite, and every known failure has a mutant or a reason."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache_conformance.mutants import ROWS, all_mutants, mutant, skip_row, skipped_rows
from lmcache_conformance.runner.records import TestResult, read

CACHES = ("cachebytes", "cachefaults", "cachefiles", "cachehost", "cachenames", "cachepressure", "cacheprocess")
MINE = (*CACHES, "hf", "index", "kernels", "keys", "layouts", "tiers", "tiersizes")


def run(module: str, report: Path) -> dict[str, str]:
    """Mutant class → the test that killed it."""
    file = next(m.file for m in all_mutants() if m.name.startswith(f"{module}."))
    command = [sys.executable, "-m", "pytest", "-q", file, "-o", "python_classes=Mutant*", "--no-header"]
    command += ["-p", "lmcache_conformance.runner.one_failure", f"--lmcache-report={report}"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environ)
    killed: dict[str, str] = {}
    for event in read(report):
        if isinstance(event, TestResult) and event.outcome == "failed":
            words = event.nodeid.split("::")
            assert event.by_assertion, f"{event.nodeid} failed, but not by assertion:\n{event.message}\n{event.detail}"
            killed.setdefault(words[1], words[-1])
    assert killed, done.stdout[-3000:] + done.stderr[-3000:]
    return killed


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, str]]]]:
    """All modules, two at a time."""
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(2) as pool:
        yield {module: pool.submit(run, module, folder / module) for module in MINE}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("module", MINE)
def test_every_mutant_is_killed(module: str, runs: dict[str, Future[dict[str, str]]]) -> None:
    wanted = {m.suite.__name__ for m in all_mutants() if m.name.startswith(f"{module}.")}
    assert wanted
    killed = runs[module].result()
    for name in sorted(wanted):
        print(f"{module}.{name}: {killed.get(name, 'SURVIVES')}")
    assert wanted <= set(killed), f"these survive: {sorted(wanted - set(killed))}"
    # Where one test kills nearly all of them, it most likely fails for the right implementation too.
    assert len(set(killed.values())) >= len(wanted) // 3, f"killed by {set(killed.values())} alone"


def test_every_known_failure_has_a_mutant_or_a_reason() -> None:
    covered = {m.row for m in all_mutants()} | {skipped.row for skipped in skipped_rows()}
    assert not set(ROWS) - covered
    assert all(len(skipped.reason.split()) > 5 for skipped in skipped_rows())


def test_names_are_unique() -> None:
    names = Counter(m.name for m in all_mutants())
    assert not [name for name, count in names.items() if count > 1]


def test_an_unknown_row_or_class_name_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="did you mean 'key exists with an empty value'"):
        skip_row("key exists with empty values", "no reason")
    with pytest.raises(ValueError, match="begins with 'Mutant'"):
        mutant(row=ROWS[0], project="p")(type("Broken", (), {}))
