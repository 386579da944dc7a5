"""The engine suite kills every broken vLLM connector of `mutants.vllmengines`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from lmcache_conformance.mutants import all_mutants, vllmengines
from lmcache_conformance.records import TestResult, read

ACCIDENTS = ("EngineRaised", "EngineDied", "cache-off", "cache-disabled")
"""A mutant that shows itself like this is broken in another way than it means to be. One may: its half is to raise."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_broken_connector_is_killed(tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-m", "pytest", "-q", str(vllmengines.__file__), "-o", "python_classes=Mutant*"]
    command += ["--no-header", "-p", "lmcache_conformance.onefailure", f"--lmcache-report={report}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1150, check=False, env=dict(os.environ))
    killed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for event in read(report):
        if isinstance(event, TestResult):
            words = event.nodeid.split("::")
            seconds[words[1]] = seconds.get(words[1], 0.0) + event.seconds
            if event.outcome == "failed":
                assert event.by_assertion, (
                    f"{event.nodeid} failed, but not by assertion:\n{event.message}\n{event.detail}"
                )
                if words[1] != "MutantDeafToFullMemory":
                    accidents = [word for word in ACCIDENTS if word in event.message + event.detail]
                    assert not accidents, f"{event.nodeid}: {accidents}\n{event.detail}"
                killed.setdefault(words[1], words[-1])
    wanted = {m.suite.__name__ for m in all_mutants() if m.name.startswith("vllmengines.")}
    assert wanted, done.stdout[-3000:] + done.stderr[-3000:]
    for name in sorted(wanted):
        print(f"{name}: {killed.get(name, 'SURVIVES')} ({seconds.get(name, 0):.0f} s)")
    survivors = sorted(wanted - set(killed))
    assert not survivors, f"these survive: {survivors}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
