"""The engine suite kills every broken storage of `brokensglang`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmcache_sglang", reason="lmcache_sglang is not installed")

from lmcache_conformance.runner.records import TestResult, read
from lmcache_sglang.testing.conformance import adapter

if why := adapter.why_not():
    pytest.skip(why, allow_module_level=True)

HERE = Path(__file__).parent
ACCIDENTS = ("EngineRaised: adapter", "EngineDied: adapter", "storage-failed", "cache-disabled reason=")
"""Texts that show that a mutant failed in another way than intended."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_broken_storage_is_killed(tmp_path: Path) -> None:
    report, suite = tmp_path / "report", HERE / "inside_mutants.py"
    options = ["-q", "--no-header", "-o", "python_classes=Mutant*", "-p", "no:cacheprovider"]
    options += ["-p", "lmcache_conformance.runner.one_failure", f"--lmcache-report={report}", str(suite)]
    command = (
        f"import sys; sys.path[:0] = {[str(HERE), *sys.path]!r}; import pytest; sys.exit(pytest.main({options!r}))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=880, check=False)
    killed: dict[str, str] = {}
    seen: set[str] = set()
    for event in read(report):
        if not isinstance(event, TestResult):
            continue
        _, name, test = event.nodeid.split("::")
        seen.add(name)
        if event.outcome == "failed":
            said = f"{event.message}\n{event.detail}"
            assert event.by_assertion, f"{event.nodeid} failed, but not by assertion:\n{said}"
            accidents = [word for word in ACCIDENTS if word in said]
            assert not accidents, f"{event.nodeid}: {accidents}\n{said}"
            killed[name] = f"{test} ({event.seconds:.0f} s)"
    for name in sorted(seen):
        print(f"{name}: {killed.get(name, 'SURVIVES')}")
    assert len(seen) == suite.read_text(encoding="utf-8").count("class Mutant"), done.stdout[-3000:]
    assert not seen - set(killed), f"these survive: {sorted(seen - set(killed))}\n{done.stdout[-3000:]}"
