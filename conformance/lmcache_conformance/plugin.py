"""The pytest plugin: levels, capabilities, known failures, reproduction commands, and the report file for the runner.

pytest loads it in every environment in which the package is installed, so it leaves tests without its marks alone and
imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lmcache_conformance.runner.marks import LEVEL, REQUIRES
from lmcache_conformance.runner.seeds import known_seed, seed_of

if TYPE_CHECKING:
    from lmcache_conformance.runner.xfails import Xfail

# Suites are subclassed in other packages' test modules; their asserts are rewritten there too, for readable failures.
pytest.register_assert_rewrite(
    *(f"lmcache_conformance.{package}" for package in ("suites", "labs", "engines", "targets", "mutants"))
)

_XFAILS = pytest.StashKey[list["Xfail"]]()
_UNUSED = pytest.StashKey[list["Xfail"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the plugin's options; none of them has an effect unless given."""
    group = parser.getgroup("lmcache", "LMCache conformance")
    group.addoption(
        "--lmcache-adapter", metavar="NAME", help="Engine adapter under test: entry point or module:attribute."
    )
    group.addoption("--lmcache-budget", choices=("quick", "full"), help="Thoroughness of the suites [quick].")
    group.addoption("--lmcache-level", metavar="A,B", help="Run only tests of these levels.")
    group.addoption("--lmcache-xfails", metavar="FILE", help="Known failures, each with a link to its issue.")
    group.addoption(
        "--lmcache-report", metavar="FILE", help="Append JSON lines: one when a test starts, one when it ends."
    )
    group.addoption("--lmcache-resume", action="store_true", help="Skip tests that are already in the report.")
    group.addoption("--lmcache-parent", metavar="PID", type=int, help="End when this process, the parent, has ended.")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks; reads the files named by options."""
    if config.option.lmcache_parent:
        from lmcache_conformance.runner.processes import end_with_parent

        end_with_parent(config.option.lmcache_parent)
    config.addinivalue_line("markers", f"{LEVEL}(name): what this test proves, see lmcache_conformance.contract.Level")
    config.addinivalue_line("markers", f"{REQUIRES}(*capabilities): skip unless the class under test claims them")
    if config.option.lmcache_xfails:
        from lmcache_conformance.runner.xfails import XfailError, read_xfails

        try:
            config.stash[_XFAILS] = read_xfails(Path(config.option.lmcache_xfails))
        except XfailError as error:
            raise pytest.UsageError(str(error)) from None
    if config.option.lmcache_report:
        from lmcache_conformance.runner.recorder import Recorder

        path = Path(config.option.lmcache_report)
        recorder = Recorder(path, resume=config.option.lmcache_resume)
        config.pluginmanager.register(recorder, Recorder.NAME)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects other levels, marks tests of unclaimed capabilities as skipped, and known failures as xfail."""
    if config.option.lmcache_level:
        _keep(config, items, _wanted_levels(config.option.lmcache_level))
    suite_items = [item for item in items if level_of(item) is not None]
    if suite_items:
        from lmcache_conformance.runner.capability_skips import apply_claims

        apply_claims(config, suite_items)
    if xfails := config.stash.get(_XFAILS, None):
        config.stash[_UNUSED] = _expect_failures(xfails, items)


def _wanted_levels(text: str) -> set[str]:
    from lmcache_conformance.contract import Level
    from lmcache_conformance.runner.discover import nearest

    wanted = {name.strip() for name in text.split(",")}
    known = [level.value for level in Level]
    for name in sorted(wanted.difference(known)):
        raise pytest.UsageError(f"unknown level {name!r}{nearest(name, known)} Available: {', '.join(known)}")
    return wanted


def _keep(config: pytest.Config, items: list[pytest.Item], levels: set[str]) -> None:
    kept = [item for item in items if level_of(item) in levels]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if level_of(item) not in levels])
        items[:] = kept


def _expect_failures(xfails: Sequence[Xfail], items: list[pytest.Item]) -> list[Xfail]:
    unused = set(xfails)
    for item in items:
        for xfail in xfails:
            if xfail.part in item.nodeid:
                item.add_marker(pytest.mark.xfail(reason=xfail.reason, strict=True))
                unused.discard(xfail)
    return [xfail for xfail in xfails if xfail in unused]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Warns about known failures that match no test: they are most likely misspelt or outdated."""
    for xfail in config.stash.get(_UNUSED, ()):
        terminalreporter.write_line(f"known failures: no test matches {xfail.part!r} ({xfail.link})", yellow=True)


def level_of(item: pytest.Item) -> str | None:
    """Returns the level that a test is marked with; None if it is not a test of the suite."""
    mark = item.get_closest_marker(LEVEL)
    return str(mark.args[0]) if mark is not None else None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Gives each test of the suite a known seed, so that its failure can be reproduced."""
    if level_of(item) is None:
        return (yield)
    with known_seed(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Adds the command that reproduces a failure to its report."""
    report: pytest.TestReport = yield  # type: ignore[misc, assignment]
    level = level_of(item)
    if report.failed and level is not None:
        from lmcache_conformance.runner.reproduce import command, test_id

        seed = seed_of(item)
        text = f"level {level} · {test_id(item).partition('::')[2]} · seed {seed}\n{command(item, seed)}"
        report.sections.append(("reproduce", text))
    return report  # type: ignore[return-value]


@pytest.fixture(scope="session")
def lmcache_budget(request: pytest.FixtureRequest) -> str:
    """`quick` or `full`: how thorough a test should be."""
    return str(request.config.option.lmcache_budget or "quick")


@pytest.fixture
def lmcache_seed(request: pytest.FixtureRequest) -> int:
    """Seed for tests that draw random numbers without Hypothesis; the reproduction command passes the same one."""
    return seed_of(request.node) or 0


@pytest.fixture(scope="session")
def lmcache_adapter(request: pytest.FixtureRequest) -> str:
    """Name of the adapter under test, as given by `--lmcache-adapter`."""
    reference = request.config.option.lmcache_adapter
    if not reference:
        from lmcache_conformance.runner.capability_skips import NO_ADAPTER

        pytest.skip(NO_ADAPTER)
    return str(reference)
