"""Mutation testing: runs deliberately broken implementations (mutants) through their suites, which have to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lmcache_conformance.mutants import ROWS, Mutant, SkippedRow, all_mutants, skipped_rows
from lmcache_conformance.runner.discover import DiscoveryError, nearest
from lmcache_conformance.runner.records import Event, TestResult
from lmcache_conformance.runner.run import Job, Limits, RowResult, run_job

__all__ = ["SkippedRow", "Verdict", "choose_mutants", "judge", "run_mutants", "uncovered"]

_OPTIONS = ("-o", "python_classes=Mutant*", "-p", "lmcache_conformance.runner.one_failure")


@dataclass(frozen=True)
class Verdict:
    """The result for a mutant.

    Attributes:
        name: `module.Class`; for a row without a mutant, the row's text.
        killed: whether a test failed by assertion; None if the mutant was not run.
        by: the test that failed.
        reason: why the mutant was not killed, or not run.
        row, project: see `Mutant`.
    """

    name: str
    killed: bool | None
    by: str = ""
    reason: str = ""
    row: str = ""
    project: str = ""
    seconds: float = 0.0

    def as_json(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "name": self.name,
            "killed": self.killed,
            "by": self.by,
            "reason": self.reason,
            "row": self.row,
            "project": self.project,
            "seconds": round(self.seconds, 2),
        }


def run_mutants(
    mutants: Sequence[Mutant],
    limits: Limits,
    *,
    options: Sequence[str] = (),
    progress: Callable[[Verdict], None] = lambda verdict: None,
) -> list[Verdict]:
    """Runs each mutant until its first failure, those of one module in one process. Calls `progress` with each verdict."""
    found = []
    for module in dict.fromkeys(mutant.file for mutant in mutants):
        found += _run_module([mutant for mutant in mutants if mutant.file == module], limits, options, progress)
    return found


def _run_module(
    mutants: Sequence[Mutant], limits: Limits, options: Sequence[str], progress: Callable[[Verdict], None]
) -> list[Verdict]:
    by_class = {mutant.suite.__name__: mutant for mutant in mutants}
    reported: dict[str, Verdict] = {}

    def watch(row: RowResult, event: Event) -> None:
        if isinstance(event, TestResult) and event.by_assertion:
            mutant = by_class.get(_class_of(event))
            if mutant is not None and mutant.name not in reported:
                reported[mutant.name] = judge(mutant, row)
                progress(reported[mutant.name])

    first, *others = [f"{mutant.file}::{mutant.suite.__name__}" for mutant in mutants]
    job = Job(mutants[0].name.partition(".")[0], first, (*others, *_OPTIONS, *options))
    row = run_job(job, replace(limits, job=limits.job * len(mutants)), progress=watch)
    verdicts = [judge(mutant, row) for mutant in mutants]
    for verdict in verdicts:
        if verdict.name not in reported:
            progress(verdict)
    return verdicts


def judge(mutant: Mutant, row: RowResult) -> Verdict:
    """Returns a mutant's verdict: killed if a test failed by assertion. A test that failed for another reason proves nothing."""
    mine = [result for result in row.results if _class_of(result) == mutant.suite.__name__]
    seconds = sum(result.seconds for result in mine)
    absent = [result.reason for result in mine if "not installed here" in result.reason]
    if absent and all(result.outcome == "skipped" for result in mine):  # its engine is not installed
        return Verdict(mutant.name, None, reason=absent[0], row=mutant.row, project=mutant.project)
    failed = [result for result in mine if result.outcome == "failed"]
    kills = [result for result in failed if result.by_assertion]
    reason, by = "", ""
    if kills:
        by = kills[0].case.rpartition("::")[2]
    elif failed:
        reason = f"{failed[0].case} failed, but not by assertion: {failed[0].message}"
    elif mine:
        reason = f"none of {sum(result.outcome == 'passed' for result in mine)} tests failed"
    else:
        messages = [result.message for result in row.results if not _class_of(result)]
        reason = "; ".join(messages) or row.problem or row.nothing or "it has no tests"
    return Verdict(mutant.name, bool(kills), by, reason, mutant.row, mutant.project, seconds)


def _class_of(result: TestResult) -> str:
    return result.nodeid.partition("::")[2].partition("::")[0]


def uncovered() -> list[Verdict]:
    """Returns verdicts for known failures without a mutant: those skipped with a reason, and those without a reason."""
    skipped = {skip.row: skip.reason for skip in skipped_rows()}
    covered = {mutant.row for mutant in all_mutants()}
    found = [Verdict(row, None, reason=reason, row=row) for row, reason in skipped.items() if row not in covered]
    forgotten = [row for row in ROWS if row not in covered and row not in skipped]
    return found + [Verdict(row, False, reason="no mutant has this row", row=row) for row in forgotten]


def choose_mutants(modules: Sequence[str]) -> list[Mutant]:
    """Returns the mutants of the given modules (`tiers`, …), or single ones by name (`tiers.MutantEmptyValue`); by default all.

    Raises:
        DiscoveryError: there is none of that name.
    """
    found = all_mutants()
    for name in modules:
        names = [m.name for m in found] + sorted({m.name.partition(".")[0] for m in found})
        if name not in names:
            raise DiscoveryError(f"unknown mutant {name!r}{nearest(name, names)} Available: {', '.join(names)}")
    return [m for m in found if not modules or m.name in modules or m.name.partition(".")[0] in modules]
