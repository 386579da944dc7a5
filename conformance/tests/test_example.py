"""The worked example: a separate package, installed with pip, that uses the suite with a few lines of code."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache_conformance.runner.records import TestResult, read

EXAMPLE = Path(__file__).parents[1] / "example"


class Place:
    """The folder where the example is installed; runs commands there as in an activated environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(filter(None, (str(folder / "site"), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "PYTEST_ADDOPTS": ""}

    def run(self, *words: str, timeout: float = 550) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("example"))
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--target", str(place.folder / "site"))
    done = place.run("-m", "pip", "install", *options, str(EXAMPLE))
    assert done.returncode == 0, done.stderr
    return place


def test_adoption_takes_less_than_thirty_lines() -> None:
    lines = (EXAMPLE / "toykv/checks.py").read_text().splitlines()
    lines += (EXAMPLE / "tests/test_toykv.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) < 30


def test_it_needs_nothing_of_this_repository_but_the_package() -> None:
    for file in EXAMPLE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert node.level == 0
                assert "support" not in node.module


def test_installing_leaves_the_sources_as_they_were(place: Place) -> None:
    names = {p.name for p in EXAMPLE.iterdir()}
    assert names <= {"README.md", "pyproject.toml", "toykv", "tests", "__pycache__"}


def test_the_tier_passes_and_what_it_does_not_claim_is_skipped_with_reasons(place: Place) -> None:
    done = place.run(
        "-m", "pytest", "--pyargs", "toykv.checks", "-q", "-p", "no:cacheprovider", "--lmcache-report=report"
    )
    assert done.returncode == 0, done.stdout
    results = [e for e in read(place.folder / "report") if isinstance(e, TestResult)]
    passed = {r.level for r in results if r.outcome == "passed"}
    assert {"bytes", "restart", "faults", "keys", "pressure", "concurrency", "reset"} <= passed
    skipped = {r.reason for r in results if r.outcome == "skipped"}
    assert "not claimed: raw" in skipped
    assert all(reason.startswith("not claimed: ") for reason in skipped)


def test_engine_and_tier_are_found_by_name_and_pass(place: Place) -> None:
    words = [
        "--tier",
        "sqlite",
        "--adapter",
        "toy",
        "--level",
        "bytes,tokens,logits,restart,isolation",
        "--seed",
        "4",
        "--json",
    ]
    done = place.run("-c", "from lmcache.cli import main; main()", "conformance", *words)
    assert done.stderr == ""
    value = json.loads(done.stdout)
    assert done.returncode == 0, json.dumps(value, indent=1)
    assert list(value) == ["sqlite", "toy"]
    for level in ("bytes", "tokens", "logits", "restart", "isolation"):
        assert value["toy"][level]["passed"] > 0, level
        assert value["toy"][level]["failed"] == 0
    assert value["sqlite"]["restart"]["passed"] > 0


BROKEN = """
from lmcache.plan import Status
from lmcache.tiers.base import Result
from lmcache_conformance.suites.tiers import TierCapabilities, TierTests
from toykv.tier import SqliteTier

class Forgets(SqliteTier):
    def _delete(self, id):
        return Result(Status.OK)

class TestForgets(TierTests):
    capabilities = TierCapabilities(persistent=True)
    def open_tier(self, place, capacity):
        return Forgets(place / "objects.sqlite", capacity)
"""


def test_a_tier_that_is_broken_fails_and_its_command_fails_again(place: Place) -> None:
    (place.folder / "test_broken.py").write_text(BROKEN)
    done = place.run(
        "-m",
        "pytest",
        "test_broken.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "deleted_objects",
        "--lmcache-report=broken",
    )
    assert done.returncode == 1, done.stdout
    [failed] = [e for e in read(place.folder / "broken") if isinstance(e, TestResult) and e.outcome == "failed"]
    assert failed.by_assertion
    assert f"level {failed.level} · TestForgets::" in done.stdout
    again = subprocess.run(
        failed.command, shell=True, cwd=place.folder, env=place.environment, capture_output=True, text=True, check=False
    )
    assert "1 failed" in again.stdout
