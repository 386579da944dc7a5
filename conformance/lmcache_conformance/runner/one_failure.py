"""A pytest plugin (`-p lmcache_conformance.runner.one_failure`): skips the rest of a class after its first failure.

It lets many mutants run in one process, each until it is killed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips the test if another one of its class has failed."""
    parent = item.getparent(pytest.Class)
    if parent is not None and parent.stash.get(_FAILED, False):
        pytest.skip("another test of this class has failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Records the first failure of a class."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    parent = item.getparent(pytest.Class)
    if report.failed and parent is not None:
        parent.stash[_FAILED] = True
    return report  # type: ignore[return-value]
