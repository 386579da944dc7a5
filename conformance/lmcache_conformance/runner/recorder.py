"""Writes the result of each test as JSON lines while the tests run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_conformance.runner.failures import EngineFailure
from lmcache_conformance.runner.marks import LEVEL
from lmcache_conformance.runner.records import UNMARKED, Began, Ended, Started, TestResult, Writer, read
from lmcache_conformance.runner.reproduce import command
from lmcache_conformance.runner.seeds import seed_of

MESSAGE_CHARS = 2_000
DETAIL_CHARS = 40_000


class Recorder:
    """A pytest plugin for `--lmcache-report FILE`."""

    NAME = "lmcache-report"

    def __init__(self, path: Path, *, resume: bool) -> None:
        done = {e.nodeid for e in read(path) if isinstance(e, (Started, TestResult))} if resume else set()
        self._done: set[str] = done
        self._writer = Writer(path)
        self._reports: list[pytest.TestReport] = []
        self._by_assertion = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselects tests that an earlier, interrupted run has done."""
        left_out = [item for item in items if item.nodeid in self._done]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Writes `Began` with the number of tests."""
        self._writer.write(Began(len(session.items)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Records a module that cannot be imported as a failure."""
        if report.failed:
            self._writer.write(
                TestResult(
                    nodeid=report.nodeid,
                    level=UNMARKED,
                    outcome="failed",
                    message=_encodable(f"not collected: {_last_line(report.longreprtext)}"),
                    detail=_encodable(report.longreprtext[-DETAIL_CHARS:]),
                )
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Writes a `Started` before the test and a `TestResult` after it."""
        seed = seed_of(item)
        again = command(item, seed)
        self._reports, self._by_assertion = [], False
        self._writer.write(Started(item.nodeid, _level(item), again, seed))
        try:
            return (yield)
        finally:
            if self._reports:
                self._writer.write(_result(item, self._reports, self._by_assertion, again, seed))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        """Records whether the test failed by assertion."""
        report: pytest.TestReport = yield  # type: ignore[misc, assignment]
        if report.failed and call.when == "call":
            xpassed = call.excinfo is None
            self._by_assertion |= xpassed or (call.excinfo is not None and _is_check(call.excinfo.value))
        return report  # type: ignore[return-value]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collects the reports of set-up, call and tear-down."""
        self._reports.append(report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Writes `Ended`."""
        self._writer.write(Ended(int(exitstatus)))

    def pytest_unconfigure(self) -> None:
        """Closes the file."""
        self._writer.close()


def _level(item: pytest.Item) -> str:
    mark = item.get_closest_marker(LEVEL)
    return str(mark.args[0]) if mark is not None else UNMARKED


def _is_check(error: BaseException) -> bool:
    """Returns whether an error is a failed assertion, `pytest.fail` (e.g. a time-out), or an engine that died, hung or raised."""
    if inner := getattr(error, "exceptions", None):  # Hypothesis reports several distinct failures as one group
        return any(_is_check(e) for e in inner)
    return isinstance(error, (AssertionError, pytest.fail.Exception, EngineFailure))


def _result(
    item: pytest.Item, reports: list[pytest.TestReport], by_assertion: bool, again: str, seed: int | None
) -> TestResult:
    fields: dict[str, Any] = {
        "nodeid": item.nodeid,
        "level": _level(item),
        "seconds": sum(report.duration for report in reports),
        "command": again,
        "seed": seed,
    }
    failed = [report for report in reports if report.failed]
    if failed:
        first = failed[0]
        return TestResult(
            outcome="failed",
            message=_message(first),
            detail=_detail(failed),
            by_assertion=by_assertion and first.when == "call",
            **fields,
        )
    for report in reports:
        if report.skipped:
            expected = getattr(report, "wasxfail", None)
            if expected is not None:
                return TestResult(outcome="xfailed", reason=str(expected), **fields)
            return TestResult(outcome="skipped", reason=_skip_reason(report), **fields)
    return TestResult(outcome="passed", **fields)


def _skip_reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    return _encodable(text.removeprefix("Skipped: "))


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    if report.when != "call":
        text = f"in {report.when}: {text}"
    return _encodable(str(text)[:MESSAGE_CHARS])


def _detail(reports: list[pytest.TestReport]) -> str:
    parts = [report.longreprtext for report in reports]
    parts += [f"--- {title} ---\n{text}" for title, text in reports[-1].sections]
    return _encodable("\n".join(parts)[-DETAIL_CHARS:])


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("E").strip() if lines else ""


def _encodable(text: str) -> str:
    """Replaces lone surrogates, which cannot be encoded."""
    return text.encode("utf-8", "replace").decode()
