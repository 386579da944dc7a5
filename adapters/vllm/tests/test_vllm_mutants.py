"""The engine suite detects every broken vLLM connector of `lmcache_vllm.testing.mutants`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_conformance.mutants import all_mutants
from lmcache_conformance.runner.records import TestResult, read
from lmcache_vllm.testing import mutants

ACCIDENTS = ("EngineRaised: adapter", "EngineDied: adapter", "cache-off reason=", "cache-disabled reason=")
"""Signs that a mutant fails for another reason than intended. Expected of one mutant only, whose scheduler raises."""

RAISES = "MutantDeafToFullMemory"


def kills(report: Path) -> dict[str, str]:
    """Returns mutant class → the test that detected it, and the seconds it took."""
    killed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for event in read(report):
        if not isinstance(event, TestResult):
            continue
        _, name, test = event.nodeid.split("::")
        seconds[name] = seconds.get(name, 0.0) + event.seconds
        if event.outcome == "failed":
            output = f"{event.message}\n{event.detail}"
            assert event.by_assertion, f"{event.nodeid} failed, but not by assertion:\n{output}"
            accidents = [word for word in ACCIDENTS if word in output and name != RAISES]
            assert not accidents, f"{event.nodeid}: {accidents}\n{output}"
            killed[name] = f"{test} ({seconds[name]:.0f} s)"
    return killed


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_broken_connector_is_killed(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-m", "pytest", "-q", str(mutants.__file__), "-o", "python_classes=Mutant*"]
    command += ["--no-header", "-p", "lmcache_conformance.runner.one_failure", f"--lmcache-report={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1150, check=False)
    killed = kills(report)
    wanted = {m.suite.__name__ for m in all_mutants() if m.name.startswith("vllm.")}
    assert wanted
    for name in sorted(wanted):
        print(f"{name}: {killed.get(name, 'SURVIVES')}")
    survivors = sorted(wanted - set(killed))
    assert not survivors, f"these survive: {survivors}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
